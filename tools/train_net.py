#!/usr/bin/env python
"""Trains or evaluates the model of a config file: python tools/train_net.py --config CONFIG."""

import argparse
import os
import sys

try:
    from dk_detection.config_files import DETECTRON2, MMENGINE, framework_of, is_config_file
    from dk_detection.errors import Terminated, UserError, catch_sigterm, end_children
except ImportError as error:
    sys.exit(f"train_net.py: {error}: run `make setup`, and use .venv/bin/python instead of {sys.executable}")

NAMES = {MMENGINE: "MMEngine", DETECTRON2: "Detectron2"}
TORCHRUN = "`torchrun --nproc-per-node N tools/train_net.py ...`"
# Options that a framework does not have, with what takes their place there.
INSTEAD = {
    MMENGINE: {
        "num_gpus": TORCHRUN,
        "num_machines": TORCHRUN,
        "machine_rank": TORCHRUN,
        "dist_url": TORCHRUN,
        "opts": "--cfg-options KEY=VALUE",
    },
    DETECTRON2: {
        "work_dir": "OUTPUT_DIR DIR (YAML) or train.output_dir=DIR (LazyConfig)",
        "checkpoint": "MODEL.WEIGHTS CKPT (YAML) or train.init_checkpoint=CKPT (LazyConfig)",
        "amp": "SOLVER.AMP.ENABLED True (YAML) or train.amp.enabled=True (LazyConfig)",
        "auto_scale_lr": "SOLVER.REFERENCE_WORLD_SIZE N (YAML) or optimizer.lr=RATE (LazyConfig)",
        "cfg_options": "KEY VALUE ... (YAML) or KEY=VALUE ... (LazyConfig) at the end",
        "launcher": f"--num-gpus N or {TORCHRUN}",
    },
}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line; the usage is longer than a screen."""
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def config_parser() -> Parser:
    """Knows the options that decide what the others mean."""
    parser = Parser(prog="train_net.py", add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--config", "--config-file", dest="config_file", metavar="CONFIG", help="the config; --config may be left out"
    )
    parser.add_argument(
        "--framework", choices=(MMENGINE, DETECTRON2), help="which one CONFIG is for, should the file be misleading"
    )
    return parser


def full_parser(framework: str | None) -> Parser:
    parser = Parser(
        prog="train_net.py",
        usage="%(prog)s --config CONFIG [options]",
        description="Train a detector, classifier or segmentor, or evaluate it. The framework that CONFIG is for is "
        "found out from the file.",
        epilog="Checkpoints are loaded as Python pickles, which can run code: use those that you trust only.",
        parents=[config_parser()],
        allow_abbrev=False,
    )
    parser.add_argument(
        "--resume",
        **(dict(action="store_true") if framework == DETECTRON2 else dict(nargs="?", const="auto", metavar="CKPT")),
        help="continue a training: from CKPT (MMEngine), or from the last checkpoint of the work folder, if any",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate on the config's test set, do not train")

    group = parser.add_argument_group("options of MMEngine: MMDetection, MMPretrain, MMSegmentation")
    group.add_argument("--work-dir", metavar="DIR", help="where results go (default: work_dirs/<stem of CONFIG>)")
    group.add_argument(
        "--checkpoint", metavar="CKPT", help="what --eval-only evaluates (default: the work folder's last)"
    )
    group.add_argument("--amp", action="store_true", help="automatic mixed precision; needs a GPU")
    group.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    group.add_argument(
        "--cfg-options", nargs="+", metavar="KEY=VALUE", help="override settings: optim_wrapper.optimizer.lr=0.01"
    )
    group.add_argument(
        "--launcher",
        choices=("none", "pytorch", "slurm", "mpi"),
        help="what started this process as one of several (default: pytorch under torchrun, else none)",
    )
    group.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)

    group = parser.add_argument_group(
        "options of Detectron2", "Behind all others: settings that override CONFIG's, KEY VALUE ... or KEY=VALUE ..."
    )
    group.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes on this machine")
    group.add_argument("--num-machines", type=int, default=1, metavar="N", help="machines")
    group.add_argument("--machine-rank", type=int, default=0, metavar="I", help="number of this machine")
    group.add_argument("--dist-url", default="auto", metavar="URL", help="where the processes meet")
    group.add_argument("opts", nargs="*", help=argparse.SUPPRESS)
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The options, as the framework of the config file means them: --resume takes a checkpoint in one of them only.

    Raises:
        UserError: The config file cannot be used, or an option is for the other framework.
    """
    known, rest = config_parser().parse_known_args(argv)
    if not known.config_file and (
        named := [argument for argument in rest if is_config_file(argument) and "=" not in argument]
    ):
        known.config_file = named[0]
        rest.remove(known.config_file)
    found = framework_of(known.config_file) if known.config_file else None  # which checks the file, too
    framework = known.framework or found
    parser = full_parser(framework)
    args = parser.parse_intermixed_args(rest, known)
    if not args.config_file:
        parser.error("which config? Write --config CONFIG, for example one of configs/mmdet or configs/detectron2")
    args.framework = framework
    for option, instead in INSTEAD[framework].items():
        value = getattr(args, option)
        if value not in (parser.get_default(option), []):
            name = " ".join(value) if option == "opts" else f"--{option.replace('_', '-')}"
            raise UserError(
                f"{name} is no option of {NAMES[framework]}, which {args.config_file} is for: write {instead}"
            )
    if args.checkpoint and not args.eval_only:
        parser.error(
            "--checkpoint goes with --eval-only; --resume CKPT continues a training, and --cfg-options load_from=CKPT "
            "starts a new one from its weights"
        )
    if args.resume and args.eval_only and framework == MMENGINE:
        parser.error("--resume continues a training; --eval-only takes --checkpoint CKPT")
    if args.num_machines > 1 and args.dist_url == "auto":
        parser.error("--num-machines needs --dist-url, the address of the first machine: tcp://ADDRESS:PORT")
    return args


def main(argv: list[str]) -> int:
    catch_sigterm()
    # mmengine's checkpoints hold more than tensors, and torch 2.6 and later load those only when told to.
    os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    try:
        args = parse_args(argv)
        try:
            if args.framework == DETECTRON2:
                from dk_detection.detectron2 import train
            else:
                from dk_detection.mmengine import train
        except ImportError as error:
            raise UserError(f"{args.config_file} is a config of {NAMES[args.framework]}. {error}") from error
        train.run(args)
    except UserError as error:
        return fail(error)
    except KeyboardInterrupt as error:
        end_children()
        return fail(str(error) or "interrupted", 143 if isinstance(error, Terminated) else 130)
    return 0


def fail(message, status: int = 1) -> int:
    print(f"train_net.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
