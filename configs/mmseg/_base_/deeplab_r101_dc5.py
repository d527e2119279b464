_base_ = 'mmseg::_base_/models/fcn_r50-d8.py'

# DeepLab as in Deformable ConvNets (2017), Section 2.3: conv5 at stride 16, its 3x3 convolutions with dilation 2, a 1x1
# convolution to 1024 channels, and one to a score for each class; scores are enlarged to the image bilinearly.
model = dict(
    data_preprocessor=dict(size_divisor=1),  # images are trained on as they are; several are filled up to the largest
    pretrained=None,
    backbone=dict(
        type='ResNet',
        depth=101,
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
        contract_dilation=False,
        frozen_stages=1,
        norm_cfg=dict(type='BN', requires_grad=False),
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet101')),
    decode_head=dict(
        channels=1024,
        num_convs=1,
        kernel_size=1,
        concat_input=False,
        norm_cfg=None,
        dropout_ratio=0.0,
        loss_decode=dict(avg_non_ignore=True)),  # the mean is of pixels that have a class
    auxiliary_head=None)
