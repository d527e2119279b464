"""Runs tools/train_net.py as a user does, and what it prints and returns."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "train_net.py"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str
    left: bool = False  # children that outlive it


@contextmanager
def running(environment: dict, folder: Path, *modules: str) -> Iterator[Callable[..., Done]]:
    """A function that runs the command line, quickly: modules are imported once.

    A dictionary as `env` is put into the environment of one run. The current folder is `folder`. A `signal` stops the
    run as soon as the file `when` is there.
    """
    (folder / "printed").mkdir()
    (folder / "cwd").mkdir()
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "tools" / "fork_server.py", *modules],
        cwd=folder / "cwd",
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    out, err = folder / "printed" / "out", folder / "printed" / "err"

    def run(*argv, env=None, signal=None, to_all=False, when=None) -> Done:
        job = dict(argv=list(map(str, argv)), env=env or {}, out=str(out), err=str(err))
        job |= dict(signal=signal, to_all=to_all, when=str(when))
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        status, left = json.loads(server.stdout.readline())
        return Done(status, out.read_text(), err.read_text(), left)

    yield run
    server.stdin.close()
    server.wait(timeout=60)


def plain(*argv, **kwargs) -> Done:
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, argv)], capture_output=True, text=True, timeout=120, check=False, **kwargs
    )
    return Done(done.returncode, done.stdout, done.stderr)


def without(module: str, folder: Path) -> dict:
    """An environment in which a module cannot be imported, made in an empty folder."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules['{module}'] = None\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def refused(done: Done) -> str:
    """The one line of a run that did not start."""
    assert done.code not in (0, None)
    assert "Traceback" not in done.err
    lines = [line for line in done.err.splitlines() if line]
    assert len(lines) == 1, done.err
    assert lines[0].startswith("train_net.py: ")
    return lines[0].removeprefix("train_net.py: ")
