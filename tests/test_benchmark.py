"""The benchmark: what it writes, and that it times nothing that is wrong."""

import csv
import json
import math

import pytest
import timm
import torch

pytest.importorskip("accelerate", reason="needs the extra [recipes]")

from timm_metricconv.ops import BACKENDS, why_not_on
from timm_metricconv.recipes import benchmark as module
from timm_metricconv.recipes.benchmark import BenchmarkConfig, benchmark, write_ratios_csv, write_timm_csv
from timm_metricconv.recipes.config import ConfigError
from timm_metricconv.recipes.network import count_activations, count_macs

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
    runnable = {name for name in BACKENDS if why_not_on("cpu", name) is None}
    assert {backend for peer, backend in peers if peer == "metric"} == runnable >= {"compiled", "reference"}
    assert {record["direction"] for record in records} == {"forward", "forward_backward"}
    for record in records:
        assert all(math.isfinite(record[key]) and record[key] > 0 for key in KEYS if isinstance(record[key], float))
        if record["peer"] == "conv2d":
            assert record["ratio_to_conv"] == 1


def test_depthwise_layers(monkeypatch):
    """As ConvNeXt has them: 7×7, a ball for every 16 channels, separable predictors."""
    monkeypatch.setattr(module, "DEPTHWISE_SHAPES", ((32, 6),))
    records = benchmark(BenchmarkConfig(what="depthwise", batch=2, repeats=1, backends=["compiled"]))
    assert {record["peer"] for record in records} == {"conv2d", "torchvision_deform", *module.OURS}
    assert {record["shape"] for record in records} == {"7x7 depthwise 2x32x6x6"}


def test_models():
    records = benchmark(BenchmarkConfig(what="model", models=["test_resnet"], repeats=1, backends=["compiled"]))
    assert {record["peer"] for record in records} == {"conv2d", "torchvision_deform", *module.OURS}
    assert {record["shape"] for record in records} == {"test_resnet 2x3x8x8"}


def test_timm_csv(tmp_path, monkeypatch):
    """timm's columns, our names beside the standard one; rows of the same network are replaced, others kept."""
    monkeypatch.setattr(module, "MODEL_SHAPES", (("imagenet", (2, 3, 32, 32)),))
    config = BenchmarkConfig(what="model", models=["test_resnet"], backends=["compiled"], csv=str(tmp_path))
    names = ("deform", "shifted", "metric", "metric-geodesic")  # the last one is no name of timm's
    peers = {"conv2d": "torch", **dict.fromkeys(names, "compiled")}
    base = {"shape": "test_resnet 2x3x32x32"}
    records = [
        {**base, "peer": peer, "backend": backend, "direction": direction, "median_ms": ms * (1 + number)}
        for direction, ms in (("forward", 4.0), ("forward_backward", 10.0))
        for number, (peer, backend) in enumerate(peers.items())
    ]
    others = [{**record, "backend": "torchvision", "median_ms": 0.1} for record in records]
    write_timm_csv(config, records)
    (infer,), (training,) = (list(tmp_path.glob(f"benchmark-{kind}-fp32-nhwc-*.csv")) for kind in ("infer", "train"))
    infer.write_text(infer.read_text() + "resnet18,1.00,1000.000,1,224,11.69,1.82,2.48\n")
    write_timm_csv(config, others + records)
    rows = list(csv.DictReader(infer.open()))
    names = ["test_resnet", "test_resnet_deform", "test_resnet_shifted", "test_resnet_metric", "resnet18"]
    assert [row["model"] for row in rows] == names
    assert [float(row["infer_samples_per_sec"]) for row in rows[:2]] == [500, 250]
    assert list(rows[0])[2:] == [
        "infer_step_time", "infer_batch_size", "infer_img_size", "param_count", "infer_gmacs", "infer_macts"
    ]  # fmt: skip
    rows = list(csv.DictReader(training.open()))
    columns = ["model", "train_samples_per_sec", "train_step_time", "train_batch_size", "train_img_size", "param_count"]
    assert [row["model"] for row in rows] == names[:4] and list(rows[0]) == columns
    assert rows[0]["train_step_time"] == "10.000"
    training.write_text("model,top1\n")
    with pytest.raises(ConfigError, match="has the columns"):
        write_timm_csv(config, records)


def test_ratios_csv(tmp_path, monkeypatch):
    """A row for each shape, a column for each number; the backends that are not preferred are left out."""
    monkeypatch.setattr(module, "LAYER_SHAPES", ((4, 6), (8, 5)))
    config = BenchmarkConfig(batch=2, repeats=1, stride=[1], backends=["compiled", "torchvision"])
    records = benchmark(config)
    config.csv = str(tmp_path)
    write_ratios_csv(config, records)
    write_ratios_csv(config, [record for record in records if record["shape"] == records[0]["shape"]])
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("benchmark-layer-fp32-nhwc-")
    rows = {row["shape"]: row for row in csv.DictReader(path.open())}
    assert list(rows) == list(dict.fromkeys(record["shape"] for record in records)) and len(rows) == 2
    for record in records:
        if record["peer"] in module.OURS and record["backend"] == "torchvision":
            continue
        row = rows[record["shape"]]
        assert row[f"{record['peer']}.{record['direction']}"] == f"{record['ratio_to_conv']:.3f}"
        if record["direction"] == "forward_backward":
            assert row[f"{record['peer']}.mb"] == f"{record['peak_mb']:.1f}"


def test_counts_are_timms():
    """resnet18 at 224 in timm's own benchmark-infer files: 11.69 M parameters, 1.82 GMACs, 2.48 M activations."""
    model = timm.create_model("resnet18_metric", stages=[])
    assert round(count_macs(model, 224), 2) in (1.81, 1.82) and round(count_activations(model, 224), 2) == 2.48


def test_what_is_wrong_is_not_timed(monkeypatch):
    row = BACKENDS["compiled"]
    wrong = row._replace(function=lambda *arguments: row.function(*arguments) * 1.01)
    monkeypatch.setitem(BACKENDS, "compiled", wrong)
    with pytest.raises(RuntimeError, match="off the reference"):
        benchmark(BenchmarkConfig(batch=2, repeats=1, stride=[1], backends=["compiled"]))


def test_refusals():
    with pytest.raises(ConfigError, match="'grid' cannot run on device='cpu': because"):
        BACKENDS["grid"] = BACKENDS["compiled"]._replace(why_not=lambda *call: "because")
        try:
            benchmark(BenchmarkConfig(backends=["compiled", "grid"]))
        finally:
            del BACKENDS["grid"]
    with pytest.raises(ConfigError, match=r"models: expected some of .*resnet18"):
        benchmark(BenchmarkConfig(what="model", models=["resnet19"]))
    with pytest.raises(ConfigError, match="backends"):
        benchmark(BenchmarkConfig(backends=["fastest"]))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
            benchmark(BenchmarkConfig(device="cuda"))
