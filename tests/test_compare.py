"""The comparison end to end on a part of the digits."""

import json

import pytest
import torch

pytest.importorskip("accelerate", reason="needs the extra [demo]")

from safetensors.torch import load_file

from timm_metricconv.recipes import launch
from timm_metricconv.recipes import train as training
from timm_metricconv.recipes.compare import CompareConfig, compare
from timm_metricconv.recipes.config import ConfigError

KEYS = [
    "conv", "init", "kernel", "seeds", "top1_mean", "top1_std", "top1", "params", "predictor_params", "gmacs",
    "images_per_second", "seconds",
]  # fmt: skip


def tiny(tmp_path, **changes) -> CompareConfig:
    values = {
        "name": "tiny",
        "output": str(tmp_path / "compare"),
        "model": "test_resnet",
        "model_args": {"stem": "cifar", "conv_cfg": {"eps_omega": 0.9}},
        "conv": ["standard", "metric"],
        "seeds": [0, 1],
        "source": {"data": "digits/0-1"},
        "train": {"data": "digits/2-3", "input_size": 8, "batch_size": 64, "epochs": 1, "workers": 0},
        **changes,
    }
    return CompareConfig(**values)


def test_table_resume_and_kernels(tmp_path, monkeypatch):
    config = tiny(tmp_path)
    train, calls = launch.train, []

    def killed(run, **kwargs):
        calls.append(run.name)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return train(run, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            compare(config)
    records = compare(config)
    assert json.loads((config.folder / "summary.json").read_text()) == records
    assert [list(record) for record in records] == [KEYS] * 8
    assert {(r["conv"], r["init"], r["kernel"]) for r in records} == {
        (c, i, k) for c in config.conv for i in config.init for k in config.kernel
    }
    for record in records:
        assert len(record["top1"]) == 2 and record["seeds"] == [0, 1]
        assert record["top1_mean"] == pytest.approx(sum(record["top1"]) / 2)
        assert (record["predictor_params"] == 0) == (record["conv"] == "standard")
    cost = {record["conv"]: record["gmacs"] for record in records}
    assert cost["standard"] < cost["metric"]
    assert all((config.folder / name).stat().st_size > 100 for name in ("summary.csv", "summary.md", "curves.png"))

    # FKW in all alike: the uniform kernel from scratch, the source's kernel under transfer
    source = load_file(config.folder / "source" / "model" / "model.safetensors")
    key = "layer3.0.conv2.weight"
    for conv in config.conv:
        scratch = load_file(config.folder / f"{conv}-scratch-fixed-seed0" / "model" / "model.safetensors")
        transfer = load_file(config.folder / f"{conv}-transfer-fixed-seed0" / "model" / "model.safetensors")
        learned = load_file(config.folder / f"{conv}-transfer-learnable-seed0" / "model" / "model.safetensors")
        assert torch.equal(scratch[key], torch.full_like(scratch[key], 1 / scratch[key][0].numel()))
        assert torch.equal(transfer[key], source[key])
        assert not torch.equal(learned[key], source[key])

    def refuse(*args, **kwargs):
        raise AssertionError("a complete comparison trains nothing")

    monkeypatch.setattr(training._Trainer, "__init__", refuse)
    assert compare(config) == records


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"conv": ["metrik"]}, "conv: expected some of"),
        ({"model": "vit_tiny"}, "model: expected one of"),
        ({"train": {"epoch": 3}}, "unknown key 'epoch'. Did you mean 'epochs'"),
    ],
)
def test_refusals(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        compare(tiny(tmp_path, **changes))
    assert not (tmp_path / "compare" / "summary.json").exists()
