"""What make_submission.py and evaluate.py share: detections from result files, or from a detector that is run."""

import argparse
import os

from command_line import Parser, run  # noqa: F401  (`run` for those who import this)

# mmengine's checkpoints hold more than tensors, and torch 2.6 and later load those only when told to.
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


def new_parser(**options) -> Parser:
    """A parser that knows where detections come from."""
    parser = Parser(
        epilog="Checkpoints are loaded as Python pickles, which can run code: use those that you trust only.",
        allow_abbrev=False,
        **options,
    )
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="FILE",
        help="MMDetection's *.bbox.json and *.segm.json, Detectron2's coco_instances_results.json, a package, or the "
        "folder of an inference",
    )
    parser.add_argument(
        "--ann", metavar="FILE", help="annotation file of the images: instances_*.json, image_info_*.json"
    )
    group = parser.add_argument_group("a detector that is run, instead of --results; started again it goes on")
    group.add_argument("--config", metavar="CONFIG", help="a config of MMDetection or Detectron2")
    group.add_argument("--checkpoint", metavar="CKPT", help="the weights")
    group.add_argument("--image-folder", metavar="DIR", help="where the images of --ann are")
    group.add_argument("--work-dir", metavar="DIR", help="where results are kept (default: work_dirs/CONFIG/SET)")
    group.add_argument("--tta", action="store_true", help="test-time augmentation: on several views of each image")
    group.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="settings over the config's")
    group.add_argument(
        "--launcher", choices=("none", "pytorch", "slurm", "mpi"), help="of MMDetection; torchrun's is known"
    )
    group.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes; of Detectron2")
    return parser


def check_arguments(parser: Parser, args: argparse.Namespace) -> None:
    if bool(args.results) == bool(args.config):
        parser.error("name detections by --results, or a detector by --config and --checkpoint")
    if args.config and not args.checkpoint:
        parser.error("--config needs --checkpoint, the weights")
    if args.config and bool(args.ann) != bool(args.image_folder):
        parser.error("--ann and --image-folder go together")


def find_detections(args: argparse.Namespace):
    """The images and where their detections are; runs the detector if one is named.

    Returns:
        `ImageSet`, and files or a folder. None in those of several processes that have nothing left to do.
    """
    from dk_detection.config_files import DETECTRON2, framework_of
    from dk_detection.errors import UserError
    from dk_detection.evaluation.results import ImageSet

    if args.results:
        return ImageSet.read(args.ann), args.results
    try:
        if framework_of(args.config) == DETECTRON2:
            from dk_detection.detectron2 import inference

            processes = dict(num_gpus=args.num_gpus)
        else:
            from dk_detection.mmdet import inference

            processes = dict(launcher=args.launcher)
    except ImportError as error:
        raise UserError(f"{args.config}: {error}") from error
    if not args.ann:
        args.ann, args.image_folder = inference.test_set(args.config, args.cfg_options)
    images = ImageSet.read(args.ann)
    stem = os.path.splitext(os.path.basename(args.config))[0]
    folder = args.work_dir or os.path.join("work_dirs", stem, f"{images.name}_tta" if args.tta else images.name)
    try:
        inference.run(
            args.config,
            args.checkpoint,
            images,
            args.image_folder,
            folder,
            tta=args.tta,
            options=args.cfg_options,
            **processes,
        )
    except KeyboardInterrupt as error:
        raise type(error)("interrupted; what is finished is kept, and the same command goes on") from None
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
    return (images, [folder]) if rank == "0" else None


def number(*values: float) -> str:
    """A figure, or an interval of two; one that is undefined, as nothing is to be found, is a hyphen."""
    return "-" if values[0] != values[0] else " to ".join(f"{value:.1f}" for value in values)
