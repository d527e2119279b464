_base_ = ['mmdet::_base_/datasets/coco_detection.py', 'multi_scale_testing.py']

# The environment variable DK_COCO_ROOT says where COCO lies.
data_root = '{{$DK_COCO_ROOT:data/coco}}/'

train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
