_base_ = '../dcnv2/faster-rcnn_r50_fpn_1x_coco.py'

# Dense local deformable kernels, which the paper could not run, out of torchvision's ResNet-50.
model = dict(
    backbone=dict(type='DkDeformable', network='ResNet', exchange=[dict(layer='dk', select='layer[234].*.conv2')]))

optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'kernel_offset': dict(lr_mult=0.01)}))
