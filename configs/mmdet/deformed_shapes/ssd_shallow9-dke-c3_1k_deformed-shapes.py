_base_ = 'ssd_shallow9_1k_deformed-shapes.py'

model = dict(
    backbone=dict(type='DkDeformable', network='DkShallow9', exchange=[dict(layer='dke', select='branches.*')]))
