"""Runs a peer's own tests of its deformable operators against dk_detection.

The tests are not part of this project: --tests names the folder of a checkout that holds them.

    python tests/peer/run.py --peer torchvision --tests CHECKOUT/test
    python tests/peer/run.py --peer mmcv        --tests CHECKOUT/tests/test_ops
    python tests/peer/run.py --peer detectron2  --tests CHECKOUT/tests/layers

A shim (shim_<peer>.py) puts our operator in the place of the peer's and adapts signatures, argument names and error
types. What it deselects is printed with the reason.
"""

import argparse
import collections
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import adapter
import pytest


class Bookkeeping:
    """A pytest plugin that deselects by name and counts outcomes."""

    def __init__(self, shim: ModuleType) -> None:
        self.shim = shim
        self.deselected: list[tuple[str, str]] = []
        self.outcomes = collections.Counter()
        self.skipped = collections.Counter()

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        if isinstance(collector, pytest.Module) and hasattr(self.shim, "collecting"):
            self.shim.collecting(collector.path.name)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if hasattr(self.shim, "collected"):
            for suite in {item.module for item in items}:
                self.shim.collected(suite)
        reasons = self.shim.DESELECTED
        out = [item for item in items if item.name in reasons]
        config.hook.pytest_deselected(items=out)
        self.deselected += [(item.name, reasons[item.name]) for item in out]
        items[:] = [item for item in items if item.name not in reasons]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1
        elif report.failed or report.when == "call":
            self.outcomes[report.outcome] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, choices=("torchvision", "mmcv", "detectron2"))
    parser.add_argument("--tests", required=True, type=Path, metavar="FOLDER", help="folder with the peer's test files")
    parser.add_argument("pytest_args", nargs="*", metavar="ARG", help="more arguments for pytest, after --")
    args = parser.parse_args()

    if importlib.util.find_spec(args.peer) is None:
        parser.error(f"--peer {args.peer}: not installed in this environment")
    shim = importlib.import_module(f"shim_{args.peer}")
    selected = [args.tests / name for name in shim.SELECTED]
    for path in selected:
        if not Path(str(path).split("::")[0]).is_file():
            parser.error(f"--tests {args.tests}: no {path.name} there")
    shim.install()
    books = Bookkeeping(shim)
    # Neither this project's pytest settings nor the peer's apply.
    options = ["-q", "-c", os.devnull, f"--rootdir={args.tests}", "-p", "no:cacheprovider", "--disable-warnings"]
    code = pytest.main([*options, *map(str, selected), *args.pytest_args], plugins=[books])

    print(f"\n{args.peer}: {books.outcomes['passed']} passed, {books.outcomes['failed']} failed", end="")
    print(f" / {len(books.deselected)} deselected; our operator was called {adapter.calls} times")
    for name, reason in books.deselected:
        print(f"  deselected {name}: {reason}")
    for reason, count in books.skipped.items():
        print(f"  skipped by the suite itself, {count} tests: {reason}")
    if not code and not (books.outcomes["passed"] and adapter.calls):
        print("nothing was shown: no test passed through our operator", file=sys.stderr)
        return 1
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
