"""The Hub, from huggingface_hub down to the socket, against a server on this machine."""

import inspect
import json
import shutil

import huggingface_hub
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from loopback_hub import WRITER, LoopbackHub
from torch import nn

pytest.importorskip("pydantic", reason="needs the extra [recipes]")

from timm_metricconv import LAYERS, MetricConv2d
from timm_metricconv.recipes import hub as module
from timm_metricconv.recipes.config import ConfigError
from timm_metricconv.recipes.hub import HubConfig, push

pytestmark = pytest.mark.slow
HUB_TRIES_AGAIN = int(huggingface_hub.__version__.split(".")[0]) >= 1
STANDARD = "timm/test_resnet.r160_in1k"


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub(tmp_path / "home") as hub:
        yield hub


@pytest.fixture
def gone(tmp_path):
    """A Hub that nobody reaches; its port stays its own, or another test's server might answer there."""
    hub = LoopbackHub(tmp_path / "home")
    yield hub
    hub.server.server_close()


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """What scripts/train.py leaves."""
    folder = tmp_path_factory.mktemp("run")
    conv_cfg = {"parametrization": "spectral", "drift": "sigmoid_norm", "eps_omega": 0.9}
    model = timm.create_model(
        "test_resnet_metric", num_classes=5, stem="cifar", zero_init_last=False, conv_cfg=conv_cfg
    )
    for layer in model.modules():
        if isinstance(layer, MetricConv2d):
            torch.nn.init.normal_(layer.predictor.weight, std=0.02)
    timm.models.save_for_hf(model, str(folder / "model"), safe_serialization=True)
    training = {
        "model": "test_resnet_metric",
        "data": "/home/someone/secret/birds",
        "epochs": 3,
        "lr": 0.003,
        "seed": 0,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(training))
    (folder / "summary.json").write_text(json.dumps({"top1": 91.25, "top5": 99.5, "predictor_params": 1234}))
    (folder / "curves.csv").write_text("epoch,val_loss,top1\n1,2.0,50\n2,0.25,91.25\n")
    return folder


@pytest.fixture(scope="session")
def standard_folder(tmp_path_factory):
    """timm's own repository of the standard network, with weights made here."""
    folder = tmp_path_factory.mktemp("standard")
    timm.models.save_for_hf(timm.create_model("test_resnet"), str(folder), safe_serialization=True)
    return folder


def test_dry_run_writes_a_repository_that_loads(run_folder, tmp_path):
    target = tmp_path / "birds"
    push(HubConfig(folder=str(run_folder), dry_run=str(target)))
    assert sorted(f.name for f in target.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    theirs = timm.create_model(f"local-dir:{run_folder / 'model'}", pretrained=True).eval()
    ours = timm.create_model(f"local-dir:{target}", pretrained=True).eval()
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(image), theirs(image))
    assert ours.layer2[0].conv1.parametrization == "spectral"


def test_card_tells_what_a_reader_needs_and_no_paths(run_folder, tmp_path):
    push(HubConfig(folder=str(run_folder), dry_run=str(tmp_path / "birds")))
    card = ModelCard.load(tmp_path / "birds" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "timm"
    assert "metric-convolution" in card.data.tags
    assert card.data.eval_results[0].metric_value == 91.25
    for text in ("`spectral`", "`sigmoid_norm`", "| eps_omega | 0.9 |", "| epochs | 3 |", "| lr | 0.003 |"):
        assert text in card.text
    for text in ("91.25", "0.2500", "1,234", "import timm_metricconv", "apache-2.0", "Bruckstein", "birds"):
        assert text in card.text
    assert "/home" not in str(card)
    assert not LoopbackHub.card_errors(str(card))


@pytest.mark.parametrize("name", LAYERS)
def test_card_has_every_argument_of_a_layer(name):
    """A geodesic network's card said nothing of its balls."""
    own = {"metric": {"ball": "geodesic", "steps": 3}, "deform": {"max_offset": 1.5}}.get(name, {})
    layers = [LAYERS[name](4, 4, 3, metric_groups=groups, **own) for groups in (1, 2)]
    card = module._convolution(layers)
    for key in (
        inspect.signature(LAYERS[name]).parameters.keys() - inspect.signature(nn.Conv2d).parameters.keys() - {"backend"}
    ):
        assert f"| {key} | " in card
    assert "| metric_groups | 1, 2 |" in card
    assert all(f"| {key} | {module._text(value)} |" in card for key, value in own.items())


def test_an_accuracy_on_some_or_on_warped_images_is_not_the_data_sets(run_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    training = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**training, "val_images": 20, "warp": {"rotation": [90]}}))
    push(HubConfig(folder=str(folder), dry_run=str(tmp_path / "birds")))
    card = ModelCard.load(tmp_path / "birds" / "README.md")
    assert not card.data.eval_results
    assert all(text in card.text for text in ("| val_images | 20 |", "rotation", "| seed | 0 |", "91.25"))


