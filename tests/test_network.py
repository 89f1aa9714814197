"""Networks from configurations: what they start from, what is frozen, which checkpoints fit."""

import pytest
import timm
import torch
from safetensors.torch import save_file

pytest.importorskip("accelerate", reason="needs the extra [recipes]")

from timm_metricconv import convert
from timm_metricconv.recipes.config import ConfigError
from timm_metricconv.recipes.network import (
    NetworkConfig,
    adaptive_layers,
    build_model,
    create_model,
    is_predictor,
    load_checkpoint,
    parameter_counts,
)

KERNEL = "layer3.0.conv2.weight"


@pytest.fixture(scope="module")
def standard(tmp_path_factory):
    """A trained standard network: every tensor of its own, and the file."""
    torch.manual_seed(1)
    state = {
        key: torch.rand_like(value.float()) for key, value in timm.create_model("test_resnet").state_dict().items()
    }
    path = tmp_path_factory.mktemp("standard") / "model.safetensors"
    save_file(state, path)
    return state, str(path)


@pytest.mark.parametrize("conv", ["metric", "deform", "shifted"])
@pytest.mark.parametrize("fixed", [False, True])
def test_uniform_kernels_in_a_loaded_network(standard, conv, fixed):
    """The paper's transfer: the adaptive kernels are 1/(k²·C_in), everything else but the classifier is as loaded."""
    state, path = standard
    start = {"checkpoint": path, "kernel_start": "uniform", "fixed_kernel": fixed}
    model = build_model(NetworkConfig(model=f"test_resnet_{conv}", **start), 7)
    kernels = {id(layer.weight) for layer in adaptive_layers(model)}
    assert len(kernels) == 5 and model.num_classes == 7
    for name, parameter in model.named_parameters():
        if id(parameter) in kernels:
            assert torch.equal(parameter, torch.full_like(parameter, 1 / parameter[0].numel())), name
            assert parameter.sum((1, 2, 3)).allclose(torch.ones(len(parameter)))
        elif not (is_predictor(name) or name.startswith("fc.")):
            assert torch.equal(parameter, state[name]), name
        assert parameter.requires_grad != (fixed and id(parameter) in kernels)


def test_the_kernels_of_a_standard_network_by_name(standard):
    """What a comparison freezes in the standard network: the layers that are adaptive in the others."""
    start = {"checkpoint": standard[1], "kernel_start": "uniform", "fixed_kernel": True, "kernels": ["layer3.0.conv2"]}
    model = build_model(NetworkConfig(model="test_resnet", **start))
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [KERNEL]
    assert torch.equal(model.layer3[0].conv2.weight, torch.full_like(model.layer3[0].conv2.weight, 1 / (9 * 48)))
    assert torch.equal(model.layer3[0].conv1.weight, standard[0]["layer3.0.conv1.weight"])


def test_the_filter_belongs_to_the_module_of_the_network(standard, monkeypatch):
    """timm's convention, so another family of ours, or of timm's, needs no word here."""
    state, path = standard
    model = create_model("test_resnet_metric", {})
    load_checkpoint(model, path)
    assert torch.equal(model.fc.weight, state["fc.weight"]) and torch.equal(model.get_parameter(KERNEL), state[KERNEL])

    from timm.models import convnext

    calls, theirs = [], convnext.checkpoint_filter_fn
    monkeypatch.setattr(convnext, "checkpoint_filter_fn", lambda *args: calls.append(args) or theirs(*args))
    other = create_model("test_convnext", {})
    torch.manual_seed(2)
    save_file(
        {key: torch.rand_like(value) for key, value in other.state_dict().items()}, f"{path}.convnext.safetensors"
    )
    load_checkpoint(other, f"{path}.convnext.safetensors", new_classifier=True)
    assert len(calls) == 1 and calls[0][1] is other


def test_a_strict_load_refuses(standard):
    with pytest.raises(ConfigError, match=r"checkpoint: .*layer1\.0\.bn1\.bias \(expected \(8,\), came \(32,\)\)"):
        load_checkpoint(create_model("test_resnet_metric", {"channels": (8, 8, 8, 8)}), standard[1])
    with pytest.raises(ConfigError, match=r"(?s)checkpoint: .*Missing key"):
        load_checkpoint(create_model("test_vit", {}), standard[1], new_classifier=True)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("resnet19_metric", {}, "model: resnet19_metric cannot be loaded: Unknown model"),
        (
            "test_resnet_metric",
            {"conv_cfg": {"drift": "wind"}},
            "model_args: .* refuses .*drift='wind'",
        ),
        ("test_resnet_metric", {"colour": 3}, "model_args: .*colour"),
        ("local-dir:nowhere", {}, "local-dir:nowhere"),
    ],
)
def test_refusals(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        create_model(name, arguments, pretrained=":" in name)


def test_counts():
    model = timm.create_model("test_resnet", num_classes=3)
    before = parameter_counts(model)
    layers = convert(model, "deform", "layer3.*").values()
    added = sum(parameter.numel() for layer in layers for parameter in layer.predictor.parameters())
    assert before["predictor_params"] == 0 and added > 0
    assert parameter_counts(model) == {"params": before["params"] + added, "predictor_params": added}


def test_a_folder_without_a_classifier_is_refused_in_one_line(tmp_path):
    """A segmentation run's model/, say."""
    (tmp_path / "config.json").write_text('{"encoder_name": "tu-resnet18"}')
    with pytest.raises(ConfigError, match=r"has no 'architecture' in its config\.json"):
        create_model(f"local-dir:{tmp_path}", {})
