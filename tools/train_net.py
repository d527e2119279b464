#!/usr/bin/env python
"""Trains or evaluates the detector of a config file: python tools/train_net.py --config CONFIG."""

import argparse
import os
import sys

# mmengine's checkpoints hold more than tensors, and torch 2.6 and later load those only when told to.
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")

_TORCHRUN = "`torchrun --nproc-per-node N tools/train_net.py ... --launcher pytorch`"
# What takes the place of Detectron2's options in MMDetection.
DETECTRON2_OPTIONS = {
    "num_gpus": _TORCHRUN,
    "num_machines": _TORCHRUN,
    "machine_rank": _TORCHRUN,
    "dist_url": _TORCHRUN,
    "opts": "--cfg-options KEY=VALUE",
}
# And the other way round, in YAML and in a LazyConfig.
MMDET_OPTIONS = {
    "work_dir": ("OUTPUT_DIR DIR", "train.output_dir=DIR"),
    "checkpoint": ("MODEL.WEIGHTS CKPT", "train.init_checkpoint=CKPT"),
    "amp": ("SOLVER.AMP.ENABLED True", "train.amp.enabled=True"),
    "auto_scale_lr": ("SOLVER.REFERENCE_WORLD_SIZE N", "optimizer.lr=RATE"),
    "cfg_options": ("KEY VALUE ... at the end", "KEY=VALUE ... at the end"),
    "launcher": ("--num-gpus N, or start it with torchrun",) * 2,
}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line; the usage is longer than a screen."""
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def new_parser() -> Parser:
    """Knows the options that decide what the others mean."""
    parser = Parser(
        prog="train_net.py",
        usage="%(prog)s --config CONFIG [options]",
        description="Train a detector, or evaluate it. The framework that CONFIG is for is found out from the file.",
        epilog="Checkpoints are loaded as Python pickles, which can run code: use those that you trust only.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", "--config-file", metavar="CONFIG", help="the config file")
    parser.add_argument(
        "--framework",
        choices=("auto", "mmdet", "detectron2"),
        default="auto",
        help="which framework CONFIG is for, should the file be misleading",
    )
    return parser


def find_config(argv: list[str]) -> tuple[str | None, str]:
    """The config that the command line names, and the framework it asks for, before the rest is understood.

    What the rest means depends on the framework: --resume takes a checkpoint in one and nothing in the other.
    """
    args, rest = new_parser().parse_known_args([argument for argument in argv if argument not in ("-h", "--help")])
    named = (argument for argument in rest if os.path.splitext(argument)[1] in (".py", ".json", ".yaml", ".yml"))
    return args.config or next(named, None), args.framework


def parse_detectron2_args(argv: list[str], config: str) -> argparse.Namespace:
    """Options of Detectron2's own train_net.py; those of MMDetection are understood so that an error can name them."""
    parser = new_parser()
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--eval-only", action="store_true")
    parser.add_argument("--num-gpus", type=int, default=1)
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0)
    parser.add_argument("--dist-url", default="auto")
    for option in ("--amp", "--auto-scale-lr"):
        parser.add_argument(option, action="store_true")
    for option in ("--work-dir", "--checkpoint", "--launcher"):
        parser.add_argument(option)
    parser.add_argument("--cfg-options", nargs="+")
    parser.add_argument("--local_rank", "--local-rank", type=int)
    parser.add_argument("opts", nargs="*")
    args = parser.parse_intermixed_args(argv)
    if not args.config:
        args.config = config
        if config in args.opts:  # another option may have taken it
            args.opts.remove(config)
    if args.num_machines > 1 and args.dist_url == "auto":
        parser.error("--num-machines needs --dist-url, the address of the first machine: tcp://ADDRESS:PORT")
    return args


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = new_parser()
    parser.add_argument("positional", nargs="*", metavar="CONFIG", help="the config file, if not given by --config")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CKPT",
        help="continue a training: from CKPT (MMDetection), or from the last checkpoint of the work folder, if any",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate on the config's test set, do not train")

    group = parser.add_argument_group("options of MMDetection")
    group.add_argument("--work-dir", metavar="DIR", help="where results go (default: work_dirs/<stem of CONFIG>)")
    group.add_argument(
        "--checkpoint", metavar="CKPT", help="what --eval-only evaluates (default: the work folder's last)"
    )
    group.add_argument("--amp", action="store_true", help="automatic mixed precision; needs a GPU")
    group.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    group.add_argument(
        "--cfg-options", nargs="+", metavar="KEY=VALUE", help="override settings: optim_wrapper.optimizer.lr=0.01"
    )
    group.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
    group.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)

    group = parser.add_argument_group(
        "options of Detectron2", "Behind all others: settings that override CONFIG's, KEY VALUE ... or KEY=VALUE ..."
    )
    group.add_argument("--num-gpus", metavar="N", help="processes on this machine")
    group.add_argument("--num-machines", metavar="N", help="machines")
    group.add_argument("--machine-rank", metavar="I", help="number of this machine")
    group.add_argument("--dist-url", metavar="URL", help="where the processes meet")

    args = parser.parse_intermixed_args(argv)
    args.opts = args.positional if args.config else args.positional[1:]
    args.config = args.config or next(iter(args.positional), None)
    if args.config is None:
        parser.error("which config? Write --config CONFIG, for example one of configs/mmdet or configs/detectron2")
    if args.checkpoint and not args.eval_only:
        parser.error(
            "--checkpoint goes with --eval-only; --resume CKPT continues a training, and --cfg-options load_from=CKPT "
            "starts a new one from its weights"
        )
    if args.resume and args.eval_only:
        parser.error("--resume continues a training; --eval-only takes --checkpoint CKPT")
    return args


