"""Training end to end on tiny data: what it writes, kill and resume, two processes, refusals."""

import argparse
import copy
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("accelerate", reason="needs the extra [recipes]")

import numpy as np
from PIL import Image
from timm.scheduler import create_scheduler, create_scheduler_v2

from timm_metricconv import PAPER, BallConv2d
from timm_metricconv.recipes.config import ConfigError
from timm_metricconv.recipes.data import evaluation_crop
from timm_metricconv.recipes.diagnosis import diagnose
from timm_metricconv.recipes.network import build_model, is_predictor, parameter_groups, predictor_regulariser
from timm_metricconv.recipes.predict import PredictConfig, predict
from timm_metricconv.recipes.run import locked, write_config
from timm_metricconv.recipes.train import (
    TrainConfig,
    TrainingDiverged,
    _Average,
    _best,
    learning_rate,
    make_optimiser,
    train,
)
from timm_metricconv.recipes.validate import ValidateConfig, per_class, validate

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An image folder of two easy classes: dark and bright noise."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        for label, level in (("dark", 40), ("bright", 200)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(random.normal(level, 20, (20, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return str(root)


def tiny(tmp_path, images, **changes) -> TrainConfig:
    values = {
        "model": "test_resnet_metric",
        "model_args": {"stem": "cifar"},
        "data": images,
        "input_size": 16,
        "batch_size": 8,
        "epochs": 3,
        "workers": 0,
        "lr": 2e-3,
        "output": str(tmp_path / "run"),
        **changes,
    }
    return TrainConfig(**values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="these optimisers have what they need")
