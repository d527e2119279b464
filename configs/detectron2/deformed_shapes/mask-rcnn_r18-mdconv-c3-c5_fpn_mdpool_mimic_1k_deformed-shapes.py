from detectron2.config import LazyConfig

from dk_detection.detectron2 import DkMimicRCNN

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel(
    'mask-rcnn_r18-mdconv-c3-c5_fpn_mdpool_1k_deformed-shapes.py',
    ('dataloader', 'lr_multiplier', 'model', 'optimizer', 'train', 'tta'))

# Objects of 14 to 60 pixels: patches to that scale (FPN takes multiples of 32), and as many of them as two CPU cores
# have time for.
model.network.update(_target_=DkMimicRCNN, mimic=dict(patch_size=64, max_rois=2))
