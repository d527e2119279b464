_base_ = 'regnet-dw_2e_deformed-shapes.py'

model = dict(
    backbone=dict(
        type='DkDeformable',
        network='RegNet',
        exchange=[dict(layer='gdk', select='layer[23].*.conv2')]))
