"""The comparison end to end on a part of the digits."""

import json
import os
import pickle
import shutil

import pytest
import timm
import torch

pytest.importorskip("accelerate", reason="needs the extra [recipes]")

from safetensors.torch import load_file, save_file

from timm_metricconv import MetricConv2d
from timm_metricconv.recipes import compare as compare_module
from timm_metricconv.recipes import launch
from timm_metricconv.recipes import train as training
from timm_metricconv.recipes.compare import Cell, CompareConfig, compare
from timm_metricconv.recipes.config import ConfigError
from timm_metricconv.recipes.network import build_model
from timm_metricconv.recipes.run import locked, write_config

KEYS = [
    "conv", "init", "kernel", "seeds", "top1_mean", "top1_std", "top1", "top5_mean", "top5_std",
    "top5", "predicted", "vs_standard", "params", "predictor_params", "gmacs", "images_per_second", "seconds",
    "geometry",
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


def test_a_refused_command_leaves_nothing(tmp_path):
    """So the same command put right may write there."""
    for changes in ({"train": {"data": "nowhere"}}, {"model_args": {"conv_cfg": {"eps_omga": 1}}}):
        with pytest.raises(ConfigError):
            compare(tiny(tmp_path, **changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
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
    files = "summary.csv", "summary.md", "curves.png", "geometry.png"
    assert all((config.folder / name).stat().st_size > 100 for name in files)
    for record in records:
        assert bool(record["geometry"]) == bool(record["vs_standard"]) == (record["conv"] == "metric")

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


def test_a_comparison_may_be_moved_but_not_changed(tmp_path, monkeypatch):
    """The runs' checkpoint moves with it. Without its source's folder, runs of another source would look complete."""
    monkeypatch.chdir(tmp_path)
    short = {"conv": ["standard"], "init": ["transfer"], "kernel": ["learnable"], "seeds": [0]}
    records = compare(tiny(tmp_path, output="a", **short))
    assert records[0]["top1_std"] is None and "±" not in (tmp_path / "a" / "summary.md").read_text()
    (tmp_path / "a").rename(tmp_path / "moved")
    monkeypatch.setattr(training._Trainer, "__init__", lambda *args, **kwargs: pytest.fail("trains"))
    assert compare(tiny(tmp_path, output="moved", **short)) == records
    assert compare(tiny(tmp_path, output=str(tmp_path / "moved"), **short)) == records
    before = (tmp_path / "moved" / "config.yaml").read_text()
    shutil.rmtree(tmp_path / "moved" / "source")
    with pytest.raises(ConfigError, match=r"another source.lr \(None → 0.5\)"):
        compare(tiny(tmp_path, output="moved", **short, source={"data": "digits/0-1", "lr": 0.5}))
    with pytest.raises(ConfigError, match=r"another train.epochs \(1 → 2\)"):
        train = {**tiny(tmp_path).train, "epochs": 2}
        compare(tiny(tmp_path, output="moved", **short, train=train))
    assert (tmp_path / "moved" / "config.yaml").read_text() == before


def test_a_network_that_predicts_one_class_is_no_verdict():
    """Two such networks differ by nothing, which would read "no difference"."""
    same = {"difference": 0.0, "low": 0.0, "high": 0.0}
    assert compare_module._versus({"predicted": 1, "vs_standard": same}) == "predicts one class"
    assert "no difference" in compare_module._versus({"predicted": 2, "vs_standard": same})


@pytest.mark.slow
def test_a_smaller_command_keeps_what_was_complete(tmp_path):
    """Another row, fewer seeds: the summary is of the folder, and pairs the seeds that two rows share."""
    few = {"init": ["scratch"], "kernel": ["learnable"]}
    few["train"] = {**tiny(tmp_path).train, "train_images": 16, "val_images": 8, "batch_size": 16}
    compare(tiny(tmp_path, **few))
    wide = {"wide": {"conv": "metric", "model_args": {"conv_cfg": {"eps_omega": 0.5}}}}
    records = compare(tiny(tmp_path, **few, conv=["wide"], variants=wide, seeds=[1, 2]))
    assert [(r["conv"], r["seeds"]) for r in records] == [("standard", [0, 1]), ("metric", [0, 1]), ("wide", [1, 2])]
    assert records[1]["vs_standard"] and not records[2]["vs_standard"]  # they have one seed in common
    again = compare(tiny(tmp_path, **few, conv=["standard"], seeds=[2]))
    assert again == json.loads((tmp_path / "compare" / "summary.json").read_text())
    assert (again[0]["conv"], again[0]["seeds"]) == ("standard", [0, 1, 2])
    assert [bool(r["vs_standard"]) for r in again] == [False, True, True]
    assert again[2]["vs_standard"]["difference"] == pytest.approx(
        sum(again[2]["top1"]) / 2 - sum(again[0]["top1"][1:]) / 2
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": [0, 1, 0]}, "seeds: expected different ones"),
        ({"checkpoint": "nowhere.safetensors", "source": {}}, "checkpoint: expected a file"),
        ({"conv": ["metric", "metric"]}, "conv: expected different ones"),
        ({"train": {"seed": 7}}, r"train\.seed: the comparison sets it"),
        ({"train": {"model": "resnet50"}}, r"train\.model: the comparison sets it"),
        ({"train": {"kernels": ["conv1"]}}, r"train\.kernels: the comparison sets it"),
        ({"variants": {"bent": {"conv": "metric", "train": {"kernels": []}}}}, r"train\.kernels: the comparison"),
    ],
)
def test_what_would_be_counted_twice_or_overridden(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        compare(tiny(tmp_path, **changes))


def test_convnext(tmp_path):
    """Every convolution, shifted by the model's argument, starts as the same trained network; predictors differ."""
    arguments = {"patch_size": 1, "stages": [2], "depths": [1, 1, 1, 1], "ls_init_value": 1.0}
    config = tiny(tmp_path, model="test_convnext", model_args=arguments)
    source = timm.create_model("test_convnext", patch_size=1, depths=[1, 1, 1, 1], ls_init_value=1.0, num_classes=2)
    save_file(source.state_dict(), tmp_path / "source.safetensors")
    kernels, x = compare_module._kernels(config), torch.randn(2, 3, 8, 8)
    assert kernels == ["stages.1.blocks.0.conv_dw"]
    costs = {}
    for conv, channels in (("standard", 0), ("shifted", 2), ("metric", 6), ("deform", 98)):
        run = compare_module._run(
            config, Cell(conv, "transfer", "learnable"), 0, str(tmp_path / "source.safetensors"), kernels
        )
        model = build_model(run, 2).eval()
        model.head.load_state_dict(source.head.state_dict())  # a warm start has a classifier of its own
        torch.testing.assert_close(model(x), source.eval()(x), rtol=1e-4, atol=1e-4)
        cost = compare_module._cost(config, conv)
        assert cost["predictor_params"] == (32 * 9 + 2 * channels * 33 if channels else 0)
        costs[conv] = cost["gmacs"]
    assert costs["standard"] < costs["shifted"] < costs["metric"] < costs["deform"]


@pytest.mark.parametrize("conv", ["standard", "deform", "metric", "metric-geodesic"])
@pytest.mark.parametrize("kernel", ["learnable", "fixed"])
@pytest.mark.parametrize("init", ["transfer", "uniform", "scratch"])
def test_every_network_starts_alike(tmp_path, conv, kernel, init):
    """What a cell's run starts from, in the layers that are adaptive in some network and in the others."""
    own = str(tmp_path / "source.safetensors")
    config = tiny(tmp_path, conv=[conv], source={}, checkpoint=own)  # weights of one's own, without the Hub
    source = timm.create_model("test_resnet_metric", stem="cifar", stages=[], num_classes=2)
    save_file(source.state_dict(), own)
    compare_module._check(config)
    checkpoint = compare_module._source_checkpoint(config)
    run = compare_module._run(config, Cell(conv, init, kernel), 5, checkpoint, compare_module._kernels(config))
    assert pickle.loads(pickle.dumps(run)) == run and run.seed == 5
    model, adaptive, other = build_model(run, 2), "layer3.0.conv2.weight", "layer1.0.conv1.weight"
    uniform = torch.full_like(model.get_parameter(adaptive), 1 / model.get_parameter(adaptive)[0].numel())
    found = [
        torch.equal(model.get_parameter(other), source.get_parameter(other)),
        torch.equal(model.get_parameter(adaptive), source.get_parameter(adaptive)),
        torch.equal(model.get_parameter(adaptive), uniform),
        model.get_parameter(adaptive).requires_grad,
    ]
    expected = {
        "transfer": [True, True, False],
        "uniform": [True, False, True],
        "scratch": [False, False, kernel == "fixed"],
    }
    assert found == [*expected[init], kernel == "learnable"]
    assert model.get_parameter(other).requires_grad
    balls = {layer.ball for layer in model.modules() if isinstance(layer, MetricConv2d)}
    assert balls == {"metric": {"tangent"}, "metric-geodesic": {"geodesic"}}.get(conv, set())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": []}, "seeds: the list is empty"),
        ({"source": {"epochs": 0}}, "epochs: expected a number greater than 0"),
        ({"conv": ["metrik"]}, "conv: expected some of"),
        ({"variants": {"metric": {"conv": "metric"}}}, r"variants\.metric: expected a name of its own"),
        ({"variants": {"metric-rays": {"conv": "metric"}}}, r"variants\.metric-rays: expected a name of its own"),
        ({"variants": {"bent": {"conv": "metrik"}}}, r"variants\.bent: .* conv \(one of"),
        ({"variants": {"bent": {"conv": "metric", "conv_cfg": {}}}}, r"variants\.bent: .* model_args"),
        ({"variants": {"bent": {"conv": "metric", "train": {"seed": 1}}}}, r"train\.seed: the comparison sets it"),
        ({"model": "vit_tiny"}, "model: expected one of"),
        ({"train": {"epoch": 3}}, "unknown key 'epoch'. Did you mean 'epochs'"),
    ],
)
def test_refusals(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        compare(tiny(tmp_path, **changes))
    assert not (tmp_path / "compare" / "summary.json").exists()


def test_a_variant_changes_what_it_names(tmp_path):
    """The layer's argument and the training's are its own; what it does not name is the comparison's."""
    mild = {"conv": "metric", "model_args": {"conv_cfg": {"pattern": "onion"}}, "train": {"predictor_lr": 0.5}}
    config = tiny(tmp_path, conv=["metric", "mild"], variants={"mild": mild})
    compare_module._check(config)
    runs = [compare_module._run(config, Cell(conv, "scratch", "learnable"), 0, None, []) for conv in config.conv]
    assert [run.predictor_lr for run in runs] == [0.1, 0.5] and runs[0].epochs == runs[1].epochs
    assert [run.model_args["conv_cfg"] for run in runs] == [{"eps_omega": 0.9}, {"eps_omega": 0.9, "pattern": "onion"}]
    assert {run.model for run in runs} == {"test_resnet_metric"} and runs[1].model_args["stem"] == "cifar"


def test_what_a_variant_costs_is_what_its_runs_cost(tmp_path):
    larger = {"conv": "metric", "train": {"input_size": 16}}
    config = tiny(tmp_path, variants={"larger": larger})
    metric, variant = (compare_module._cost(config, conv) for conv in ("metric", "larger"))
    assert variant["params"] == metric["params"] and variant["gmacs"] == pytest.approx(4 * metric["gmacs"], rel=0.1)


def test_runs_of_another_variant_of_that_name_are_not_averaged(tmp_path):
    """A folder's variants may be defined in the package by now: the same ones go on, others are refused."""
    built_in = compare_module.VARIANTS["deform-bounded"]
    folder = tmp_path / "compare" / "deform-bounded-scratch-learnable-seed0"
    folder.mkdir(parents=True)
    (folder / "summary.json").touch()

    def begin(**variants):
        write_config(tiny(tmp_path, conv=["standard", *variants], variants=variants))

    begin(**{"deform-bounded": built_in, "wide": {"conv": "deform"}})
    config = tiny(tmp_path, conv=["deform-bounded"], variants={"deform-bounded": built_in})
    compare_module._check(config)
    for command in (config, tiny(tmp_path, conv=["deform-bounded"])):
        assert compare_module._with_earlier_rows(command).conv == ["standard", "deform-bounded", "wide"]
    with pytest.raises(ConfigError, match=r"variants\.wide: expected .*'deform'}, .* got .*'metric'"):
        compare(tiny(tmp_path, conv=["wide"], variants={"wide": {"conv": "metric"}}))
    begin(**{"deform-bounded": {"conv": "deform"}})
    with pytest.raises(ConfigError, match=r"variants\.deform-bounded: expected .*max_offset"):
        compare(tiny(tmp_path, conv=["deform-bounded"]))


def test_one_command_in_a_folder(tmp_path):
    """Two would each leave a configuration and a summary without the other's rows."""
    config = tiny(tmp_path)
    with locked(config.folder), pytest.raises(ConfigError, match=f"process {os.getpid()} on .* is writing into"):
        compare(config)
    assert not list(config.folder.iterdir())
