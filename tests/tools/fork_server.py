"""Runs tools/train_net.py as often as asked, each time in a process of its own, and imports what takes long once.

Its arguments are the modules to import. Reads jobs from stdin, one JSON object a line: argv, env, out and err, the
files for what it prints, and, where it is to be stopped, signal, to_all (its children, too) and when, the file to wait
for. Answers with one line each: the exit status, and whether children of it are left.
"""

import json
import os
import runpy
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "train_net.py"


def run(job: dict) -> None:
    os.setsid()  # a process group, as a terminal's command
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests were started without it
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(job["env"])
    sys.argv = [str(SCRIPT), *job["argv"]]
    sys.path[0] = str(SCRIPT.parent)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    sys.exit(0)


def is_running(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def children_left(child: int) -> bool:
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


for name in sys.argv[1:]:
    import_module(name)

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        run(job)
    if job["signal"]:
        while is_running(child) and not os.path.exists(job["when"]):
            time.sleep(0.05)
        (os.killpg if job["to_all"] else os.kill)(child, job["signal"])
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, children_left(child)]), flush=True)
