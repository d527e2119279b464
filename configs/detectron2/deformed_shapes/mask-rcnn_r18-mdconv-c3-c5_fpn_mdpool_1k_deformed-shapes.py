from detectron2.config import LazyConfig

from dk_detection.detectron2 import DkROIPooler

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel(
    'mask-rcnn_r18-mdconv-c3-c5_fpn_1k_deformed-shapes.py',
    ('dataloader', 'lr_multiplier', 'model', 'optimizer', 'train', 'tta'))

for pooler in (model.network.roi_heads.box_pooler, model.network.roi_heads.mask_pooler):
    pooler.update(
        _target_=DkROIPooler,
        pooler_type='DkModulatedDeformRoIPool',
        channels=64,
        branch_size=7,
        deform_fc_channels=256)
# AdamW takes steps of the same size however small the gradients are: at the full rate bins wander off before the heads
# have learned anything.
optimizer.params.lr_factor_func.factors.offset_fc = 0.1
