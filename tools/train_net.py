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


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line; the usage is longer than a screen."""
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="train_net.py",
        usage="%(prog)s --config CONFIG [options]",
        description="Train a detector, or evaluate it. The framework that CONFIG is for is found out from the file.",
        epilog="Checkpoints are loaded as Python pickles, which can run code: use those that you trust only.",
    )
    parser.add_argument("positional", nargs="*", metavar="CONFIG", help="the config file, if not given by --config")
    parser.add_argument("--config", "--config-file", metavar="CONFIG", help="the config file")
    parser.add_argument(
        "--framework",
        choices=("auto", "mmdet", "detectron2"),
        default="auto",
        help="which framework CONFIG is for, should the file be misleading",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CKPT",
        help="continue a training: from CKPT, or from the last checkpoint of the work folder, if there is one",
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
    for option in DETECTRON2_OPTIONS.keys() - {"opts"}:
        parser.add_argument(f"--{option.replace('_', '-')}", help=argparse.SUPPRESS)

    args = parser.parse_intermixed_args(argv)
    args.opts = args.positional if args.config else args.positional[1:]
    args.config = args.config or next(iter(args.positional), None)
    if args.config is None:
        parser.error("which config? Write --config CONFIG, for example one of configs/mmdet")
    if args.checkpoint and not args.eval_only:
        parser.error(
            "--checkpoint goes with --eval-only; --resume CKPT continues a training, and --cfg-options load_from=CKPT "
            "starts a new one from its weights"
        )
    if args.resume and args.eval_only:
        parser.error("--resume continues a training; --eval-only takes --checkpoint CKPT")
    return args


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    try:
        from dk_detection.config_files import DETECTRON2, UserError, framework_of
    except ImportError as error:
        return fail(f"{error}: run `make setup`, and use .venv/bin/python instead of {sys.executable}")
    try:
        framework = framework_of(args.config) if args.framework == "auto" else args.framework
        if framework == DETECTRON2:
            return fail(
                f"{args.config} is a config of Detectron2, and this version trains those of MMDetection: take one of "
                "configs/mmdet, or write --framework mmdet if it is one"
            )
        for option, instead in DETECTRON2_OPTIONS.items():
            if value := getattr(args, option):
                name = " ".join(value) if option == "opts" else f"--{option.replace('_', '-')}"
                return fail(f"{name} is for Detectron2, and {args.config} is a config of MMDetection: write {instead}")
        try:
            from dk_detection.mmdet import train
        except ImportError as error:
            return fail(f"{args.config} is a config of MMDetection. {error}")
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
    except UserError as error:
        return fail(error)
    except KeyboardInterrupt as error:
        return fail(str(error) or "interrupted", code=130)
    return 0


def fail(message, code: int = 1) -> int:
    print(f"train_net.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
