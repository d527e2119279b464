# What the configs of a family put together.
import os

import torch
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock

from dk_detection.detectron2 import (
    DkAlignedInceptionResNet,
    DkClassAwareRPN,
    DkClassAwareRPNHead,
    DkDeformable,
    DkMimicRCNN,
    DkROIPooler,
    DkVOCEvaluator,
    DkVotePredictor,
)
from dk_detection.layers import table

KEYS = ('dataloader', 'lr_multiplier', 'model', 'optimizer', 'train', 'tta')


def detector(model):
    """The detector itself, also where convolutions of it are exchanged."""
    return model.network if 'network' in model else model


def deform_convs(model, token, stages, convs='conv2'):
    """Exchanges the 3x3 convolutions of stages, '345' for conv3 to conv5. In ResNet-18 they are 'conv[12]'."""
    return L(DkDeformable)(
        network=model, exchange=[dict(layer=token, select=f'backbone.bottom_up.res[{stages}].*.{convs}')])


def deform_last_convs(model, token, number):
    """Exchanges the last 3x3 convolutions of ResNet-101, up to six of them."""
    convs = ['res4.20', 'res4.21', 'res4.22', 'res5.0', 'res5.1', 'res5.2'][-number:]
    return L(DkDeformable)(
        network=model,
        exchange=[dict(layer=token, select=[f'backbone.bottom_up.{conv}.conv2' for conv in convs])])


def dilate(model, dilation):
    """Another dilation of the 3x3 convolutions of conv5."""
    model.backbone.bottom_up.stages[3].dilation = dilation


def deform_pooling(model, optimizer, token):
    """Deformable RoI pooling in all heads. The mask head's branch reads 7x7 bins, as that of the box head."""
    heads = detector(model).roi_heads
    options = dict(_target_=DkROIPooler, pooler_type=table.find(token).name, channels=256)
    heads.box_pooler.update(options)
    if 'mask_pooler' in heads:
        heads.mask_pooler.update(options, branch_size=7)
    if token == 'dpool':  # a hundredth of the rate, as in the code of Deformable ConvNets (2017)
        optimizer.params.lr_factor_func.factors.offset_fc = 0.01


def vote(model, channels, output_size):
    """R-FCN (2016) behind the features of `channels`: position-sensitive score and box maps, whose bins vote."""
    heads = model.roi_heads
    heads.box_pooler.update(
        _target_=DkROIPooler,
        pooler_type='DkRFCNPool',
        channels=channels,
        output_channels=heads.num_classes + 1 + 4,
        output_size=output_size,
        sampling_ratio=0,
        deform=False)
    heads.box_head = L(torch.nn.Identity)()
    heads.box_predictor.update(_target_=DkVotePredictor, smooth_l1_beta=1.0)
    for part in ('mask_in_features', 'mask_pooler', 'mask_head'):
        heads.pop(part, None)


def deform_votes(model):
    """Deformable position-sensitive RoI pooling in an R-FCN."""
    detector(model).roi_heads.box_pooler.deform = True


def class_aware_rpn(model, channels):
    """Class-aware RPN with the anchors, the backbone and the RPN of a Faster R-CNN, on conv5 reduced to `channels`."""
    rpn, backbone, predictor = model.proposal_generator, model.backbone, model.roi_heads.box_predictor
    backbone.out_channels = channels
    backbone.bottom_up.out_features = ['res5']
    return L(DkClassAwareRPN)(
        backbone=backbone,
        head=L(DkClassAwareRPNHead)(
            in_channels=channels,
            num_anchors=rpn.head.num_anchors,
            num_classes='${..num_classes}',
            conv_dims=rpn.head.conv_dims),
        head_in_features=['res5'],
        anchor_generator=rpn.anchor_generator,
        box2box_transform=rpn.box2box_transform,
        anchor_matcher=rpn.anchor_matcher,
        num_classes=model.roi_heads.num_classes,
        batch_size_per_image=rpn.batch_size_per_image,
        positive_fraction=rpn.positive_fraction,
        anchor_boundary_thresh=0,
        smooth_l1_beta=1 / 9,
        test_score_thresh=predictor.test_score_thresh,
        test_topk_candidates=1000,
        test_nms_thresh=0.5,
        max_detections_per_image=predictor.get('test_topk_per_image', 100),
        pixel_mean=model.pixel_mean,
        pixel_std=model.pixel_std,
        input_format=model.input_format)


