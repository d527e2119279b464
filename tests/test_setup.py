"""What the build is told about the sources."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_file_of_csrc_is_compiled_or_makes_the_library_be_built_again():
    code = """if True:
        import json
        import setuptools
        from distutils.core import run_setup
        (extension,) = run_setup("setup.py", stop_after="init").ext_modules
        print(json.dumps([extension.sources, extension.depends]))
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"DK_DETECTION_CUDA": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    sources, depends = json.loads(done.stdout.splitlines()[-1])
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert {path.removeprefix(f"{ROOT.as_posix()}/") for path in (*sources, *depends)} == {
        path for path in files if not path.endswith(".cu")
    }
    assert any(path.endswith(".cuh") for path in depends)
