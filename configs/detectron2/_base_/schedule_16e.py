# 16 epochs of 117266 images in batches of 16, a tenth of the rate after 10 and after 14 (Deformable ConvNets v2,
# Section 5.1).
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from .schedule_1x import optimizer, train

train.max_iter = 16 * 7330
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[10 * 7330, 14 * 7330], num_updates=train.max_iter),
    warmup_length=500 / train.max_iter,
    warmup_method='linear',
    warmup_factor=0.001)