def test_an_optimiser_that_is_not_installed(tmp_path, images):
    with pytest.raises(ConfigError, match="opt='fusedadam': CUDA required"):
        train(tiny(tmp_path, images, opt="fusedadam"), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_second_order_optimiser(tmp_path, images):
    """adahessian takes the gradient of the gradient."""
    train(tiny(tmp_path, images, opt="adahessian", model="test_resnet", model_args={}, epochs=1), quiet=True)


@pytest.mark.slow
def test_a_saved_network_goes_on_in_another_precision(tmp_path, images):
    """`local-dir:` starts from its weights without another word; accelerate alone would ask for a new process."""
    first = tiny(tmp_path, images, epochs=1)
    train(first, quiet=True)
    folder = f"local-dir:{first.folder}/model"
    second = tiny(tmp_path, images, output=str(tmp_path / "second"), model=folder, model_args={}, epochs=1, amp="bf16")
    started = {}
    train(second, quiet=True, prepare=lambda model: started.update(copy.deepcopy(model.state_dict())))
    saved = weights(first.folder)
    assert all(torch.equal(started[key], saved[key]) for key in saved)
    scratch = build_model(TrainConfig(model=folder, pretrained=False), 2).state_dict()
    assert not torch.equal(scratch["fc.weight"], saved["fc.weight"])
    assert validate(ValidateConfig(model=folder, data=images, workers=0, batch_size=5))["images"] == 12


def weights(folder: Path):
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.slow
def test_what_a_run_writes(tmp_path, images, capsys):
    config = tiny(tmp_path, images)
    summary = train(config)
    said = " ".join(capsys.readouterr().out.split())
    assert "32 images to train on, 12 to validate on, 2 classes; test_resnet_metric: " in said
    folder = config.folder
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["top1"] > 90 and summary["predicted"] == 2
    best = max(csv.DictReader((folder / "curves.csv").open()), key=lambda row: float(row["top1"]))
    assert summary["best_epoch"] == int(best["epoch"]) and (folder / "best" / "model.safetensors").exists()
    assert "top-5" not in said and "top5" not in said  # of two classes
    assert len((folder / "curves.csv").read_text().splitlines()) == 1 + config.epochs
    assert "lr: 0.002" in (folder / "config.yaml").read_text()
    assert not [path for path in folder.rglob("*") if "tmp" in path.name]
    assert (folder / "geometry.png").stat().st_size > 1000
    model = timm.create_model(f"local-dir:{folder}/model", pretrained=True)
    assert model.num_classes == 2 and model.pretrained_cfg["input_size"] == (3, 16, 16)
    record = validate(ValidateConfig(model=f"local-dir:{folder}/model", data=images, workers=0, batch_size=5))
    assert record["top1"] == pytest.approx(summary["top1"]) and record["images"] == 12
    values = {"model": f"local-dir:{folder}/model", "images": f"{images}/val", "workers": 0, "batch_size": 5}
    rows = predict(PredictConfig(**values, output=str(tmp_path / "classes.csv")))
    assert rows[0].keys() == {"file", "class", "probability"} and len(rows) == 12
    hits = sum(row["file"].startswith(row["class"]) for row in rows)
    assert 100 * hits / 12 == pytest.approx(summary["top1"])
    assert (tmp_path / "classes.csv").read_text().startswith("file,class,probability\nbright/0.png,")
    with pytest.raises(ConfigError, match="images: there is no image in"):
        predict(PredictConfig(**{**values, "images": str(tmp_path / "nowhere")}))
    said = capsys.readouterr().out
    assert "Fewer than 10 images: " in said and "top-1 of each class" in said
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert train(config, quiet=True) == summary  # complete: only read
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == written


@pytest.mark.slow
def test_a_run_goes_on_where_epochs_are_more(tmp_path, images, capsys):
    """Of a complete run alone, from its last epoch's weights and optimiser, by the schedule of the longer run."""
    short = tiny(tmp_path, images, epochs=1, sched="constant")
    train(short, quiet=True)
    longer = tiny(tmp_path, images, epochs=2, sched="constant")
    summary = train(longer)
    assert summary["epochs"] == 2 and "going on after epoch 1 of 2" in capsys.readouterr().out
    whole = tiny(tmp_path, images, epochs=2, sched="constant", output=str(tmp_path / "whole"))
    train(whole, quiet=True)
    a, b = weights(whole.folder), weights(longer.folder)
    assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(ConfigError, match=r"another epochs \(2 → 1\)"):
        train(short, quiet=True)


def test_accuracy_of_each_class():
    rows = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 1, 1, 1]]).float()
    assert per_class(rows, ["ant", "bee", "fly"]) == [
        {"class": "bee", "images": 2, "top1": 50.0},
        {"class": "ant", "images": 1, "top1": 100.0},
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema_decay": 0.9, "mixup": 0.2, "smoothing": 0.1, "grad_accum": 2, "workers": 1, "opt": "sgd", "lr": 0.05},
        {"model": "test_resnet_deform", "fixed_kernel": True, "amp": "bf16", "re_prob": 0.5},
    ],
    ids=["plain", "everything", "fixed kernel in bf16"],
)
def test_interrupted_run_equals_uninterrupted(tmp_path, images, changes, monkeypatch):
    whole = tiny(tmp_path, images, output=str(tmp_path / "whole"), **changes)
    train(whole, quiet=True)
    parted = tiny(tmp_path, images, output=str(tmp_path / "parted"), **changes)

    from timm_metricconv.recipes import train as module

    epoch = module._Trainer.epoch

    def killed(self, number):
        if number == 2:
            raise KeyboardInterrupt
        return epoch(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(module._Trainer, "epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            train(parted, quiet=True)
    assert not (parted.folder / "summary.json").exists()
    train(parted, quiet=True)
    a, b = weights(whole.folder), weights(parted.folder)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def run_script(*arguments, **kwargs):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )


def script_arguments(config: TrainConfig):
    values = {key: getattr(config, key) for key in ("model", "data", "input_size", "batch_size", "epochs", "workers")}
    pairs = [f"--{key}={value}" for key, value in values.items()]
    return ["scripts/train.py", *pairs, "--model_args.stem=cifar", f"--lr={config.lr}", f"--output={config.output}"]


KILLED = """
import os, signal
from timm_metricconv.recipes import train as module
from timm_metricconv.recipes.config import main
save = module._Checkpoints.save

def killed(self, epoch):
    if epoch == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, epoch)

module._Checkpoints.save = killed
main(module.train, module.TrainConfig, None)
"""


@pytest.mark.slow
def test_killed_process_goes_on(tmp_path, images):
    """Killed where the curves and the network are an epoch ahead of the checkpoint."""
    whole = tiny(tmp_path, images, output=str(tmp_path / "whole"), epochs=4)
    process = run_script(sys.executable, *script_arguments(whole))
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    parted = tiny(tmp_path, images, output=str(tmp_path / "parted"), epochs=4)
    process = run_script(sys.executable, "-c", KILLED, *script_arguments(parted)[1:])
    output, _ = process.communicate(timeout=280)
    assert process.returncode == -signal.SIGKILL, output
    assert not (parted.folder / "summary.json").exists()
    process = run_script(sys.executable, *script_arguments(parted))
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0 and "going on after epoch 2 of 4" in output, output
    a, b = weights(whole.folder), weights(parted.folder)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, images):
    """Half the batch in each is the whole batch in one, where no layer looks at the batch and no image is random."""
    same = {
        "model_args": {"stem": "cifar", "norm_layer": "groupnorm1"},
        "epochs": 2, "opt": "sgd", "lr": 0.05,
        "scale": [1.0, 1.0], "ratio": [1.0, 1.0], "hflip": 0.0, "interpolation": "bilinear",
    }  # fmt: skip
    one = tiny(tmp_path, images, output=str(tmp_path / "one"), batch_size=8, **same)
    train(one, quiet=True)
    config = tiny(tmp_path, images, batch_size=4, **same)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(same))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = run_script(*torchrun, *script_arguments(config), f"--config={tmp_path / 'two.yaml'}")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    a, b = weights(one.folder), weights(config.folder)
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-3, atol=1e-5, msg=key)
    summary = json.loads((config.folder / "summary.json").read_text())
    record = validate(ValidateConfig(model=f"local-dir:{config.folder}/model", data=images, workers=0))
    assert record["top1"] == pytest.approx(summary["top1"], abs=1e-4)  # the gather lost and repeated no image


