"""Runs tools/train_net.py as often as asked, each time in a process of its own, and imports what takes long once.

Its arguments are the modules to import. Reads jobs from stdin, one JSON object a line: argv, env, and out and err, the
files for what it prints. Answers with the exit status, one line each.
"""

import json
import os
import runpy
import sys
from importlib import import_module
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "train_net.py"

for name in sys.argv[1:]:
    import_module(name)

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        for name, descriptor in (("out", 1), ("err", 2)):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(job["env"])
        sys.argv = [str(SCRIPT), *job["argv"]]
        sys.path[0] = str(SCRIPT.parent)
        runpy.run_path(str(SCRIPT), run_name="__main__")
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
