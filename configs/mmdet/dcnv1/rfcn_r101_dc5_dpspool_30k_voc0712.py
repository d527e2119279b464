_base_ = 'rfcn_r101_dc5_30k_voc0712.py'

model = dict(
    roi_head=dict(bbox_roi_extractor=dict(roi_layer=dict(deform=True))))
