"""Run by test_mimic.py: feature mimicking in two processes with an image each, and in one process with both images.

Arguments: a folder, and the scenarios as Python: lists of the number of objects on each image and options of the
branch. Leaves the gradients of each scenario in the folder.
"""

import ast
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from mmcv.ops import batched_nms
from mmdet.models.dense_heads import rpn_head
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tests.mmdet.test_mimic import DETECTORS, batch, build, small


def nms_in_float(boxes: torch.Tensor, scores: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """mmcv's, which has no float64."""
    detections, kept = batched_nms(boxes.float(), scores.float(), *args, **kwargs)
    return detections.double(), kept


def losses_of(network: nn.Module, model: nn.Module, num_objects: list[int], images: list[int]) -> dict:
    data = {key: [values[i] for i in images] for key, values in batch(num_objects).items()}
    return network(**model.data_preprocessor(data, True), mode="loss")


def mimicking_gradients(model: nn.Module, losses: dict) -> dict:
    """Gradients of the two mimicking losses. The others are normalised by each process for itself."""
    model.zero_grad()
    rest, _ = model.parse_losses({key: value for key, value in losses.items() if "mimic" not in key})
    (losses["loss_mimic"] + losses["loss_mimic_cls"] + 0 * rest).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def process(rank: int, model: nn.Module, num_objects: list[int], path: Path) -> None:
    store = f"file://{path}.store"
    distributed.init_process_group("gloo", store, timedelta(minutes=5), world_size=2, rank=rank)
    network = DistributedDataParallel(model)
    together = mimicking_gradients(model, losses_of(network, model, num_objects, [rank]))
    model.zero_grad()
    model.parse_losses(losses_of(network, model, num_objects, [rank]))[0].backward()
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if rank == 0:
        torch.save({"together": together, "left out": left_out}, path)
    distributed.barrier()


def run(num_objects: list[int], options: dict, path: Path) -> None:
    cfg = small(*DETECTORS["c5"], max_rois=1000, **options)
    # All RoIs are sampled, so that chance does not give two processes others than one.
    cfg.model.train_cfg.rcnn.sampler.update(num=1000, pos_fraction=1.0)
    model = build(cfg).double()  # in float32 a rounded sum now and then changes sides at a ReLU
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            process(rank, model, num_objects, path)
            os._exit(0)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit("a process failed")
    alone = mimicking_gradients(model, losses_of(model, model, num_objects, [0, 1]))
    torch.save({**torch.load(path, weights_only=True), "alone": alone}, path)


if __name__ == "__main__":
    rpn_head.batched_nms = nms_in_float
    torch.set_num_threads(1)  # threads do not survive a fork
    for number, (num_objects, options) in enumerate(ast.literal_eval(sys.argv[2])):
        run(num_objects, options, Path(sys.argv[1]) / f"{number}.pth")