def test_warm_start_takes_all_but_the_classifier(tmp_path, images):
    source = tiny(tmp_path, images, model="test_resnet", model_args={}, epochs=1)
    train(source, quiet=True)
    checkpoint = str(source.folder / "model" / "model.safetensors")
    model = build_model(TrainConfig(model="test_resnet_metric", checkpoint=checkpoint), 2)
    loaded = load_file(checkpoint)
    assert torch.equal(model.layer3[0].conv2.weight, loaded["layer3.0.conv2.weight"])
    assert not torch.equal(model.fc.weight, loaded["fc.weight"])


def test_fixed_kernels_stay(tmp_path, images):
    config = tiny(tmp_path, images, fixed_kernel=True, epochs=1)
    torch.manual_seed(config.seed)
    train(config, quiet=True)
    from accelerate.utils import set_seed

    set_seed(config.seed)
    before = build_model(config, 2).state_dict()
    after = weights(config.folder)
    assert torch.equal(before["layer3.0.conv2.weight"], after["layer3.0.conv2.weight"])
    assert not torch.equal(before["layer1.0.conv2.weight"], after["layer1.0.conv2.weight"])
    assert after["layer3.0.conv2.predictor.weight"].any()


def test_parameter_groups():
    """Each parameter is in one group, decayed where it should be."""
    model = timm.create_model("test_resnet_metric")
    groups = parameter_groups(model, weight_decay=0.3, predictor_lr=0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    by_id = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = by_id[id(parameter)]
        assert group["lr_scale"] == (0.1 if is_predictor(name) else 1.0)
        assert group["weight_decay"] == (0.3 if parameter.ndim > 1 else 0.0)


def test_predictors_have_a_weight_decay_of_their_own():
    model = timm.create_model("test_resnet_metric")
    by_name = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, weight_decay=0.3, predictor_weight_decay=0.0):
        for parameter in group["params"]:
            decayed = parameter.ndim > 1 and not is_predictor(by_name[id(parameter)])
            assert group["weight_decay"] == (0.3 if decayed else 0.0)


