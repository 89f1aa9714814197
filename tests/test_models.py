"""The registered models: what timm's own tests ask of every model, warm start, checkpoints, the paper's layout."""

import copy
import inspect
import json
import logging
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import set_scriptable
from timm.models import get_pretrained_cfg, group_parameters
from timm.models._features_fx import FeatureGraphNet, create_feature_extractor
from timm.models._hub import save_for_hf
from timm.optim import param_groups_layer_decay
from torch import nn

from timm_metricconv import LAYERS, PAPER, BallConv2d, DeformConv2d, MetricConv2d, convert
from timm_metricconv.models import BallConvNeXt, BallResNet, ball_convnext, checkpoint_filter_fn
from timm_metricconv.models.ball_convnext import metric_groups
from timm_metricconv.models.registry import layer_arguments

FAMILIES = ("metric", "deform", "shifted")
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "test_resnet")
CONVNEXTS = tuple(f"convnext_{size}" for size in ("atto", "femto", "pico", "nano", "tiny", "small", "base"))
CONVNEXTS += ("test_convnext",)
NAMES = [f"{size}_{family}" for size in RESNETS for family in FAMILIES]
NAMES += [f"{size}_{family}" for size in CONVNEXTS for family in FAMILIES[:2]]
TINY = [name for name in NAMES if name.startswith("test_")]
SMALL = [*TINY, "resnet18_metric"]
families = pytest.mark.parametrize("family", FAMILIES)
names = pytest.mark.parametrize("name", NAMES)
tiny = pytest.mark.parametrize("name", TINY)
tiny_resnets = pytest.mark.parametrize("name", [name for name in TINY if "resnet" in name])
small = pytest.mark.parametrize("name", SMALL)
PAGE = Path(__file__).parent.parent / "docs" / "large_kernels.md"
backbones = pytest.mark.parametrize("size", ["test_resnet", "test_convnext"])


def create(name, bent=True, **kwargs):
    """A network whose geometry is not the identity, so that the tests see it."""
    model = timm.create_model(name, **kwargs)
    for module in model.modules():
        if bent and isinstance(module, BallConv2d):
            weight = module.predictor_head().weight
            nn.init.normal_(weight, std=0.3 * weight[0].numel() ** -0.5)
    return model


def ball_convs(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, BallConv2d)}


