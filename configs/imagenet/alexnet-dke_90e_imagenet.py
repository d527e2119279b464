_base_ = 'alexnet_90e_imagenet.py'

model = dict(
    backbone=dict(
        type='DkDeformable', network='AlexNet', exchange=[dict(layer='dke', select='features.*', start='normal')]))