@pytest.mark.parametrize("sched", ["cosine", "step", "poly"])
@pytest.mark.parametrize("predictor_lr", [0.0, 0.1, 3.0])
def test_predictors_move_at_their_rate(sched, predictor_lr):
    """A step of plain SGD moves a predictor by predictor_lr times what it moves any other parameter, in every epoch."""
    model = timm.create_model("test_resnet_metric")
    choice = {"opt": "sgd", "lr": 0.5, "weight_decay": 0.0, "epochs": 7, "warmup_epochs": 2, "min_lr": 0.01}
    config = TrainConfig(sched=sched, predictor_lr=predictor_lr, **choice)
    optimiser, schedule = make_optimiser(model, config)
    only = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    alone = create_scheduler_v2(  # timm's, of one group
        only,
        sched,
        num_epochs=7,
        warmup_epochs=2,
        min_lr=0.01,
        decay_epochs=2,
        decay_rate=0.9 if sched == "poly" else 0.1,
    )[0]
    for group in optimiser.param_groups:
        group.update(momentum=0, nesterov=False)
    for epoch in range(config.epochs):
        schedule.step(epoch)
        alone.step(epoch)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimiser.step()
        rate = only.param_groups[0]["lr"]
        assert learning_rate(optimiser) == pytest.approx(rate)
        for name, parameter in model.named_parameters():
            moved = before[name] - parameter.detach()
            expected = torch.full_like(moved, rate * (predictor_lr if is_predictor(name) else 1.0))
            torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6, msg=name)


TIMM = {"sched": "cosine", "epochs": 30, "warmup_epochs": 3, "warmup_lr": 1e-5, "min_lr": 1e-6, "decay_epochs": 9}


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({"sched": "cosine"}, {}),
        ({"sched": "tanh"}, {}),
        ({"sched": "step"}, {}),
        ({"sched": "step", "decay_epochs": 2.5, "decay_rate": 0.5}, {"decay_epochs": 2.5, "decay_rate": 0.5}),
        ({"sched": "multistep"}, {"decay_milestones": [9, 18, 27]}),
        ({"sched": "multistep", "decay_milestones": [5, 20]}, {"decay_milestones": [5, 20]}),
        ({"sched": "poly", "power": 2.0}, {"decay_rate": 2.0}),
        ({"sched": "wsd"}, {"decay_epochs": 0.2}),
        ({"sched": "rsqrt", "decay_epochs": 6}, {"decay_epochs": 6}),
        ({"sched": "rsqrt", "warmup_epochs": 0}, {"decay_epochs": 0.2, "warmup_epochs": 0, "lr_stable_timescale": 1}),
        ({"sched": "constant", "warmup_lr": 1e-4}, {"warmup_lr": 1e-4}),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_schedules_are_those_of_timms_script(ours, theirs):
    """Epoch by epoch what timm's `train.py` would set for the same arguments; and no schedule but one is constant."""
    arguments = argparse.Namespace(**{**TIMM, "sched": ours["sched"], **theirs})
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=0.01)
    schedule, _ = create_scheduler(arguments, optimiser)
    rates = [optimiser.param_groups[0]["lr"]]
    for epoch in range(1, arguments.epochs):  # the script's: at the end of each epoch, for the next one
        schedule.step(epoch)
        rates.append(optimiser.param_groups[0]["lr"])
    config = TrainConfig(**{**{k: TIMM[k] for k in ("epochs", "warmup_epochs", "min_lr")}, "lr": 0.01, **ours})
    optimiser, schedule = make_optimiser(timm.create_model("test_resnet_metric"), config)
    for epoch, rate in enumerate(rates):
        schedule.step(epoch)
        assert learning_rate(optimiser) == pytest.approx(rate, rel=1e-9), epoch
    assert (rates[-1] < rates[3] / 2) == (ours["sched"] != "constant")


