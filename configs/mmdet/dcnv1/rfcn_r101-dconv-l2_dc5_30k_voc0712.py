_base_ = 'rfcn_r101_dc5_30k_voc0712.py'

model = dict(
    backbone=dict(
        type='DkDeformable', network='ResNet', exchange=[dict(layer='dconv', select='layer4.[12].conv2')]))
