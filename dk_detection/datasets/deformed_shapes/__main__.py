"""The command line: python -m dk_detection.datasets.deformed_shapes --out DIR [--task TASK]."""

import argparse
import inspect

from dk_detection.datasets import deformed_shapes

TASKS = {
    "detection": deformed_shapes.make,
    "classification": deformed_shapes.make_classification,
    "segmentation": deformed_shapes.make_segmentation,
}

# By the argument of the functions that make the data sets: option, type, help.
OPTIONS = {
    "seed": ("--seed", int, "the same seed gives the same files"),
    "difficulty": (
        "--difficulty",
        float,
        "of the surfaces, and in detection and segmentation of the outlines: 0 (easy) to 1 (hard)",
    ),
    "image_size": ("--image-size", int, "width and height in pixels"),
    "num_train": ("--train", int, "number of training images"),
    "num_val": ("--val", int, "number of validation images"),
    "num_test": ("--test", int, "number of test images"),
    "scale": ("--scale", float, "0 (objects of one size) to 1"),
    "rotation": ("--rotation", float, "0 (upright) to 1 (any angle)"),
    "shear": ("--shear", float, "0 (none) to 1"),
    "warp": ("--warp", float, "0 (none) to 1: how much outlines are bent"),
}


def defaults(task: str) -> dict:
    parameters = inspect.signature(TASKS[task]).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name in OPTIONS}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dk_detection.datasets.deformed_shapes",
        description="Make a data set of deformed shapes: for detection in COCO's format, for classification in "
        "ImageNet's folders, for segmentation with the class of every pixel in a picture beside each image.",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the data set")
    parser.add_argument("--task", choices=tuple(TASKS), default="detection", help="default: %(default)s")
    for name, (option, kind, text) in OPTIONS.items():
        known = ", ".join(f"{defaults(task)[name]} in {task}" for task in TASKS if name in defaults(task))
        parser.add_argument(
            option,
            dest=name,
            type=kind,
            metavar="N" if kind is int else "X",
            default=argparse.SUPPRESS,
            help=f"{text} (default: {known})",
        )
    given = vars(parser.parse_args(arguments))
    out, task = given.pop("out"), given.pop("task")
    if wrong := sorted(given.keys() - defaults(task).keys()):
        parser.error(f"{OPTIONS[wrong[0]][0]} does not go with --task {task}")
    try:
        made = TASKS[task](out, **given)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    print(f"{out}: {'made' if made else 'is complete already'}")


if __name__ == "__main__":
    main()