def test_warmup_starts_below_a_small_rate():
    """timm's 1e-5 would be ten times this `lr`."""
    config = TrainConfig(lr=1e-6, warmup_epochs=2)
    optimiser, schedule = make_optimiser(timm.create_model("test_resnet_metric"), config)
    schedule.step(0)
    assert learning_rate(optimiser) == pytest.approx(1e-8)


@pytest.mark.slow
def test_the_average_of_a_short_run_is_no_start(tmp_path, images, capsys):
    """An average over a thousand steps would be the untrained network's after 12: 50 % of two classes."""
    model = timm.create_model("test_resnet_metric", num_classes=2)
    average, start = _Average(model, 0.999), model.fc.weight.detach().clone()
    for _ in range(12):
        model.fc.weight.data += 1
        average.add(model)
    moved = (average.module.fc.weight - start).mean()
    assert 8 < moved < 12
    summary = train(tiny(tmp_path, images, ema_decay=0.999))
    assert "ema_decay: 0.999 averages 1,000 steps, and this run has 12" in " ".join(capsys.readouterr().out.split())
    assert summary["top1"] > 90


def test_curves_have_the_rate_of_the_network(tmp_path, images):
    """Warm-up begins at timm's 1e-5; then the cosine from `lr`."""
    config = tiny(tmp_path, images, warmup_epochs=1, epochs=2)
    train(config, quiet=True)
    with (config.folder / "curves.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx([1e-5, config.lr / 2])


def test_predictor_regulariser():
    model = timm.create_model("test_resnet_deform")
    layers = [module for module in model.modules() if isinstance(module, BallConv2d)]
    for i, layer in enumerate(layers):
        torch.nn.init.constant_(layer.predictor.weight, -i)
        torch.nn.init.constant_(layer.predictor.bias, 3 * i)
    expected = sum(2 * i for i in range(len(layers))) / len(layers)
    assert predictor_regulariser(model).item() == pytest.approx(expected)


def test_predictor_regulariser_of_separable_predictors():
    """It means the 1×1; the depthwise part before it is not drawn to zero with it."""
    layer = timm.create_model("test_convnext_metric", stages=[1]).stages[0].blocks[0].conv_dw
    torch.nn.init.constant_(layer.predictor[1].weight, -1.0)
    torch.nn.init.constant_(layer.predictor[1].bias, 3.0)
    regulariser = predictor_regulariser(layer)
    regulariser.backward()
    assert regulariser.item() == pytest.approx(2) and layer.predictor[0].weight.grad is None


def test_nan_stops_and_keeps_the_last_good_state(tmp_path, images):
    good = tiny(tmp_path, images, epochs=2)
    from timm_metricconv.recipes import train as module

    step, calls = module._Trainer._step, []

    def diverging(self, *batch):
        calls.append(1)
        return step(self, *batch) * (float("nan") if len(calls) > 4 else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Trainer, "_step", diverging)
        with pytest.raises(TrainingDiverged, match="the loss is nan in epoch 2"):
            train(good, quiet=True)
    assert (good.folder / "checkpoints" / "epoch_1").exists()
    assert all(value.isfinite().all() for value in weights(good.folder).values() if value.is_floating_point())
    assert train(good, quiet=True)["epochs"] == 2  # and the run can go on


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": "nowhere"}, "there is no folder 'nowhere'"),
        ({"model": "resnet19_metric"}, "Unknown model"),
        ({"model_args": {"conv_cfg": {"drft": "whitened"}}}, "drft"),
        ({"model_args": {"conv_cfg": {"pattern": "union"}}}, "pattern='union': expected one of"),
        ({"checkpoint": "nowhere.safetensors"}, "no file 'nowhere.safetensors'"),
        ({"batch_size": 1000}, "more than the 32 training images"),
        ({"amp": "fp16"}, "fp16"),
        ({"batch_size": 7, "mixup": 0.2}, "batch_size=7: mixup"),
        ({"epochs": 0}, "epochs: expected a number greater than 0; got 0"),
        ({"epochs": 2, "warmup_epochs": 5}, "warmup_epochs: expected fewer than epochs, 2, .*; got 5"),
        ({"lr": 1e-4, "warmup_lr": 1e-3}, "warmup_lr: expected at most lr, 0.0001; got 0.001"),
        ({"sched": "wsd", "epochs": 1}, "sched='wsd' with epochs=1"),
        ({"model_args": {}, "batch_size": 1}, "model: it cannot take images of 1×3×16×16: .*larger --batch_size"),
        ({"model": "vit_tiny_patch16_224", "model_args": {}}, "model: .*16×16: .*224.*--model_args.img_size"),
        ({"model_args": {"conv_cfg": {"eps_omga": 0.5}}}, "'eps_omga'.*Did you mean 'eps_omega'"),
        ({"kernels": ["layer9"]}, "kernels: .*layer9.*; expected names of convolutions"),
    ],
)
def test_refusals(tmp_path, images, changes, message):
    if changes.get("amp") == "fp16" and torch.cuda.is_available():
        pytest.skip("a GPU can do fp16")
    with pytest.raises(ConfigError, match=message):
        train(tiny(tmp_path, images, **changes), quiet=True)
    assert not (tmp_path / "run").exists()


