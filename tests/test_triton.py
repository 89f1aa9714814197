"""Runs `triton_parity.py`, in a process of its own: Triton decides at import whether to interpret its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from timm_metricconv.ops import why_not_on
from timm_metricconv.ops.triton_fused import _why_not_on

pytestmark = pytest.mark.slow


def test_parity():
    pytest.importorskip("triton")
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
        # numpy does the work, and one thread of it is fastest on tiles this small
        environment.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    root = Path(__file__).parent.parent
    environment["PYTHONPATH"] = os.pathsep.join((str(root), environment.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", "triton_parity.py"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes tensors on the CPU")
def test_says_why_it_cannot_run_on_a_cpu():
    assert "GPUs" in why_not_on("cpu", "triton")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes all")
def test_refuses_old_gpus_and_not_amds(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "has 7.5" in _why_not_on("cuda")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert _why_not_on("cuda") is None


def test_imports_without_triton():
    root = str(Path(__file__).parent.parent)
    code = f"import sys; sys.modules['triton'] = None; sys.path.insert(0, {root!r});"
    code += "from timm_metricconv.ops import why_not_on;"
    code += "assert why_not_on('cpu', 'triton') == 'triton is not installed'"
    subprocess.run([sys.executable, "-c", code], check=True)
