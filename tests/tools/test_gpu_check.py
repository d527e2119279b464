import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tools" / "gpu_check.py"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def outcomes(out):
    return {file.stem: json.loads(file.read_text()) for file in out.glob("*.outcome")}


def alive(group: str) -> list[str]:
    """The states of the processes of a group, without those that only wait to be reaped."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return [state for of, state in map(str.split, listed.splitlines()) if of == group and not state.startswith("Z")]


def fake(monkeypatch, **programs):
    """Steps that run these programs, in the place of the real ones; they pass for ones that need no GPU."""
    steps = [gpu_check.Step(name, "build", [sys.executable, "-c", program]) for name, program in programs.items()]
    monkeypatch.setattr(gpu_check, "steps", lambda args: steps)


def test_a_step_that_fails_or_hangs_does_not_hide_the_others(monkeypatch, out, capsys):
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)'])"
    fake(
        monkeypatch,
        wrong="raise ValueError('this is it')",
        hangs=f"{child}; import os, time; open('{out}/pid', 'w').write(str(os.getpgid(0))); time.sleep(30)",
        good="print('9 passed')",
    )
    started = time.monotonic()
    assert gpu_check.main(["--out", str(out), "--limit", "3"]) == 1
    assert time.monotonic() - started < 20
    found = outcomes(out)
    assert {name: outcome["result"] for name, outcome in found.items()} == {
        "wrong": gpu_check.FAILED, "hangs": gpu_check.STOPPED, "good": gpu_check.PASSED
    }  # fmt: skip
    assert found["wrong"]["note"] == "ValueError: this is it" and found["good"]["note"] == "9 passed"
    assert alive((out / "pid").read_text()) == []  # nothing that it started is left
    report = (out / "report.md").read_text()
    assert "| wrong | FAILED |" in report and "| hangs | FAILED: over its limit | 3 |" in report
    assert f"- torch: {torch.__version__}" in report and "- driver: " in report
    assert "2 of 3 steps failed" in capsys.readouterr().out


def test_goes_on_where_it_was(monkeypatch, out):
    count = f"open('{out}/count', 'a').write('x')"
    fake(monkeypatch, first=count, second=f"import os; {count}; os.path.exists('{out}/well') or exit(1)")
    assert gpu_check.main(["--out", str(out)]) == 1
    (out / "well").touch()
    assert gpu_check.main(["--out", str(out)]) == 0
    assert (out / "count").read_text() == "xxx"  # only what had failed ran again
    assert gpu_check.main(["--out", str(out), "--again"]) == 0
    assert (out / "count").read_text() == "xxxxx"
    facts = {"torch": "another"}
    monkeypatch.setattr(gpu_check, "environment", lambda: facts)
    assert gpu_check.main(["--out", str(out)]) == 0
    assert (out / "count").read_text() == "xxxxxxx"


def test_interrupted(out):
    # Ctrl-C ends the step as well, and nothing is remembered of it.
    code = f"""if True:
        import sys, gpu_check
        sleep = "import os, time; open('{out}/pid', 'w').write(str(os.getpgid(0))); time.sleep(60)"
        gpu_check.steps = lambda args: [gpu_check.Step("x", "build", [sys.executable, "-c", sleep])]
        sys.exit(gpu_check.main(["--out", "{out}"]))
    """
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "tools", stderr=subprocess.PIPE, text=True)
    while not ((out / "pid").exists() and (out / "pid").read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted; the same command goes on from here" in errors
    assert alive((out / "pid").read_text()) == []
    assert outcomes(out) == {}


def test_dry_run_lists_every_part(capsys):
    assert gpu_check.main(["--dry-run"]) == 0
    listed = capsys.readouterr().out
    for step in ("build: DK_DETECTION_CUDA=1 ", "fused_cost: ", "tests-ops-deform_conv2d: ", "memcheck-ops-fused: "):
        assert f"\n{step}" in f"\n{listed}"
    for file in (ROOT / "benchmarks").glob("bench_*.py"):
        for dtype in ("float32", "float64", "float16", "bfloat16"):
            assert f"\n{file.stem.removeprefix('bench_')}-cuda-{dtype}: " in listed
    assert "deform_conv2d-cuda-tf32: " in listed and "deform_roi_pool-cuda-tf32" not in listed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(out, capsys):
    assert gpu_check.main(["--out", str(out), "--parts", "tests", "benchmarks"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not out.exists()


def test_benchmarks_on_the_cpu(out, capsys):
    arguments = ["--out", str(out), "--device", "cpu", "--quick", "--parts", "benchmarks"]
    arguments += ["--only", "deform_kernel_conv2d-cpu-float32"]
    assert gpu_check.main(arguments) == 0
    name = "deform_kernel_conv2d-cpu-float32"
    assert json.loads((out / f"{name}.json").read_text())["results"]
    table = (out / f"{name}.md").read_text().strip()
    assert f"## {name}\n\n{table}" in (out / "report.md").read_text()
    assert "[1/1] deform_kernel_conv2d-cpu-float32 ... passed" in capsys.readouterr().out


def test_a_broken_contender_is_a_failure(tmp_path):
    results = [
        {"contender": "ours v2", "reason": "CUDA error"},
        {"contender": "ours v2, fused", "reason": "fused: half types"},
        {"contender": "mmcv v2", "reason": "No module named 'mmcv'"},
        {"contender": "conv2d", "reason": None},
    ]
    (tmp_path / "x.json").write_text(json.dumps({"results": results}))
    assert gpu_check.broken_contenders(tmp_path / "x.json") == "ours v2: CUDA error"


def test_the_tests_need_no_other_package():
    # On a machine with nothing but torch, NumPy and pytest, the tests for a GPU are collected without errors.
    missing = "torchvision mmcv mmdet mmengine mmpretrain mmseg detectron2 triton onnx onnxruntime scipy matplotlib cv2"
    code = f"import sys; sys.modules.update(dict.fromkeys({missing.split()!r})); import pytest; "
    code += "sys.exit(pytest.main(['-q', '--collect-only', '-m', 'cuda', *sys.argv[1:]]))"
    files = map(str, gpu_check.cuda_tests())
    done = subprocess.run([sys.executable, "-c", code, *files], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "error" not in done.stdout.splitlines()[-1]