def test_another_configuration_is_refused(tmp_path, images):
    """Other workers too: each loader process augments by a sequence of its own, so the weights would be others."""
    train(tiny(tmp_path, images, epochs=1), quiet=True)
    with pytest.raises(ConfigError, match=r"another workers \(0 → 1\)"):
        train(tiny(tmp_path, images, epochs=1, workers=1), quiet=True)
    with pytest.raises(ConfigError, match=r"another lr \(0.002 → 0.5\)"):
        train(tiny(tmp_path, images, epochs=1, lr=0.5), quiet=True)


def test_one_process_writes_into_a_folder(tmp_path, images):
    """Another is refused with the name of the first, and what a killed one left behind stops nobody."""
    config = tiny(tmp_path, images)
    code = "import sys, pathlib; from timm_metricconv.recipes.run import locked\n"
    code += f"with locked(pathlib.Path({str(config.folder)!r})): print('has it', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "has it\n"
    with pytest.raises(ConfigError, match=f"^output: process {other.pid} on .* is writing into .*run"):
        train(config, quiet=True)
    assert [path.name for path in config.folder.iterdir()] == [".lock"]
    other.kill()
    other.wait()
    with locked(config.folder):
        pass
    assert not list(config.folder.iterdir())


def test_another_run_that_began_while_the_data_were_read(tmp_path, images):
    """Its checkpoints were gone on from as if they were this run's."""
    other = tiny(tmp_path, images, lr=0.5)

    def begin(model):
        write_config(other)
        (other.folder / "curves.csv").touch()

    with pytest.raises(ConfigError, match=r"another lr \(0.5 → 0.002\)"):
        train(tiny(tmp_path, images), quiet=True, prepare=begin)


def test_an_epoch_without_a_score_is_not_the_best(tmp_path, images):
    """Dice is no number where no class is seen: it is neither more nor less than another."""
    config = tiny(tmp_path, images, task="segmentation")
    rows = [{"epoch": epoch, "dice": dice} for epoch, dice in enumerate((math.nan, 3.0, math.nan, 5.0, 5.0), 1)]
    assert [_best(config, rows[:count])["epoch"] for count in range(1, 6)] == [1, 2, 2, 4, 4]


@pytest.mark.parametrize("conv", ["metric", "deform"])
def test_a_device_without_float64_can_be_diagnosed(conv, monkeypatch):
    """Apple's has none: what is computed in float64 comes to the CPU first."""

    class OnCPU(torch.Tensor):
        pass

    def double(tensor):
        assert isinstance(tensor, OnCPU), "float64 on the device"
        return tensor.to(torch.float64)

    model = timm.create_model(f"test_resnet_{conv}", stem="cifar").eval()
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor.as_subclass(OnCPU))
    monkeypatch.setattr(torch.Tensor, "double", double)
    assert all(numbers["outside"] >= 0 for numbers in diagnose(model, torch.randn(2, 3, 16, 16)).values())


