"""The backbone of a classifier, for detectors to start from."""

import os

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module(force=True)
class DkBackboneHook(Hook):
    """Leaves `backbone.pth` in the work folder with each checkpoint: the weights of the backbone, under its own names.

    Such a file is a pretrained backbone as torchvision's are: MMDetection takes it as `init_cfg=dict(type='Pretrained',
    checkpoint=...)` of the backbone, Detectron2 as `FILE?matching_heuristics=True`.
    """

    priority = "LOWEST"  # behind EMAHook, which puts its averages into the checkpoint

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        weights = checkpoint["state_dict"]
        own = {name.removeprefix("backbone."): weights[name] for name in weights if name.startswith("backbone.")}
        path = os.path.join(runner.work_dir, "backbone.pth")
        torch.save(own, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)  # the file is whole or not there
