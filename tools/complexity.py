#!/usr/bin/env python
"""Counts parameters and FLOPs of a config's detector or of a backbone: python tools/complexity.py --config CONFIG."""

import argparse
import ast
import re
import sys

from command_line import Parser, run


def layer(text: str) -> dict:
    """dk:scope_size=5 -> dict(layer="dk", scope_size=5)."""
    token, _, options = text.partition(":")
    arguments = dict(layer=token)
    for option in filter(None, options.split(",")):
        name, equals, value = option.partition("=")
        if not (name.isidentifier() and equals and value):
            raise argparse.ArgumentTypeError(f"{text!r}: write LAYER or LAYER:OPTION=VALUE,OPTION=VALUE")
        # Numbers and True are what they look like, and all else is a word.
        is_literal = re.fullmatch(r"-?\d+(\.\d+)?|True|False|None", value)
        arguments[name] = ast.literal_eval(value) if is_literal else value
    return arguments


def positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive integer")
    return int(text)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="complexity.py",
        usage="%(prog)s (--config CONFIG | --backbone NAME | --table {dk,dke,dcnv2}) [options]",
        description="Count parameters and FLOPs (multiply-adds) of one image. docs/complexity.md has the rules.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="CONFIG", help="the detector of a config file")
    what.add_argument(
        "--backbone", metavar="NAME", help="resnet50-dw, mobilenet-v2 or a classification model of torchvision"
    )
    what.add_argument(
        "--table",
        choices=("dk", "dke", "dcnv2"),
        help="the paper's figures beside ours: Tables 1 and 2 of Deformable Kernels, Table 1 of Differentiable Kernel "
        "Evolution, Table 1 of Deformable ConvNets v2",
    )
    parser.add_argument(
        "--shape",
        nargs=2,
        type=positive,
        metavar=("H", "W"),
        help="size of the image (default: 800 1200, with --backbone 224 224)",
    )
    parser.add_argument(
        "--rois",
        type=positive,
        metavar="N",
        help="with --config and --table dcnv2: RoIs of the box head (default: 1000)",
    )
    parser.add_argument(
        "--exchange",
        nargs=2,
        action="append",
        default=[],
        metavar=("LAYER", "PATTERN"),
        help="with --backbone: what stands in the convolutions whose names match; may be repeated. A layer is a token "
        "of the layer table, with options if need be: dk, dk:scope_size=5",
    )
    args = parser.parse_args(argv)
    mode = next(name for name in ("config", "backbone", "table") if getattr(args, name))
    mode = f"table {args.table}" if mode == "table" else mode
    takes = {"config": {"shape", "rois"}, "table dcnv2": {"shape", "rois"}, "table dk": set(), "table dke": set()}
    for name in ("shape", "rois", "exchange"):
        if getattr(args, name) and name not in takes.get(mode, {"shape", "exchange"}):
            parser.error(f"--{name} does not go with --{mode}")
    try:
        args.exchange = [dict(layer(text), select=pattern) for text, pattern in args.exchange]
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --exchange: {error}")
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    from dk_detection.config_files import DETECTRON2, framework_of
    from dk_detection.errors import UserError

    detection = dict(shape=tuple(args.shape or (800, 1200)), rois=args.rois or 1000)
    try:
        if args.config and framework_of(args.config) == DETECTRON2:
            from dk_detection.detectron2 import complexity
        elif args.config or args.table == "dcnv2":
            from dk_detection.mmdet import complexity
        elif args.backbone:
            from dk_detection.complexity.backbones import count_backbone
        if args.table:
            import paper_tables
        from dk_detection.complexity.counting import format_parts
    except ImportError as error:
        raise UserError(str(error)) from error
    if args.config:
        text = format_parts(complexity.count_config(args.config, **detection))
    elif args.table == "dcnv2":
        text = paper_tables.dcnv2_table(complexity.count_config, **detection, progress=show)
    elif args.table:
        text = {"dk": paper_tables.dk_table, "dke": paper_tables.dke_table}[args.table](progress=show)
    else:
        text = format_parts(count_backbone(args.backbone, tuple(args.shape or (224, 224)), args.exchange))
    print(text)


def show(index: int, number: int, name: str) -> None:
    print(f"{index + 1}/{number} {name}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
