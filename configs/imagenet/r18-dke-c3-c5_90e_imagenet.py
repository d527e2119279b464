_base_ = 'r18_90e_imagenet.py'

model = dict(
    backbone=dict(
        type='DkDeformable',
        network='ResNet',
        exchange=[dict(layer='dke', select='layer[234].*.conv[12]', start='normal')]))