def trained(name, **kwargs):
    """timm's standard network with statistics and scales as after training."""
    model = timm.create_model(name, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            module.running_mean.normal_(std=0.1)
    for key, parameter in model.named_parameters():
        if key.endswith("gamma"):  # of ConvNeXt's blocks: new ones hardly count
            parameter.data.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Name of a standard network → (the network, its weights' file)."""
    cache = {}

    def get(name):
        if name not in cache:
            torch.manual_seed(1)
            model = trained(name)
            file = tmp_path_factory.mktemp("weights") / f"{name}.safetensors"
            save_file(model.state_dict(), file)
            cache[name] = model.eval(), str(file)
        return cache[name]

    return get


def pretrained(name, file, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": file}, **kwargs)


# --- the registry ----------------------------------------------------------------------------------------------------


def test_registration_leaves_timm_as_it_was():
    code = """
import json, timm
from timm.models import _registry as r
def state():
    return {
        "resnet": timm.list_models(module="resnet"), "resnet tags": timm.list_models(module="resnet", pretrained=True),
        "convnext": timm.list_models(module="convnext"),
        "names": timm.list_models(), "tags": timm.list_models(pretrained=True), "modules": timm.list_modules(),
        "entry points": {n: f"{f.__module__}.{f.__name__}" for n, f in r._model_entrypoints.items()},
        "cfgs": {n: repr(c) for n, c in r._model_pretrained_cfgs.items()},
    }
before = state()
import timm_metricconv
print(json.dumps([before, state()]))
"""
    before, after = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    for key in ("resnet", "resnet tags", "convnext"):
        assert before[key] == after[key] and before[key]
    for key in ("entry points", "cfgs"):
        assert before[key].items() <= after[key].items()
    added = set(after["names"]) - set(before["names"])
    assert added == set(NAMES) and set(before["names"]) < set(after["names"])
    assert {name.split(".")[0] for name in set(after["tags"]) - set(before["tags"])} == set(NAMES)
    assert set(after["modules"]) - set(before["modules"]) == {"ball_resnet", "ball_convnext"}


@pytest.mark.slow
def test_scripts_of_timm_know_our_models_and_so_do_their_children(tmp_path):
    script = tmp_path / "bulk.py"
    script.write_text(
        "import subprocess, sys, timm, helper\n"
        "print(sys.argv[1:], timm.is_model('resnet18_metric'), flush=True)\n"
        "if len(sys.argv) == 2: subprocess.run([sys.executable, __file__], check=True)\n"
    )
    (tmp_path / "helper.py").touch()  # a script finds what stands beside it
    command = [sys.executable, "-m", "timm_metricconv.run"]
    ran = subprocess.run([*command, str(script), "--all"], capture_output=True, text=True)
    assert ran.stdout.splitlines() == ["['--all'] True", "[] True"], ran.stderr
    refused = subprocess.run([*command, "--model"], capture_output=True, text=True)
    assert (refused.returncode, refused.stderr) == (2, "expected the path of a script, got --model\n")


@names
def test_tags_are_timms(name):
    size, family = name.rsplit("_", 1)
    tags = [name.split(".")[1] for name in timm.list_models(f"{size}.*", pretrained=True)]
    assert [n.split(".")[1] for n in timm.list_models(f"{size}_{family}.*", pretrained=True)] == tags and tags
    ours, theirs = get_pretrained_cfg(f"{size}_{family}"), get_pretrained_cfg(size)
    assert ours.tag == theirs.tag
    for tag in tags:
        ours, theirs = get_pretrained_cfg(f"{size}_{family}.{tag}"), get_pretrained_cfg(f"{size}.{tag}")
        assert ours.hf_hub_id == theirs.hf_hub_id == f"timm/{size}.{tag}" and not ours.url
        same = ("mean", "std", "input_size", "interpolation", "crop_pct", "num_classes", "first_conv", "classifier")
        assert all(getattr(ours, key) == getattr(theirs, key) for key in same)
    # a tag without weights is one for us, too
    assert timm.is_model_pretrained(f"{size}_{family}") == timm.is_model_pretrained(size)


@names
def test_parameters_are_the_standard_networks_and_predictors(name):
    size, family = name.rsplit("_", 1)
    ours, theirs = timm.create_model(name, device="meta"), timm.create_model(size, device="meta")
    assert isinstance(ours, BallResNet if "resnet" in name else BallConvNeXt) and all(
        p.is_meta for p in ours.parameters()
    )
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    predictors = {key for key in shapes if ".predictor." in key}
    assert {key: shape for key, shape in shapes.items() if key not in predictors} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    replaced = {
        key
        for key, module in theirs.named_modules()
        if isinstance(module, nn.Conv2d)
        and key.startswith(("layer2", "layer3", "layer4", "stages"))
        and module.kernel_size == ((3, 3) if "resnet" in name else (7, 7))
    }
    convs = ball_convs(ours)
    assert set(convs) == replaced and all(type(conv) is LAYERS[family] for conv in convs.values())
    parts = ("weight", "bias") if "resnet" in name else ("0.weight", "1.weight", "1.bias")
    assert predictors == {f"{key}.predictor.{part}" for key in replaced for part in parts}


@pytest.mark.parametrize("size", CONVNEXTS)
def test_predictors_of_a_metric_convnext_are_light(size):
    """Less than a tenth of the network, with 16 channels or a few more in each group."""
    model = timm.create_model(f"{size}_metric", device="meta")
    added = sum(p.numel() for key, p in model.named_parameters() if ".predictor." in key)
    standard = sum(p.numel() for p in model.parameters()) - added
    assert 0 < added < 0.1 * standard
    row = f"| {size.removeprefix('convnext_')} | {standard:,} | {added:,} ({added / standard:.1%}) |"
    assert size == "test_convnext" or row in PAGE.read_text()
    for conv in ball_convs(model).values():
        assert conv.metric_groups == metric_groups(conv.in_channels)
        assert 16 <= conv.in_channels / conv.metric_groups < 32
        assert conv.groups == conv.in_channels and conv.kernel_size == (7, 7)


def test_metric_groups():
    expected = {96: 6, 768: 48, 1024: 64, 40: 2, 80: 5, 48: 3, 24: 1, 7: 1, 34: 2}
    assert {channels: metric_groups(channels) for channels in expected} == expected


# --- timm's generic tests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SMALL, "resnet18_shifted", "resnet50_deform", "convnext_atto_metric"])
def test_forward(name):
    model = create(name).eval()
    x = torch.randn(1, 3, 64, 96)
    out = model(x)
    assert out.shape == (1, 1000) and out.isfinite().all()
    assert torch.equal(model.forward_head(model.forward_features(x)), out)


@small
def test_backward_reaches_every_parameter(name):
    # the depthwise part of ConvNeXt's predictors learns as soon as the 1×1 behind it is not zero
    arguments = {"zero_init_last": False, "bent": False} if "resnet" in name else {"ls_init_value": 1.0}
    model = create(name, num_classes=42, **arguments).train()
    out = model(torch.randn(2, 3, 64, 64))
    out.square().mean().backward()
    assert out.shape == (2, 42)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@small
def test_default_cfg(name):
    model = create(name).eval()
    cfg = model.default_cfg
    x = torch.randn(1, *cfg["input_size"])
    with torch.no_grad():
        assert tuple(model.forward_features(x).shape[-2:]) == tuple(cfg["pool_size"])
        assert {f"{cfg['classifier']}.weight", f"{cfg['first_conv']}.weight"} <= set(model.state_dict())
        model.reset_classifier(0)
        assert model(x).shape == (1, model.num_features)
        model.reset_classifier(0, "")
        assert tuple(model(x).shape[-2:]) == tuple(cfg["pool_size"])
        model.reset_classifier(7, "max")
        assert model(x).shape == (1, 7) and model.get_classifier().out_features == 7


@tiny
def test_no_classifier(name):
    model = create(name, num_classes=0).eval()
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, model.num_features)


REDUCTIONS = [
    *(
        (name, arguments, reductions)
        for name in ("test_resnet_metric", "resnet18_deform")
        for arguments, reductions in (
            ({}, [2, 4, 8, 16, 32]),
            ({"output_stride": 16}, [2, 4, 8, 16, 16]),
            ({"layout": "paper"}, [2, 4, 8, 16, 16]),
            ({"stem": "cifar"}, [1, 1, 2, 4, 8]),
            ({"stem": "cifar", "layout": "paper"}, [1, 1, 2, 4, 4]),
        )
    ),
    ("test_convnext_metric", {}, [4, 8, 16, 32]),
    ("test_convnext_metric", {"output_stride": 8}, [4, 8, 8, 8]),
    ("test_convnext_deform", {"patch_size": 2}, [4, 8, 16, 32]),  # its first stage halves the image, too
]


@pytest.mark.parametrize(("name", "arguments", "reductions"), REDUCTIONS)
def test_features(name, arguments, reductions):
    torch.manual_seed(2)
    model = create(name, features_only=True, **arguments).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = model(x)
        assert model.feature_info.reduction() == reductions
        assert model.feature_info.channels() == [f.shape[1] for f in features]
        assert [f.shape[-2:] for f in features] == [(64 // r, 96 // r) for r in reductions]
        chosen = timm.create_model(name, features_only=True, out_indices=(1, -1), **arguments)
        assert chosen.feature_info.reduction() == [reductions[1], reductions[-1]]
        torch.manual_seed(2)
        whole = create(name, **arguments).eval()
        final, intermediates = whole.forward_intermediates(x)
        for one, other in zip(features, intermediates, strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(final, whole.forward_features(x))
        (last,) = whole.forward_intermediates(x, indices=[2], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(last, features[2])


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx", "getter"])
@pytest.mark.parametrize("size", ["test_resnet", "test_convnext"])
def test_feature_cfg(size, feature_cls):
    arguments = {"features_only": True, "feature_cfg": {"feature_cls": feature_cls, "out_indices": (1, 3)}}
    x = torch.randn(1, 3, 64, 64)
    ours = create(f"{size}_metric", **arguments).eval()(x)
    theirs = timm.create_model(size, features_only=True, feature_cls=feature_cls, out_indices=(1, 3)).eval()(x)
    shapes = [[f.shape for f in (fs.values() if isinstance(fs, dict) else fs)] for fs in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
@small
@pytest.mark.parametrize("features_only", [False, True])
def test_torchscript(name, features_only):
    with set_scriptable(True):
        model = create(name, features_only=features_only).eval()
    scripted = torch.jit.script(model)
    x = torch.randn(1, 3, 64, 64)
    for actual, expected in zip(scripted(x), model(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@tiny
def test_trace(name):
    model = create(name).eval()
    traced = torch.jit.trace(model, torch.randn(1, 3, 64, 64))
    x = torch.randn(2, 3, 96, 64)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


@small
def test_fx(name):
    model = create(name).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, intermediates_only=True)
    nodes = {info["module"]: str(i) for i, info in enumerate(model.feature_info)}
    for actual, value in zip(create_feature_extractor(model, nodes)(x).values(), expected, strict=True):
        torch.testing.assert_close(actual, value)
    for actual, value in zip(FeatureGraphNet(model, range(len(nodes)))(x), expected, strict=True):
        torch.testing.assert_close(actual, value)


@small
def test_grad_checkpointing(name):
    model = create(name).train()
    x = torch.randn(2, 3, 64, 64)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        out = model(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    assert all(module.grad_checkpointing for module in ([model] if "resnet" in name else model.stages))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@small
def test_parameter_groups(name):
    """A predictor belongs to the block of its kernel; layer decay takes every parameter once."""
    model = timm.create_model(name, device="meta")
    for coarse in (False, True):
        group_of = {key: g for g, keys in group_parameters(model, model.group_matcher(coarse)).items() for key in keys}
        assert set(group_of) == {key for key, _ in model.named_parameters()}
        for key, conv in ball_convs(model).items():
            parts = {f"{key}.{part}" for part, _ in conv.named_parameters()}
            assert len(parts) > 2 and {group_of[part] for part in parts} == {group_of[f"{key}.weight"]}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    parameters = [id(p) for group in groups for p in group["params"]]
    assert sorted(parameters) == sorted(id(p) for p in model.parameters())
    assert len({group["lr_scale"] for group in groups}) > 4


@tiny
@pytest.mark.parametrize("output_stride", [8, 16])
def test_output_stride(name, output_stride):
    model = create(name, output_stride=output_stride).eval()
    assert model.forward_features(torch.randn(1, 3, 64, 64)).shape[-1] == 64 // output_stride


@pytest.mark.slow
@tiny
def test_other_arguments_of_timms_networks(name):
    model = create(name, in_chans=5, drop_path_rate=0.5, drop_rate=0.1, num_classes=3, global_pool="avgmax").train()
    assert sum(type(m).__name__ == "DropPath" for m in model.modules()) >= 3
    x = torch.randn(8, 5, 64, 64)
    assert model(x).shape == (8, 3) and not torch.equal(model(x), model(x))
    model.eval()
    torch.testing.assert_close(model(x), model(x))
    own = {"block_args": {"attn_layer": "se"}} if "resnet" in name else {"conv_mlp": True, "kernel_sizes": (7, 5, 5, 3)}
    assert create(name, **own)(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


@tiny
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_argument(name, dtype):
    own = {"stem": "cifar"} if "resnet" in name else {"patch_size": 2}
    model = timm.create_model(name, dtype=dtype, device="cpu", **own).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(1, 3, 32, 32, dtype=dtype)).dtype == dtype
    conv = next(iter(ball_convs(model).values()))
    assert conv.positions(torch.randn(1, conv.in_channels, 8, 8, dtype=dtype)).dtype == torch.promote_types(
        dtype, torch.float32
    )


@tiny
def test_copies(name):
    model = create(name).eval()
    x = torch.randn(1, 3, 64, 64)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


ARGUMENTS = {
    "resnet": [
        {},
        {"num_classes": 7, "in_chans": 1, "stem": "cifar"},
        {"stages": [3], "conv_cfg": {"fixed_kernel": True, "modulated": True}},
        {"conv_cfg": {"ball": "geodesic", "steps": 2}},
        {"stem": "cifar", "num_classes": 10, **PAPER},
    ],
    "convnext": [
        {},
        {"num_classes": 7, "in_chans": 1, "patch_size": 2},
        {"stages": [3], "conv_cfg": {"fixed_kernel": True, "modulated": "unbounded", "separable_predictor": False}},
        {"num_classes": 10, "conv_cfg": {"metric_groups": 2, "parametrization": "spectral"}},
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"), [(name, arguments) for name in TINY for arguments in ARGUMENTS[name.split("_")[1]]]
)
def test_hub_folder_keeps_the_arguments(name, arguments, tmp_path):
    """`save_for_hf`, then `local-dir:` without any argument: the same network, and its config.json is JSON."""
    model = create(name, **arguments).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == name
    kept = {"num_classes": config["num_classes"], "in_chans": config["pretrained_cfg"]["input_size"][0]}
    assert json.loads(json.dumps(arguments)).items() <= (config.get("model_args", {}) | kept).items()
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, arguments.get("in_chans", 3), 64, 64)
    assert torch.equal(other(x), model(x))
    assert [repr(conv) for conv in ball_convs(other).values()] == [repr(conv) for conv in ball_convs(model).values()]
    fewer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2).eval()
    torch.testing.assert_close(fewer.forward_features(x), model.forward_features(x))


def test_a_network_that_timms_factory_did_not_make_keeps_its_arguments(tmp_path):
    """Both parametrizations have six channels, so without `conv_cfg` the default one would take the checkpoint."""
    model = timm.models.model_entrypoint("test_resnet_metric")(conv_cfg={"parametrization": "spectral"}, stages=[3])
    save_for_hf(model, tmp_path, safe_serialization=True)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert [repr(conv) for conv in ball_convs(other).values()] == [repr(conv) for conv in ball_convs(model).values()]


def test_geodesic_network(checkpoint):
    """`conv_cfg` makes one: it starts as the standard network does, and TorchScript says the same once it is bent."""
    standard, file = checkpoint("test_resnet")
    with set_scriptable(True):
        model = pretrained("test_resnet_metric", file, conv_cfg={"ball": "geodesic", "steps": 2}).eval()
    assert {(layer.ball, layer.steps) for layer in ball_convs(model).values()} == {("geodesic", 2)}
    x = torch.randn(2, 3, 64, 64)
    expected = standard(x)
    assert (model(x) - expected).abs().max() < 1e-4 * expected.abs().max()
    for layer in ball_convs(model).values():
        nn.init.normal_(layer.predictor.weight, std=0.3 * layer.predictor.weight[0].numel() ** -0.5)
    assert (model(x) - expected).abs().max() > 1e-2 * expected.abs().max()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-3, atol=1e-4)


# --- warm start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [*TINY, *(f"resnet18_{family}" for family in FAMILIES), "resnet50_metric", "convnext_atto_metric"]
)
def test_starts_as_the_standard_network(name, checkpoint):
    """In eval mode, and in train mode with the statistics it leaves behind."""
    standard, file = checkpoint(name.rsplit("_", 1)[0])
    standard, model = copy.deepcopy(standard), pretrained(name, file).eval()
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        expected = standard(x)
        assert (model(x) - expected).abs().max() < 1e-4 * expected.abs().max()
        expected = standard.train()(x)
        assert (model.train()(x) - expected).abs().max() < 1e-4 * expected.abs().max()
    statistics = dict(model.named_buffers())
    for key, value in standard.named_buffers():
        torch.testing.assert_close(statistics[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "arguments", [{"output_stride": 8}, {"in_chans": 1}, {"num_classes": 5}, {"num_classes": 0}, {"in_chans": 5}]
)
@backbones
def test_weights_are_adapted_as_timm_adapts_them(arguments, size, checkpoint):
    _, file = checkpoint(size)
    standard = pretrained(size, file, **arguments).eval()
    model = pretrained(f"{size}_metric", file, **arguments).eval()
    x = torch.randn(1, arguments.get("in_chans", 3), 64, 64)
    torch.testing.assert_close(model.forward_features(x), standard.forward_features(x), rtol=1e-4, atol=1e-4)
    assert model(x).shape == standard(x).shape


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_cifar_stem_starts_untrained_and_says_so(in_chans, checkpoint, caplog):
    standard, file = checkpoint("resnet18")
    with caplog.at_level(logging.WARNING):
        model = pretrained("resnet18_metric", file, stem="cifar", in_chans=in_chans, num_classes=10)
    assert any('stem="cifar"' in r.message and "conv1.weight" in r.message for r in caplog.records)
    assert model.conv1.weight.shape == (64, in_chans, 3, 3) and model.conv1.weight.std() > 0.03
    assert torch.equal(model.layer3[0].conv1.weight, standard.layer3[0].conv1.weight)
    assert model.eval()(torch.randn(1, in_chans, 32, 32)).shape == (1, 10)


def authors_names(state_dict, family):
    kernel, predictor = ".deform_conv2d.weight", ".conv_offsets."
    if family == "metric":
        kernel, predictor = ".ker", ".intermediate_Mw."
    convs = {key.split(".predictor.")[0] for key in state_dict if ".predictor." in key}
    return {
        (key.removesuffix(".weight") + kernel if key.removesuffix(".weight") in convs else key).replace(
            ".predictor.", predictor
        ): value
        for key, value in state_dict.items()
    }


@families
def test_authors_checkpoint(family, tmp_path):
    arguments = {"stem": "cifar", "num_classes": 10, **PAPER}
    model = create(f"resnet18_{family}", **arguments).eval()
    state_dict = authors_names(model.state_dict(), family)
    assert not any(".predictor." in key for key in state_dict)
    torch.save(state_dict, tmp_path / "authors.pth")
    x = torch.randn(1, 3, 32, 32)
    # the classes of a checkpoint are those of its configuration
    overlay = {"file": str(tmp_path / "authors.pth"), "num_classes": 10}
    other = timm.create_model(f"resnet18_{family}", pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()
    assert torch.equal(other(x), model(x))


def facebooks_names(state_dict):
    """The names of the ConvNeXt authors, whose linear layers are matrices."""
    renames = ((r"^stem\.", "downsample_layers.0."), (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."))
    renames += ((r"\.blocks\.", "."), (r"conv_dw\.", "dwconv."), (r"mlp\.fc", "pwconv"))
    renames += ((r"^head\.fc\.", "head."), (r"^head\.norm\.", "norm."))
    renamed = {}
    for key, value in state_dict.items():
        for pattern, name in renames:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_facebooks_checkpoint(conv_mlp):
    """timm's own filter converts the names of the ConvNeXt authors; what it cannot convert is refused by name."""
    standard = trained("test_convnext", conv_mlp=conv_mlp).eval()
    model = timm.create_model("test_convnext_metric", conv_mlp=conv_mlp).eval()
    linear = {key: value.flatten(1) if "mlp.fc" in key and value.dim() > 1 else value
              for key, value in standard.state_dict().items()}  # fmt: skip
    theirs = facebooks_names(linear)
    assert "stages.1.0.pwconv1.weight" in theirs and "downsample_layers.1.1.bias" in theirs
    model.load_state_dict(ball_convnext.checkpoint_filter_fn({"model": dict(theirs)}, model))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), standard(x), rtol=1e-4, atol=1e-4)
    for key in ("stages.1.0.gate.weight", "stages.9.0.gamma"):
        with pytest.raises(
            RuntimeError, match=f"does not fit BallConvNeXt.*unknown: {key.replace('.0.', '.blocks.0.')}"
        ):
            ball_convnext.checkpoint_filter_fn({**theirs, key: torch.zeros(3, 3)}, model)


def drop(key):
    return lambda state_dict: state_dict.pop(key)


def put(key, *shape):
    return lambda state_dict: state_dict.update({key: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("size", "change", "message"),
    [
        ("test_resnet", drop("layer1.0.conv1.weight"), "missing: layer1.0.conv1.weight"),
        ("test_resnet", drop("layer2.0.conv1.weight"), "missing: layer2.0.conv1.weight"),
        ("test_resnet", drop("layer2.0.conv1.predictor.bias"), "missing: layer2.0.conv1.predictor.bias"),
        ("test_resnet", put("layer5.0.conv1.weight", 3), "unknown: layer5.0.conv1.weight"),
        (
            "test_resnet",
            put("layer2.0.bn1.weight", 3),
            r"of another shape: layer2.0.bn1.weight \(expected \(48,\), came",
        ),
        ("test_resnet", put("layer2.0.conv1.predictor.weight", 7, 32, 3, 3), "shape: layer2.0.conv1.predictor.weight"),
        ("test_resnet", put("conv1.0.weight", 16, 3, 7, 7), "of another shape: conv1.0.weight"),
        ("test_convnext", drop("stages.1.blocks.0.conv_dw.weight"), "missing: stages.1.blocks.0.conv_dw.weight"),
        ("test_convnext", drop("stages.1.blocks.0.conv_dw.predictor.1.bias"), "missing: .*conv_dw.predictor.1.bias"),
        ("test_convnext", drop("head.norm.weight"), "missing: head.norm.weight"),
        ("test_convnext", put("stages.1.blocks.0.mlp.grn.weight", 3), "unknown: stages.1.blocks.0.mlp.grn.weight"),
        ("test_convnext", put("stages.0.blocks.0.gamma", 3), r"of another shape: stages.0.blocks.0.gamma \(expected"),
        ("test_convnext", put("stem.0.weight", 24, 3, 7, 7), "of another shape: stem.0.weight"),
    ],
)
def test_misfit_is_refused_by_name(size, change, message, tmp_path):
    model = create(f"{size}_metric")
    state_dict = model.state_dict()
    change(state_dict)
    save_file(state_dict, tmp_path / "misfit.safetensors")
    with pytest.raises(RuntimeError, match=message):
        checkpoint_filter_fn(dict(state_dict), model)
    with pytest.raises(RuntimeError, match=message):
        pretrained(f"{size}_metric", str(tmp_path / "misfit.safetensors"))


@backbones
def test_a_standard_checkpoint_loads_by_path(size, checkpoint, tmp_path):
    """timm has no filter there: what a whole checkpoint lacks of ours is kept, and a broken one is refused."""
    (standard, file), x = checkpoint(size), torch.randn(1, 3, 64, 64)
    model = timm.create_model(f"{size}_metric", checkpoint_path=file).eval()
    torch.testing.assert_close(model(x), standard(x), rtol=1e-4, atol=1e-4)
    layer = next(name for name, module in model.named_modules() if isinstance(module, BallConv2d))
    predictor = next(key for key in model.state_dict() if key.startswith(f"{layer}.predictor"))
    for key in (predictor, f"{layer}.weight"):
        state = model.state_dict()
        del state[key]
        save_file(state, tmp_path / "broken.safetensors")
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            timm.create_model(f"{size}_metric", checkpoint_path=str(tmp_path / "broken.safetensors"))


def test_a_standard_checkpoint_loads_into_a_converted_network(checkpoint):
    (standard, _), x = checkpoint("test_resnet"), torch.randn(1, 3, 64, 64)
    model = copy.deepcopy(nn.ModuleDict({"body": timm.create_model("test_resnet")}))
    convert(model["body"].layer2, "active")
    model.load_state_dict({f"body.{key}": value for key, value in standard.state_dict().items()})
    torch.testing.assert_close(model["body"].eval()(x), standard(x), rtol=1e-4, atol=1e-4)


def test_a_prefix_is_named():
    state = {f"model.{key}": value for key, value in timm.create_model("test_resnet").state_dict().items()}
    with pytest.raises(RuntimeError, match=r"Remove 'model\.' from its keys"):
        checkpoint_filter_fn(state, create("test_resnet_metric"))


def test_a_checkpoint_of_older_torch_has_no_counters(tmp_path):
    """nn.BatchNorm2d loads it, and so does timm."""
    standard = timm.create_model("test_resnet")
    old = {k: v for k, v in standard.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(old, tmp_path / "old.safetensors")
    model, x = pretrained("test_resnet_metric", str(tmp_path / "old.safetensors")).eval(), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), standard.eval()(x), rtol=1e-4, atol=1e-4)


def test_another_family_is_refused():
    with pytest.raises(RuntimeError, match=r"predictor\.weight \(expected \(2, .*came \(6, "):
        checkpoint_filter_fn(create("test_resnet_metric").state_dict(), create("test_resnet_shifted"))
    with pytest.raises(RuntimeError, match=r"predictor\.1\.weight \(expected \(98, .*came \(6, "):
        checkpoint_filter_fn(create("test_convnext_metric").state_dict(), create("test_convnext_deform"))


@backbones
def test_filter_leaves_the_given_state_dict(size):
    state_dict = timm.create_model(size).state_dict()
    keys = list(state_dict)
    checkpoint_filter_fn(state_dict, create(f"{size}_metric"))
    assert list(state_dict) == keys


@backbones
def test_a_checkpoint_without_a_classifier_is_refused(size, tmp_path):
    state_dict = {
        k: v for k, v in create(f"{size}_metric").state_dict().items() if "fc." not in k.removeprefix("head.")[:3]
    }
    save_file(state_dict, tmp_path / "headless.safetensors")
    with pytest.raises(RuntimeError, match=r"fc\.weight"):
        pretrained(f"{size}_metric", str(tmp_path / "headless.safetensors"))


# --- the paper's network ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", ["resnet18", "resnet50"])
@families
def test_papers_network(family, size):
    """The paper's layout, written out: the last stage keeps its resolution, its later predictors have dilation 2."""
    model = timm.create_model(f"{size}_{family}", stem="cifar", num_classes=10, **PAPER)
    conv1 = model.conv1
    assert (conv1.kernel_size, conv1.stride, conv1.padding, conv1.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert isinstance(model.maxpool, nn.Identity) and not ball_convs(model.layer1)
    convs = ("conv2",) if size == "resnet50" else ("conv1", "conv2")
    blocks = (4, 6, 3) if size == "resnet50" else (2, 2, 2)
    expected = {}
    for stage, count in zip((2, 3, 4), blocks, strict=True):
        for block in range(count):
            for conv in convs:
                stride = 2 if stage < 4 and block == 0 and conv == convs[0] else 1
                expected[f"layer{stage}.{block}.{conv}"] = (stride, 2 if stage == 4 and block > 0 else 1)
    layers = ball_convs(model)
    assert {key: (conv.stride[0], conv.predictor.dilation[0]) for key, conv in layers.items()} == expected
    shortcuts = {key: m.stride for key, m in model.named_modules() if key.endswith("downsample.0") and key > "layer2"}
    assert shortcuts == {f"layer{s}.0.downsample.0": (2, 2) if s < 4 else (1, 1) for s in (2, 3, 4)}
    for conv in layers.values():
        assert conv.predictor.stride == conv.stride
        assert conv.predictor.padding == conv.predictor.dilation == conv.dilation
        torch.testing.assert_close(conv.weight, torch.full_like(conv.weight, 1 / conv.weight[0].numel()))
        assert not conv.predictor.bias.any()
        if isinstance(conv, MetricConv2d):
            assert (conv.parametrization, conv.drift) == ("spectral_scale", "sigmoid_norm_detach")
            assert (conv.pattern, conv.eps_omega, conv.scale) == ("onion", 0.5, (0.1, 1.5))
            rows, own = conv.predictor.weight[2:], conv.predictor.weight[:2]
            assert torch.equal(rows, torch.full_like(rows, 1e-6))
            # nn.Conv2d's, not the Kaiming that timm's ResNet runs over every convolution
            assert own.abs().max() <= own[0].numel() ** -0.5
        else:
            assert torch.equal(conv.predictor.weight, torch.full_like(conv.predictor.weight, 1e-6))
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape[-1] == 8


def test_papers_arguments_are_json():
    arguments = json.loads(json.dumps(PAPER))
    one, other = (timm.create_model("test_resnet_metric", **a) for a in (PAPER, arguments))
    assert repr(one) == repr(other)
    assert isinstance(PAPER["conv_cfg"], dict) and "onion" in repr(one)


@tiny_resnets
def test_init_weights_restores_the_identity(name):
    """And starts everything else anew, as it does timm's network."""
    model, standard = create(name), timm.create_model("test_resnet", num_classes=10)
    for parameter in (*model.parameters(), *standard.parameters()):
        nn.init.constant_(parameter, 7.0)
    model.init_weights()
    standard.init_weights()
    left = {key for key, value in standard.named_parameters() if (value == 7).any()}  # timm's leaves biases alone
    assert {key for key, value in model.named_parameters() if (value == 7).any()} == left
    for key, conv in ball_convs(model).items():
        assert not conv.predictor.weight.any() and not conv.predictor.bias.any()
        spread = standard.get_submodule(key).weight.std()
        assert abs(conv.weight.std() / spread - 1) < 0.1, key


# --- arguments -------------------------------------------------------------------------------------------------------


def test_stages():
    assert not ball_convs(timm.create_model("test_resnet_metric", stages=()))
    model = timm.create_model("test_resnet_metric", stages=[1, 3])
    assert {key[:6] for key in ball_convs(model)} == {"layer1", "layer3"}
    assert not ball_convs(timm.create_model("test_convnext_metric", stages=()))
    model = timm.create_model("test_convnext_metric", stages=[1, 3])
    assert {key[:8] for key in ball_convs(model)} == {"stages.0", "stages.2"} and len(ball_convs(model)) == 1 + 4


@pytest.mark.parametrize("conv", [conv for conv in LAYERS if conv not in ("metric", "deform")])
def test_convnext_takes_every_convolution(conv):
    model, x = timm.create_model("test_convnext_metric", conv=conv).eval(), torch.randn(1, 3, 32, 32)
    assert {type(layer) for layer in ball_convs(model).values()} == {LAYERS[conv]}
    assert model(x).isfinite().all()


@backbones
def test_one_conv_cfg_serves_all_families(size):
    arguments = {"conv_cfg": {"eps_omega": 0.1, "max_offset": 2.0, "fixed_kernel": True, "init": "paper"}}
    metric, deform = (timm.create_model(f"{size}_{f}", **arguments) for f in ("metric", "deform"))
    assert {conv.eps_omega for conv in ball_convs(metric).values()} == {0.1}
    for model in (metric, deform):
        assert all(conv.fixed_kernel and conv.init == "paper" for conv in ball_convs(model).values())
    assert all(isinstance(conv, DeformConv2d) for conv in ball_convs(deform).values())
    assert arguments["conv_cfg"]["eps_omega"] == 0.1  # not changed in place


@pytest.mark.parametrize("conv", LAYERS)
def test_conv_cfg_keeps_what_a_layer_takes_and_what_none_does(conv):
    """A new argument of one layer must not stop the networks of the others, and a misspelt one stops all."""
    every = dict.fromkeys(key for layer in LAYERS.values() for key in inspect.signature(layer).parameters)
    taken = inspect.signature(LAYERS[conv]).parameters
    assert layer_arguments(conv, {**every, "eps": 1}).keys() == {*taken, "eps"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"stem": "cifra"}, ValueError, "stem='cifra': expected 'imagenet' or 'cifar'"),
        ({"layout": "papers"}, ValueError, "layout='papers': expected 'timm' or 'paper'"),
        ({"stages": [5]}, ValueError, r"stages=\[5\]"),
        ({"stages": 3}, ValueError, "stages=3"),
        ({"stages": [3.0]}, ValueError, r"stages=\[3.0\]"),
        ({"layout": "paper", "output_stride": 8}, ValueError, "output_stride=8"),
        ({"conv_cfg": {"eps": 0.1}}, TypeError, "eps"),
        ({"conv_cfg": {"drift": "none"}}, ValueError, "drift='none'"),
        ({"conv": "metrics"}, ValueError, "conv='metrics'.*metric, deform"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("test_resnet_metric", **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"stem": "cifar"}, TypeError, "stem"),
        ({"stages": [0]}, ValueError, r"stages=\[0\]"),
        ({"stages": 3}, ValueError, "stages=3"),
        ({"conv_cfg": {"eps": 0.1}}, TypeError, "eps"),
        ({"conv_cfg": {"metric_groups": 5}}, ValueError, "metric_groups=5: must divide in_channels=24"),
        ({"conv": "metrics"}, ValueError, "conv='metrics'.*metric, deform"),
    ],
)
def test_bad_arguments_of_convnext(arguments, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("test_convnext_metric", **arguments)
