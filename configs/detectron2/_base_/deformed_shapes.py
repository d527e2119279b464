# Made by `python -m dk_detection.datasets.deformed_shapes`; DK_DEFORMED_SHAPES_ROOT says where it lies. Importing our
# adapter registers it.
import detectron2.data.transforms as T
from detectron2 import model_zoo
from detectron2.config import LazyCall as L

import dk_detection.detectron2

dataloader = model_zoo.get_config('common/data/coco.py').dataloader
dataloader.train.dataset.names = 'deformed_shapes_train'
dataloader.train.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=128, max_size=128),
    L(T.RandomFlip)(horizontal=True),
    L(T.RandomFlip)(horizontal=False, vertical=True),
]
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 1
dataloader.test.dataset.names = 'deformed_shapes_val'
dataloader.test.mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=128, max_size=128)]
dataloader.test.batch_size = 8
dataloader.test.num_workers = 1

# For --tta, sides that suit images of 128 pixels.
tta = dict(enabled=False, min_sizes=[96, 128, 176], max_size=400, flip=True, box_averaging=dict(iterations=0))
