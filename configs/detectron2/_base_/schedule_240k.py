# 240,000 batches of 8 images, one on each of 8 GPUs, a tenth of the rate after two thirds (Deformable ConvNets, 2017,
# Section 4.1). Offsets learn at the full rate. Momentum, weight decay and warm-up the paper does not give.
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from .schedule_1x import optimizer, train

train.max_iter = 240000
train.eval_period = 40000
optimizer.update(lr=0.001, weight_decay=0.0005)
optimizer.params.lr_factor_func.factors = {}
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[160000], num_updates=train.max_iter),
    warmup_length=500 / train.max_iter,
    warmup_method='linear',
    warmup_factor=0.001)
