_base_ = 'mmdet::_base_/schedules/schedule_1x.py'

# Offset branches learn at a tenth of the rate (Deformable ConvNets v2, Section 3.2).
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'conv_offset': dict(lr_mult=0.1)}))
