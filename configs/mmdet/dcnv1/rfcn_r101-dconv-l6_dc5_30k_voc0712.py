_base_ = 'rfcn_r101_dc5_30k_voc0712.py'

model = dict(
    backbone=dict(
        type='DkDeformable',
        network='ResNet',
        exchange=[dict(layer='dconv', select=['layer3.2[012].conv2', 'layer4.*.conv2'])]))
