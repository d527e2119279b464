_base_ = 'regnet-dw_2e_deformed-shapes.py'

model = dict(
    backbone=dict(
        type='DkDeformable',
        network='RegNet',
        exchange=[dict(layer='dk', select='layer[23].*.conv2', scope_size=5, parametrisation='paper')]))