def main(argv: list[str]) -> int:
    config, framework = find_config(argv)
    if not config or {"-h", "--help"} & set(argv):
        parse_args(argv)  # says what is missing, or helps
    try:
        from dk_detection.config_files import DETECTRON2, framework_of
        from dk_detection.errors import UserError
    except ImportError as error:
        return fail(f"{error}: run `make setup`, and use .venv/bin/python instead of {sys.executable}")
    try:
        found = framework_of(config)  # which checks the file, too
        if (found if framework == "auto" else framework) == DETECTRON2:
            train_with_detectron2(parse_detectron2_args(argv, config))
        else:
            train_with_mmdet(parse_args(argv))
    except UserError as error:
        return fail(error)
    except KeyboardInterrupt as error:
        return fail(str(error) or "interrupted", code=130)
    return 0


def refuse(args: argparse.Namespace, options: dict[str, str], of: str, ours: str) -> None:
    """Refuses options of the other framework, each with what takes its place."""
    from dk_detection.errors import UserError

    for option, instead in options.items():
        if value := getattr(args, option):
            name = " ".join(value) if option == "opts" else f"--{option.replace('_', '-')}"
            raise UserError(f"{name} is for {of}, and {args.config} is a config of {ours}: write {instead}")


def train_with_mmdet(args: argparse.Namespace) -> None:
    from dk_detection.errors import UserError

    refuse(args, DETECTRON2_OPTIONS, "Detectron2", "MMDetection")
    try:
        from dk_detection.mmdet import train
    except ImportError as error:
        raise UserError(f"{args.config} is a config of MMDetection. {error}") from error
    train.run(
        args.config,
        work_dir=args.work_dir,
        amp=args.amp,
        auto_scale_lr=args.auto_scale_lr,
        resume=args.resume,
        cfg_options=args.cfg_options,
        launcher=args.launcher,
        local_rank=args.local_rank,
        eval_only=args.eval_only,
        checkpoint=args.checkpoint,
    )


def train_with_detectron2(args: argparse.Namespace) -> None:
    from dk_detection.config_files import is_lazy_config
    from dk_detection.errors import UserError

    lazy = is_lazy_config(args.config)
    refuse(args, {option: forms[lazy] for option, forms in MMDET_OPTIONS.items()}, "MMDetection", "Detectron2")
    try:
        from dk_detection.detectron2 import train
    except ImportError as error:
        raise UserError(f"{args.config} is a config of Detectron2. {error}") from error
    train.run(
        args.config,
        resume=args.resume,
        eval_only=args.eval_only,
        num_gpus=args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        opts=args.opts,
    )


def fail(message, code: int = 1) -> int:
    print(f"train_net.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
