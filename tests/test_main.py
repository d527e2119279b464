"""The tools as commands of the installed package."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dk_detection", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_configs_by_words():
    done = run("configs", "mmdet", "dcnv2", "mask-rcnn_r50-mdconv", "mimic_")
    assert [Path(line).name for line in done.stdout.split()] == [
        "mask-rcnn_r50-mdconv-c3-c5_fpn_mdpool_mimic_16e_coco.py"
    ]
    assert Path(done.stdout.strip()).is_file()
    every = run("configs").stdout.split()
    files = [path for kind in ("py", "yaml") for path in (ROOT / "configs").rglob(f"*.{kind}")]
    files = [path for path in files if path.parent.name != "_base_"]
    assert len(every) == len(files) and "_base_" not in "".join(every)
    nothing = run("configs", "no-such-network")
    assert nothing.returncode == 1 and "no config has no-such-network" in nothing.stderr


def test_tools():
    done = run("check_data", "--help")
    assert done.returncode == 0 and "usage: check_data.py" in done.stdout
    unknown = run("trian_net", "--config", "x.py")
    assert unknown.returncode == 1 and "there is no tool 'trian_net'" in unknown.stderr
    assert "train_net" in run().stdout
