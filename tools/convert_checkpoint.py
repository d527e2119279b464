#!/usr/bin/env python
"""Converts a checkpoint of a detector from MMDetection to Detectron2 or back: convert_checkpoint.py FROM TO.

The same detector in the other framework has to be told what the config says: the order of colours, mean and standard
deviation of the pixels, in which convolution of a block the stride is, and the anchors.
"""

import argparse
import pickle
import sys

import torch
from command_line import run

from dk_detection.checkpoint_names import MMDET, framework_of_names, to_detectron2, to_mmdet
from dk_detection.errors import UserError


def read(path: str) -> dict:
    """The state dict in a checkpoint of either framework."""
    try:
        if path.endswith(".pkl"):
            with open(path, "rb") as file:
                content = pickle.load(file, encoding="latin1")
        else:
            content = torch.load(path, map_location="cpu", weights_only=False)
        for key in ("state_dict", "model"):
            content = content.get(key, content)
        return {name.removeprefix("module."): torch.as_tensor(value) for name, value in content.items()}
    except Exception as error:  # depending on what is wrong with the file, nearly any
        raise UserError(f"{path}: the checkpoint cannot be read ({type(error).__name__}: {error})") from error


def write(content: dict, path: str) -> None:
    try:
        torch.save(content, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: the checkpoint cannot be written ({error})") from error


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="convert_checkpoint.py", description=__doc__.partition(":")[0] + ".")
    parser.add_argument(
        "source", metavar="FROM", help="a .pth of either framework, or a .pkl of Detectron2's model zoo"
    )
    parser.add_argument("target", metavar="TO", help="the .pth to write")
    parser.add_argument(
        "--num-ratios", type=int, default=3, metavar="N", help="aspect ratios of anchors (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.num_ratios < 1:
        parser.error(f"--num-ratios must be at least 1, got {args.num_ratios}")
    state = read(args.source)
    if framework_of_names(state) == MMDET:
        content = {"model": to_detectron2(state, num_ratios=args.num_ratios)}
    else:
        content = {"meta": {}, "state_dict": to_mmdet(state, num_ratios=args.num_ratios)}
    write(content, args.target)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
