# COCO as Detectron2 knows it, at one scale; the environment variable DETECTRON2_DATASETS says where it lies.
from detectron2 import model_zoo

dataloader = model_zoo.get_config('common/data/coco.py').dataloader
dataloader.train.mapper.augmentations[0].short_edge_length = [800]
