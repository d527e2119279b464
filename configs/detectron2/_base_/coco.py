# COCO as Detectron2 knows it, at one scale; the environment variable DETECTRON2_DATASETS says where it lies.
from detectron2 import model_zoo

dataloader = model_zoo.get_config('common/data/coco.py').dataloader
dataloader.train.mapper.augmentations[0].short_edge_length = [800]

# Multi-scale testing of Deformable ConvNets (2017, Table 5), for --tta, or in training with enabled=True. Box
# averaging, which the table calls B: tta.box_averaging.iterations=1.
tta = dict(
    enabled=False,
    min_sizes=[480, 576, 688, 864, 1200, 1400],
    max_size=4000,
    flip=True,
    box_averaging=dict(iterations=0))
