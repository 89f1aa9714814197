"""The benchmark: what it writes, and that it times nothing that is wrong."""

import json
import math

import pytest
import torch

from timm_metricconv.ops import BACKENDS
from timm_metricconv.recipes import benchmark as module
from timm_metricconv.recipes.benchmark import BenchmarkConfig, benchmark
from timm_metricconv.recipes.config import ConfigError

KEYS = {
    "what", "peer", "backend", "shape", "dtype", "direction", "median_ms", "ratio_to_conv",
    "ratio_to_torchvision_deform", "peak_mb",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(module, "LAYER_SHAPES", ((8, 9),))
    monkeypatch.setattr(module, "MODEL_SHAPES", (("cifar", (2, 3, 8, 8)),))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers(tmp_path, dtype):
    output = tmp_path / "bench.json"
    config = BenchmarkConfig(batch=2, repeats=3, stride=[2], dtype=dtype, output=str(output))
    records = benchmark(config)
    assert records == json.loads(output.read_text()) and set(records[0]) >= KEYS
    peers = {(record["peer"], record["backend"]) for record in records}
    runnable = {name for name, backend in BACKENDS.items() if backend.why_not("cpu", 4) is None}
    assert {backend for peer, backend in peers if peer == "metric"} == runnable >= {"gather", "reference"}
    assert {record["direction"] for record in records} == {"forward", "forward_backward"}
    for record in records:
        assert all(math.isfinite(record[key]) and record[key] > 0 for key in KEYS if isinstance(record[key], float))
        if record["peer"] == "conv2d":
            assert record["ratio_to_conv"] == 1


def test_models():
    records = benchmark(BenchmarkConfig(what="model", models=["test_resnet"], repeats=1, backends=["gather"]))
    assert {record["peer"] for record in records} == {"conv2d", "torchvision_deform", *module.OURS}
    assert {record["shape"] for record in records} == {"test_resnet 2x3x8x8"}


def test_what_is_wrong_is_not_timed(monkeypatch):
    gather = BACKENDS["gather"]
    wrong = gather._replace(function=lambda *arguments: gather.function(*arguments) * 1.01)
    monkeypatch.setitem(BACKENDS, "gather", wrong)
    with pytest.raises(RuntimeError, match="off the reference"):
        benchmark(BenchmarkConfig(batch=2, repeats=1, stride=[1], backends=["gather"]))


def test_refusals():
    with pytest.raises(ConfigError, match="backends"):
        benchmark(BenchmarkConfig(backends=["fastest"]))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
            benchmark(BenchmarkConfig(device="cuda"))
