# A narrow R-FCN for objects of 14 to 60 pixels, at half the strides: conv4 and conv5 at 8. A RoI costs little, so there
# are as many as in the paper.
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock

from dk_detection.detectron2 import DkReduceLast, DkRPN

from .._base_.parts import KEYS, vote

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel(
    'mask-rcnn_r18_fpn_1k_deformed-shapes.py', KEYS)
bottom_up = model.backbone.bottom_up
bottom_up.stem.out_channels = 16
bottom_up.stages = [
    L(ResNet.make_stage)(
        block_class=BottleneckBlock,
        num_blocks=number,
        stride_per_block=[2 if i == 1 else 1] + [1] * (number - 1),
        in_channels=32 * 2**i if i else 16,
        out_channels=64 * 2**i,
        bottleneck_channels=16 * 2**i,
        stride_in_1x1=False,
        dilation=2 if i == 3 else 1,
        norm='BN') for i, number in enumerate((3, 4, 6, 3))
]
bottom_up.out_features = ['res4', 'res5']
model.backbone = L(DkReduceLast)(bottom_up=bottom_up, out_channels=128)
model.proposal_generator.update(
    _target_=DkRPN,
    in_features=['res4'],
    batch_size_per_image=128,
    pre_nms_topk=(600, 600),
    post_nms_topk=(300, 300),
    anchor_boundary_thresh=0)
model.proposal_generator.head.update(in_channels=256, num_anchors=9, conv_dims=[64])
model.proposal_generator.anchor_generator.update(sizes=[[16, 32, 64]], strides=[8])
model.roi_heads.update(box_in_features=['res5'], batch_size_per_image=128)
model.roi_heads.box_pooler.scales = (1 / 8, )
vote(model, 128, 3)
dataloader.train.mapper.use_instance_mask = False
