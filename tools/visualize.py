#!/usr/bin/env python
"""Draws what detectors look at: python tools/visualize.py KIND --config CONFIG --checkpoint CKPT --image FILE."""

import argparse
import json
import os
import sys
import time

# mmengine's checkpoints hold more than tensors, and torch 2.6 and later load those only when told to.
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")

KINDS = {
    "predictions": "what is detected",
    "sampling": "where nodes look through a stack of layers",
    "receptive-field": "how much each pixel sways a node, or the scores of a box",
    "saliency": "the smallest region that gives the same response within a bound",
    "bins": "where deformable RoI pooling puts the bins of a box",
    "kernel": "where the taps of a deformable kernel sample in its scope",
    "shapes": "the kernel shapes that layers have learned once for all positions",
    "offsets": "the offsets of a layer as fields, one for each tap",
    "dilation": "effective dilation over objects of three sizes and background; needs --annotations and --images",
    "dynamics": "t-SNE of learned dynamics by class and size; needs --annotations and --images",
    "sheet": "objects of three sizes: prediction, sampling and receptive field; needs --annotations and --images",
}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line; the usage is longer than a screen."""
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def areas(text: str):
    """1024,9216, or "equal", which is None."""
    if text == "equal":
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write LOW,HIGH or equal") from None
    if not 0 < low < high:
        raise argparse.ArgumentTypeError(f"{text!r}: the two areas must be positive and rise")
    return low, high


def number(kind, least):
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= least:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be {'an integer' if kind is int else 'a number'} of at least {least}"
            )
        return value

    return parse


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="visualize.py",
        usage="%(prog)s KIND --config CONFIG [--checkpoint CKPT] (--image FILE | --annotations FILE --images DIR) ...",
        description="Draw what detectors look at. docs/visualization.md shows a picture of each kind.",
        epilog="kinds: "
        + "; ".join(f"{kind}: {text}" for kind, text in KINDS.items())
        + ". Checkpoints are loaded as Python pickles, which can run code: use those that you trust only.",
        allow_abbrev=False,
    )
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument(
        "--config", nargs="+", required=True, metavar="CONFIG",
        help="configs of MMDetection or Detectron2: one for all checkpoints, or one for each",
    )  # fmt: skip
    parser.add_argument("--checkpoint", nargs="+", default=[], metavar="CKPT", help="their weights (default: random)")
    parser.add_argument("--title", nargs="+", default=[], help="what is written above each (default: from the configs)")
    parser.add_argument("--image", metavar="FILE", help="an image")
    parser.add_argument(
        "--point", nargs=2, type=float, action="append", default=[], metavar=("X", "Y"),
        help="a place in the image, in pixels; may be repeated (default: objects that are detected)",
    )  # fmt: skip
    parser.add_argument(
        "--box", nargs=4, type=float, action="append", default=[], metavar=("X1", "Y1", "X2", "Y2"),
        help="a box in the image, for bins, and for receptive-field and saliency of its scores; may be repeated",
    )  # fmt: skip
    parser.add_argument("--annotations", metavar="FILE", help="a COCO file")
    parser.add_argument("--images", metavar="DIR", help="the folder of its images")
    parser.add_argument("--limit", type=number(int, 1), default=100, metavar="N", help="images of it (default: 100)")
    parser.add_argument("--layer", metavar="NAME", help="the module that is looked at (default: the backbone's last)")
    parser.add_argument(
        "--levels", type=number(int, 1), default=3, metavar="N", help="sampling: layers that fan out (default: 3)"
    )
    parser.add_argument(
        "--strength", action="store_true", help="sampling, bins: weigh by the gradient, not by the modulation"
    )
    parser.add_argument(
        "--bound",
        type=number(float, 0),
        default=0.1,
        metavar="B",
        help="saliency: largest relative change (default: 0.1)",
    )
    parser.add_argument(
        "--cell", type=number(int, 1), metavar="PIXELS", help="saliency: side of a cell (default: 1/32)"
    )
    parser.add_argument(
        "--seconds",
        type=number(float, 0),
        default=10,
        metavar="S",
        help="saliency: time for the search (default: about 10)",
    )
    parser.add_argument(
        "--score", type=number(float, 0), default=0.3, metavar="S", help="least of a detection (default: 0.3)"
    )
    parser.add_argument(
        "--areas", type=areas, default=(32.0**2, 96.0**2), metavar="LOW,HIGH",
        help="dilation: what parts small, medium and large objects; equal: a third each (default: COCO's 1024,9216)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--out", metavar="FILE.png", help="the picture (default: KIND.png); numbers go to FILE.json")
    parser.add_argument(
        "--cfg-options", nargs="+", metavar="OPTION", help="override settings of the configs, as in tools/train_net.py"
    )
    args = parser.parse_args(argv)
    if len(args.config) > 1 and len(args.checkpoint) not in (0, len(args.config)):
        parser.error(f"{len(args.config)} configs need as many checkpoints, got {len(args.checkpoint)}")
    args.config *= max(len(args.checkpoint), 1) if len(args.config) == 1 else 1
    if args.title and len(args.title) != len(args.config):
        parser.error(f"{len(args.config)} checkpoints need as many titles, got {len(args.title)}")
    args.out = args.out or f"{args.kind}.png"
    if not args.out.endswith(".png"):
        parser.error(f"--out {args.out}: the picture is a PNG; write FILE.png")
    return args


def titles(configs: list[str], checkpoints: list[str]) -> list[str]:
    """What tells the detectors apart: the parts of the configs' stems that not all have, else the checkpoints."""
    stems = [os.path.splitext(os.path.basename(config))[0].split("_") for config in configs]
    if len(configs) == 1:
        return ["_".join(stems[0])]
    common = set.intersection(*map(set, stems))
    short = [" ".join(part for part in stem if part not in common) for stem in stems]
    if len(set(short)) == len(short) and all(short):
        return short
    names = checkpoints if len(set(checkpoints)) == len(configs) else configs
    return [f"{i + 1}: {os.path.basename(name)}" for i, name in enumerate(names)]


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    try:
        from dk_detection.config_files import DETECTRON2, framework_of
        from dk_detection.errors import UserError
    except ImportError as error:
        return fail(f"{error}: run `make setup`, and use .venv/bin/python instead of {sys.executable}")
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:3.0f} s] {text}", file=sys.stderr, flush=True)

    try:
        from dk_detection.visualization import kinds

        detectors = {}
        names = args.title or titles(args.config, args.checkpoint)
        checkpoints = args.checkpoint or [None] * len(args.config)
        for title, config, checkpoint in zip(names, args.config, checkpoints, strict=True):
            say(f"{title}: loading {checkpoint or config}")
            framework = framework_of(config)
            try:
                if framework == DETECTRON2:
                    from dk_detection.detectron2.visualize import load_detector
                else:
                    from dk_detection.mmdet.visualize import load_detector
            except ImportError as error:
                raise UserError(f"{config} is a config of {framework}. {error}") from error
            detectors[title] = load_detector(config, checkpoint, args.cfg_options, args.device)
        options = kinds.Options(
            image=args.image,
            points=args.point,
            boxes=args.box,
            layer=args.layer,
            levels=args.levels,
            strength=args.strength,
            bound=args.bound,
            cell=args.cell,
            seconds=args.seconds,
            score=args.score,
            annotations=args.annotations,
            images=args.images,
            limit=args.limit,
            areas=args.areas,
            say=say,
        )
        figure, numbers = kinds.KINDS[args.kind](detectors, options)
    except UserError as error:
        return fail(error)
    except KeyboardInterrupt:
        return fail("interrupted", code=130)
    record = {"kind": args.kind, "configs": args.config, "checkpoints": args.checkpoint, "numbers": numbers}
    figures = f"{args.out.removesuffix('.png')}.json"
    try:
        figure.savefig(args.out)
        with open(figures, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
    except OSError as error:
        return fail(f"--out {args.out}: {error}")
    print(f"{args.out} and {figures}")
    return 0


def fail(message, code: int = 1) -> int:
    print(f"visualize.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
