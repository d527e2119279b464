from detectron2.config import LazyConfig

from dk_detection.detectron2 import DkMimicRCNN, DkROIPooler

dataloader, lr_multiplier, model, optimizer, train = LazyConfig.load_rel(
    'mask-rcnn_r18-mdconv-c3-c5_fpn_1k_deformed-shapes.py',
    ('dataloader', 'lr_multiplier', 'model', 'optimizer', 'train'))

model.exchange.update(layer='dkdconv', modulated=True)
for pooler in (model.network.roi_heads.box_pooler, model.network.roi_heads.mask_pooler):
    pooler.update(
        _target_=DkROIPooler,
        pooler_type='DkModulatedDeformRoIPool',
        channels=64,
        branch_size=7,
        deform_fc_channels=256)
# Objects of 14 to 60 pixels: patches to that scale, and as many of them as two CPU cores have time for.
model.network.update(_target_=DkMimicRCNN, mimic=dict(patch_size=64, max_rois=2))
