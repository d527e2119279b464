_base_ = 'mask-rcnn_r18-mdconv-c3-c5_fpn_mdpool_1k_deformed-shapes.py'

# Objects of 14 to 60 pixels: patches to that scale, and as many of them as two CPU cores have time for.
model = dict(type='DkMimicRCNN', mimic=dict(patch_size=48, max_rois=2))
