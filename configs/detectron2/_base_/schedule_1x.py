# Detectron2's 1x. Offset branches learn at a tenth of the rate (Deformable ConvNets v2, Section 3.2).
from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from dk_detection.detectron2 import LearningRateFactors

train = model_zoo.get_config('common/train.py').train
lr_multiplier = model_zoo.get_config('common/coco_schedule.py').lr_multiplier_1x
optimizer = model_zoo.get_config('common/optim.py').SGD
optimizer.params.base_lr = '${..lr}'
optimizer.params.lr_factor_func = L(LearningRateFactors)(factors={'conv_offset': 0.1})
