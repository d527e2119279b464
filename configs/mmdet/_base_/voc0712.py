_base_ = ['mmdet::_base_/datasets/voc0712.py', 'multi_scale_testing.py']

# Training on trainval of 2007 and 2012, evaluation on test of 2007, shorter sides of 600 pixels (Deformable ConvNets,
# 2017, Section 4.1). The environment variable DK_VOC_ROOT says where VOC2007 and VOC2012 lie.
data_root = '{{$DK_VOC_ROOT:data/VOCdevkit}}/'

train_dataloader = dict(
    batch_size=1,
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        ignore_keys=['dataset_type'],
        datasets=[
            dict(
                type='VOCDataset',
                data_root=data_root,
                ann_file=f'VOC{year}/ImageSets/Main/trainval.txt',
                data_prefix=dict(sub_data_root=f'VOC{year}/'),
                filter_cfg=dict(filter_empty_gt=True),
                pipeline={{_base_.train_pipeline}}) for year in (2007, 2012)
        ]))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))
val_evaluator = dict(iou_thrs=[0.5, 0.7])
test_evaluator = dict(iou_thrs=[0.5, 0.7])