@pytest.mark.slow
def test_a_folder_without_a_result_is_free(tmp_path, images):
    """A run that diverged in its first epoch, or was killed in it, does not block the command put right."""
    message = (
        r"the loss is nan in epoch 1, step 2\. The first output that is not finite is that of conv1\.\d\. A lower --lr"
    )
    with pytest.raises(TrainingDiverged, match=message):
        train(tiny(tmp_path, images, opt="sgd", lr=1e30), quiet=True)
    train(tiny(tmp_path, images, epochs=1), quiet=True)


def test_folder_without_classes(tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"there is no image in the folders of .*train"):
        train(tiny(tmp_path, str(tmp_path / "data")), quiet=True)


def test_validate_refuses_other_classes(tmp_path, images):
    train(tiny(tmp_path, images, epochs=1), quiet=True)
    with pytest.raises(ConfigError, match="has 2 classes, digits has 10"):
        validate(ValidateConfig(model=f"local-dir:{tmp_path}/run/model", data="digits", workers=0))
    model = timm.create_model(f"local-dir:{tmp_path}/run/model", pretrained=True)
    assert list(model.pretrained_cfg["label_names"]) == ["bright", "dark"]
    shutil.copytree(images, tmp_path / "renamed")
    for split in ("train", "val"):
        (tmp_path / "renamed" / split / "bright").rename(tmp_path / "renamed" / split / "light")
    with pytest.raises(ConfigError, match=r"a class is 'bright' to local-dir:.* and 'dark' in .*renamed"):
        validate(ValidateConfig(model=f"local-dir:{tmp_path}/run/model", data=str(tmp_path / "renamed"), workers=0))


def test_results_as_timm_publishes_them(tmp_path):
    """One row for each model, the best first; the numbers are those of the record."""
    path = tmp_path / "results-digits.csv"
    for name in ("test_resnet_metric", "test_resnet_deform", "test_resnet_metric"):
        torch.manual_seed(0)
        values = {"model": name, "data": "digits/0-1", "val_images": 8, "input_size": 32, "workers": 0, "batch_size": 8}
        record = validate(ValidateConfig(**values, pretrained=False, csv=str(path)))
    rows = list(csv.DictReader(path.open()))
    columns = "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation"
    assert list(rows[0]) == columns.split(",") and len(rows) == 2
    row = next(row for row in rows if row["model"] == "test_resnet_metric")
    assert float(row["top1"]) == pytest.approx(record["top1"], abs=1e-3) and row["img_size"] == "32"
    assert float(row["top1"]) + float(row["top1_err"]) == pytest.approx(100)
    assert float(row["param_count"]) == pytest.approx(record["params"] / 1e6, abs=0.01)
    assert float(rows[0]["top1"]) >= float(rows[1]["top1"])


def test_textures_do_not_overlap():
    from timm_metricconv.recipes.data import _textures

    train_set, val_set = _textures(True), _textures(False)
    seen = {image.tobytes() for image in train_set.images}
    assert not any(image.tobytes() in seen for image in val_set.images)
    assert len(train_set) == 3 * 16 * 11 and len(val_set) == 3 * 16 * 4 and set(val_set.labels) == {0, 1, 2}


def test_tuples_in_the_arguments_do_not_make_another_run(tmp_path, images):
    """A configuration read back from YAML has lists where Python's `PAPER` has tuples."""
    config = tiny(tmp_path, images, epochs=1, model_args={"stem": "cifar", "conv_cfg": PAPER["conv_cfg"]})
    assert train(config, quiet=True) == train(config, quiet=True)


def test_saved_model_knows_how_it_was_validated(tmp_path, images):
    train(tiny(tmp_path, images, epochs=1, crop_pct=0.9, interpolation="bilinear"), quiet=True)
    cfg = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True).pretrained_cfg
    assert (cfg["crop_pct"], cfg["interpolation"]) == (0.9, "bilinear")
    own = timm.create_model("test_resnet_metric").pretrained_cfg
    assert evaluation_crop(TrainConfig(), own) == (own["crop_pct"], own["interpolation"])
