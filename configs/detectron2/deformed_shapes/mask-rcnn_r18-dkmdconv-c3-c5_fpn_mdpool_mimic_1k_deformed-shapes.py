from detectron2.config import LazyConfig

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel(
    'mask-rcnn_r18-mdconv-c3-c5_fpn_mdpool_mimic_1k_deformed-shapes.py',
    ('dataloader', 'lr_multiplier', 'model', 'optimizer', 'train', 'tta'))

model.exchange[0].layer = 'dkmdconv'
