"""What the command lines have in common: what goes wrong is one line, and nothing that they started outlives them."""

import argparse
import os
import sys
from collections.abc import Callable


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line; the usage is longer than a screen."""
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def run(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Calls `main(argv)` and says in one line what went wrong."""

    def fail(message, status: int = 1) -> int:
        print(f"{os.path.basename(main.__code__.co_filename)}: {message}", file=sys.stderr)
        return status

    try:
        from dk_detection.errors import Terminated, UserError, catch_sigterm, end_children
    except ImportError as error:
        return fail(f"{error}: run `make setup`, and use .venv/bin/python instead of {sys.executable}")
    catch_sigterm()
    try:
        main(argv)
    except UserError as error:
        return fail(error)
    except KeyboardInterrupt as error:
        end_children()
        return fail(str(error) or "interrupted", 143 if isinstance(error, Terminated) else 130)
    return 0