def use_voc0712(model, dataloader, lr_multiplier, train):
    """PASCAL VOC in place of COCO (Deformable ConvNets, 2017, Section 4.1): training on trainval of 2007 and 2012 for
    30,000 batches, evaluation on test of 2007. Anchors are those of Faster R-CNN (2015)."""
    heads, rpn = model.get('roi_heads', model), model.get('proposal_generator', model)
    heads.num_classes = 20
    if 'output_channels' in heads.get('box_pooler', {}):  # of R-FCN
        heads.box_pooler.output_channels = 20 + 1 + 4
    rpn.anchor_generator.sizes = [[128, 256, 512]]
    rpn.head.num_anchors = 9
    dataloader.train.dataset.names = ['voc_2007_trainval', 'voc_2012_trainval']
    dataloader.test.dataset.names = 'voc_2007_test'
    dataloader.evaluator = L(DkVOCEvaluator)(dataset_name='${..test.dataset.names}')
    train.update(max_iter=30000, eval_period=10000)
    lr_multiplier.scheduler.update(milestones=[20000], num_updates=30000)
    lr_multiplier.warmup_length = 500 / 30000


def mimic(model, **options):
    """R-CNN feature mimicking."""
    detector(model).update(_target_=DkMimicRCNN, mimic=options)


def set_pixels(model, dataloader, order, mean, std):
    """How images come to the network: order of the colours, mean and standard deviation in it."""
    detector(model).update(input_format=order, pixel_mean=mean, pixel_std=std)
    dataloader.train.mapper.image_format = order


def resnet(depth, *, groups=1, width_per_group=64, stride_in_1x1=False, dilated=False):
    """A ResNet or ResNeXt; `dilated`: conv5 has stride 1 and dilation 2."""
    blocks = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[depth]
    return [
        L(ResNet.make_stage)(
            block_class=BottleneckBlock,
            num_blocks=number,
            stride_per_block=[1 if i == 0 or (dilated and i == 3) else 2] + [1] * (number - 1),
            in_channels=128 * 2**i if i else 64,
            out_channels=256 * 2**i,
            bottleneck_channels=groups * width_per_group * 2**i,
            num_groups=groups,
            stride_in_1x1=stride_in_1x1,
            dilation=2 if dilated and i == 3 else 1,
            norm='FrozenBN') for i, number in enumerate(blocks)
    ]


def use_r18(model, dataloader, train):
    """ResNet-18 with torchvision's weights. Detectron2's model zoo has none of it: the environment variable
    DK_R18_CHECKPOINT says where they lie, under Detectron2's names (docs/configs.md)."""
    bottom_up = detector(model).backbone.bottom_up
    bottom_up.freeze_at = 2
    bottom_up.stages = [
        L(ResNet.make_stage)(
            block_class=BasicBlock,
            num_blocks=2,
            stride_per_block=[2 if i else 1, 1],
            in_channels=64 * 2**max(i - 1, 0),
            out_channels=64 * 2**i,
            norm='FrozenBN') for i in range(4)
    ]
    set_pixels(model, dataloader, 'RGB', [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    train.init_checkpoint = os.environ.get('DK_R18_CHECKPOINT', 'checkpoints/resnet18.pth')


def use_r50(model, dataloader, train, **options):
    """ResNet-50 with torchvision's weights, as in MMDetection's configs."""
    detector(model).backbone.bottom_up.update(stages=resnet(50, **options), freeze_at=2)
    set_pixels(model, dataloader, 'RGB', [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    train.init_checkpoint = 'detectron2://ImageNetPretrained/torchvision/R-50.pkl'


def use_r101(model, dataloader, train, **options):
    """ResNet-101 with MSRA's weights, whose stride is in the first 1x1 convolution of a block."""
    detector(model).backbone.bottom_up.stages = resnet(101, stride_in_1x1=True, **options)
    set_pixels(model, dataloader, 'BGR', [103.53, 116.28, 123.675], [1.0, 1.0, 1.0])
    train.init_checkpoint = 'detectron2://ImageNetPretrained/MSRA/R-101.pkl'


def use_x101(model, dataloader, train, **options):
    """ResNeXt-101-32x8d with Facebook's weights."""
    detector(model).backbone.bottom_up.stages = resnet(101, groups=32, width_per_group=8, **options)
    set_pixels(model, dataloader, 'BGR', [103.53, 116.28, 123.675], [57.375, 57.12, 58.395])
    train.init_checkpoint = 'detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl'


def use_air(model, dataloader, train):
    """Aligned-Inception-ResNet with conv5 at stride 16. Weights of it, trained on ImageNet, are published nowhere;
    configs/imagenet makes them. The environment variable DK_AIR_CHECKPOINT says where yours lie (docs/configs.md)."""
    model.backbone.bottom_up = L(DkAlignedInceptionResNet)(
        dilated_c5=True, out_indices=(2, 3), frozen_stages=1, norm_eval=True)
    set_pixels(model, dataloader, 'RGB', [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    checkpoint = os.environ.get('DK_AIR_CHECKPOINT', 'work_dirs/air_90e_imagenet/backbone.pth')
    train.init_checkpoint = f'{checkpoint}?matching_heuristics=True'
    # Nothing is exchanged here; but the whole detector then understands the short names of the backbone's weights.
    return L(DkDeformable)(network=model, exchange=[])