@pytest.mark.parametrize(
    ("folder", "config", "says"),
    [
        ("nowhere", {"repo": "tester/birds"}, "no folder"),
        ("", {"repo": "tester/birds"}, "--folder"),
        ("run", {"repo": "birds"}, "owner/name"),
        ("empty", {"dry_run": "out"}, "no model.safetensors"),
        ("broken", {"dry_run": "out"}, "cannot load"),
    ],
)
def test_push_refuses_what_cannot_work(folder, config, says, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    push(HubConfig(folder=str(run_folder), dry_run="broken"))
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(ConfigError, match=says):
        push(HubConfig(folder=str(run_folder) if folder == "run" else folder, **config))


LOAD = """
import sys, torch, timm, timm_metricconv
torch.manual_seed(0)
image = torch.randn(2, 3, 32, 32)
model = timm.create_model(sys.argv[1], pretrained=True).eval()
print(repr(float(model(image).detach().double().sum())))
"""


def test_push_and_load_back(hub, run_folder):
    pushed = hub.python(
        "scripts/push_to_hub.py", "--folder", str(run_folder), "--repo", "tester/birds", HF_TOKEN=WRITER
    )
    assert pushed.returncode == 0, pushed.stderr
    assert set(hub.repos["tester/birds"]) == {"README.md", "config.json", "model.safetensors"}
    assert "POST /api/validate-yaml" in hub.requests
    assert b"hf-hub:tester/birds" in hub.repos["tester/birds"]["README.md"]
    loaded = hub.python(LOAD, "hf-hub:tester/birds")
    assert loaded.returncode == 0, loaded.stderr
    torch.manual_seed(0)
    image = torch.randn(2, 3, 32, 32)
    model = timm.create_model(f"local-dir:{run_folder / 'model'}", pretrained=True).eval()
    assert float(loaded.stdout) == pytest.approx(float(model(image).detach().double().sum()), rel=1e-5)


REFUSALS = """
import os, sys
from timm_metricconv.recipes.config import ConfigError
from timm_metricconv.recipes.hub import HubConfig, push
for token, repo, update in (
    ("", "tester/birds", False),
    ("hf_unknown", "tester/birds", False),
    ("hf_reader", "tester/birds", False),
    ("hf_writer", "other/birds", False),
    ("hf_writer", "tester/taken", False),
    ("hf_writer", "tester/bad--name", False),
    ("hf_writer", "tester/taken", True),
):
    os.environ["HF_TOKEN"] = token
    try:
        push(HubConfig(folder=sys.argv[1], repo=repo, update=update))
    except ConfigError as error:
        print("refused:", error)
"""


def test_push_says_why_the_hub_refuses(hub, run_folder):
    hub.repos["tester/taken"] = {"README.md": b"old"}
    result = hub.python(REFUSALS, str(run_folder))
    assert result.returncode == 0, result.stderr
    refusals = [line for line in result.stdout.splitlines() if line.startswith("refused:")]
    expected = ("no token", "does not know", "no right to write", "no right to write", "exists already", "bad--name")
    assert len(refusals) == len(expected), result.stdout
    for line, text in zip(refusals, expected, strict=True):
        assert text in line and len(line) < 400
    assert set(hub.repos) == {"tester/taken"}
    assert hub.repos["tester/taken"]["README.md"] != b"old"  # the last one was allowed to update


def test_what_a_failed_upload_left_is_filled(hub, run_folder):
    """A repository with the Hub's own file alone; the second time there is a network in it."""
    hub.repos["tester/birds"] = {".gitattributes": b"*.safetensors filter=lfs"}
    command = "scripts/push_to_hub.py", "--folder", str(run_folder), "--repo", "tester/birds"
    first = hub.python(*command, HF_TOKEN=WRITER)
    assert first.returncode == 0 and "model.safetensors" in hub.repos["tester/birds"], first.stderr
    second = hub.python(*command, HF_TOKEN=WRITER)
    assert second.returncode == 2 and "exists already" in second.stderr


def test_push_to_an_unreachable_hub_is_one_line(run_folder, gone):
    result = gone.python(
        "scripts/push_to_hub.py", "--folder", str(run_folder), "--repo", "tester/birds", HF_TOKEN=WRITER
    )
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and last.startswith("error: repo:") and gone.url in last
    assert "Traceback" not in result.stderr


PRETRAINED = """
import sys, torch, timm, timm_metricconv
torch.manual_seed(0)
image = torch.randn(2, 3, 64, 64)
standard = timm.create_model("test_resnet", pretrained=True).eval()(image)
for conv in ("metric", "deform", "shifted"):
    model = timm.create_model(f"test_resnet_{conv}", pretrained=True).eval()
    torch.testing.assert_close(model(image), standard, rtol=1e-4, atol=1e-5)
model = timm.create_model("test_resnet_metric", pretrained=True, num_classes=4, in_chans=1).eval()
assert model(image[:, :1]).shape == (2, 4)
"""


def test_pretrained_names_start_as_the_standard_network(hub, standard_folder):
    hub.add(STANDARD, standard_folder)
    result = hub.python(PRETRAINED)
    assert result.returncode == 0, result.stderr
    assert len([r for r in hub.requests if r.startswith("GET") and r.endswith(".safetensors")]) == 1
    # what was fetched once serves without a network, said to be so or not
    for without in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert hub.python(PRETRAINED, **without).returncode == 0


ERRORS = """
import sys, timm, timm_metricconv
for name in sys.argv[1:]:
    try:
        timm.create_model(name, pretrained=True)
        print("loaded", name)
    except Exception as error:
        print(name, type(error).__name__, " ".join(str(error).split()))
"""


def test_missing_repositories_and_checkpoints_that_do_not_fit(hub, standard_folder, run_folder):
    hub.add(STANDARD, standard_folder)
    hub.add("tester/broken", run_folder / "model")
    settings = json.loads(hub.repos["tester/broken"]["config.json"])
    settings["model_args"]["conv_cfg"] = {"parametrization": "cholesky"}
    hub.repos["tester/broken"]["config.json"] = json.dumps(settings).encode()
    names = ("resnet18_metric", "hf-hub:tester/nothing", "hf-hub:tester/broken")
    result = hub.python(ERRORS, *names)
    missing, unknown, unfit = result.stdout.splitlines()
    assert "RuntimeError" in missing and "timm/resnet18.a1_in1k" in missing and "pretrained=False" in missing
    assert "Repository Not Found" in unknown and "tester/nothing" in unknown
    assert "does not fit BallResNet" in unfit and "predictor" in unfit


UNREACHABLE = """
import time, timm, timm_metricconv
from timm_metricconv.recipes.network import create_model
waits = []
time.sleep = waits.append
calls = (
    lambda: timm.create_model("test_resnet_metric", pretrained=True),
    lambda: create_model("test_resnet", {}, pretrained=True),
    lambda: create_model("hf-hub:tester/birds", {}),
)
for call in calls:
    try:
        call()
    except Exception as error:
        print(type(error).__name__, error)
print(sum(waits))
"""


def test_an_unreachable_hub_is_named_at_once(gone):
    """By timm and by the recipes; huggingface_hub alone waits 23 seconds for each file."""
    result = gone.python(UNREACHABLE)
    *errors, waited = result.stdout.splitlines()
    assert len(errors) == 3 and all(gone.url in error for error in errors), result.stdout + result.stderr
    assert all(STANDARD in error for error in errors[:2]) and "RuntimeError" in errors[0]
    assert float(waited) < 15


def test_an_interrupted_download_goes_on_or_leaves_nothing_behind(hub, standard_folder):
    hub.add(STANDARD, standard_folder)
    # the line breaks for good: one clear error, and no part of the file stays
    hub.cuts = 1000
    result = hub.python(ERRORS, "test_resnet_metric")
    assert "RuntimeError" in result.stdout and STANDARD in result.stdout, result.stdout + result.stderr
    left = [f for f in hub.home.rglob("*") if f.is_file() and f.stat().st_size > 10_000]
    assert not left
    # it breaks once, and the client tries again (before huggingface_hub 1.0 the user does)
    hub.cuts = 1
    tries = [hub.python(ERRORS, "test_resnet_metric").stdout for _ in range(1 if HUB_TRIES_AGAIN else 2)]
    assert tries[-1].startswith("loaded")
    assert hub.cuts == 0
    # what is in the cache is whole
    assert hub.python(PRETRAINED, HF_HUB_OFFLINE="1").returncode == 0
