_base_ = [
    '../_base_/faster-rcnn_r50-dw_fpn.py',
    '../_base_/coco_detection.py',
    '../_base_/schedule_1x.py',
    '../_base_/runtime.py',
]

# Weight decay, and the rate of what makes the offsets as a part of the network's: Deformable Kernels, Section 4. The
# routing of conditional convolutions makes no offsets and learns at the full rate.
optim_wrapper = dict(
    optimizer=dict(weight_decay=4e-5),
    paramwise_cfg=dict(
        custom_keys={
            'kernel_offset': dict(lr_mult=0.01),
            'conv_offset': dict(lr_mult=0.01),
        }))
