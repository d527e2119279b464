_base_ = 'regnet-dw-dk-paper_2e_deformed-shapes.py'

# No offset is learned: the functions of the rigid network, in the paper's parametrisation.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(kernel_offset=dict(lr_mult=0.0))))
