"""Geometry of networks whose geometry is known."""

import json
import math
import re

import pytest
import timm
import torch
from torch import nn

pytest.importorskip("accelerate", reason="needs the extra [recipes]")

import timm_metricconv
from timm_metricconv import DeformConv2d, MetricConv2d, ShiftedConv2d
from timm_metricconv.recipes.data import DataConfig, make_datasets, make_loader
from timm_metricconv.recipes.diagnosis import (
    diagnose,
    first_not_finite,
    mean_diagnosis,
    plot_geometry,
    sample_images,
    strayed,
)

IMAGES = torch.linspace(-1, 1, 2 * 3 * 12 * 16).reshape(2, 3, 12, 16)


@pytest.mark.parametrize("kind", ["metric", "deform", "shifted"])
def test_an_untrained_network_rests(kind):
    model = timm.create_model(f"test_resnet_{kind}", stem="cifar").train()
    report = diagnose(model, torch.randn(2, 3, 16, 16))
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
    assert report and report == json.loads(json.dumps(report))
    assert set(report) == {name for name, m in model.named_modules() if isinstance(m, timm_metricconv.BallConv2d)}
    for numbers in report.values():
        assert numbers["displacement"] == pytest.approx(0, abs=1e-6)
        assert numbers["outside"] == numbers["outside_at_rest"] > 0
        if kind == "metric":
            assert numbers["anisotropy"] == pytest.approx(1, abs=1e-6) and numbers["asymmetry"] < 1e-5
        else:
            assert numbers["residual"] == pytest.approx(0, abs=1e-5)


def test_a_standard_network_has_no_geometry():
    assert diagnose(timm.create_model("test_resnet"), torch.randn(1, 3, 32, 32)) == {}


@pytest.mark.parametrize("layer", [DeformConv2d, ShiftedConv2d])
def test_a_known_offset(layer):
    """Every sample is moved by (dx, dy) = (4, −3): 5 pixels; what leaves a 12×16 image is counted by hand."""
    conv = layer(3, 4, 3)
    with torch.no_grad():
        conv.predictor.bias.copy_(torch.tensor([-3.0, 4.0]).repeat(len(conv.predictor.bias) // 2))
    numbers = diagnose(nn.Sequential(conv), IMAGES)["0"]
    assert numbers["displacement"] == pytest.approx(5) and numbers["displacement_std"] == pytest.approx(0, abs=1e-6)
    columns = sum(0 <= j + 4 + p < 16 for j in range(16) for p in (-1, 0, 1)) / 48
    rows = sum(0 <= i - 3 + p < 12 for i in range(12) for p in (-1, 0, 1)) / 36
    assert numbers["outside"] == pytest.approx(1 - columns * rows)
    assert numbers["outside_at_rest"] == pytest.approx(1 - (46 / 48) * (34 / 36))


@pytest.mark.parametrize("layer", [DeformConv2d, ShiftedConv2d])
def test_samples_that_leave_are_remarked_on(layer):
    """In one line with the layer, the share, the way and what bounds it; and not where they stay."""
    model = nn.Sequential(layer(3, 3, 3), layer(3, 4, 3))
    assert strayed(model, diagnose(model, IMAGES)) is None
    torch.nn.init.constant_(model[1].predictor.bias, 12.0)
    line = strayed(model, diagnose(model, IMAGES))
    assert re.fullmatch(
        r"1: \d+% of .* \(9% at rest\), 17\.0 pixels .*--model_args\.conv_cfg\.max_offset bounds .*", line
    )
    model[1] = layer(3, 4, 3, max_offset=1.0)
    torch.nn.init.constant_(model[1].predictor.bias, 12.0)
    assert strayed(model, diagnose(model, IMAGES)) is None


def test_the_first_layer_that_is_not_finite():
    model = timm.create_model("test_resnet_metric")
    assert first_not_finite(model, torch.randn(2, 3, 32, 32)) is None
    model.layer3[0].conv2.predictor.bias.data[1] = float("nan")
    assert first_not_finite(model, torch.randn(2, 3, 32, 32)) == "layer3.0.conv2.predictor"
    assert not any(module._forward_hooks for module in model.modules())


def test_stride_padding_and_dilation_count():
    """The centres of an unpadded layer with stride lie such that no sample at rest is outside."""
    conv = DeformConv2d(3, 4, 3, stride=(2, 3), padding=0, dilation=(2, 1))
    assert diagnose(nn.Sequential(conv), IMAGES)["0"]["outside_at_rest"] == 0
    padded = DeformConv2d(3, 4, 3, stride=2, padding=(0, 2))
    # 9 centres at −1, 1, …, 15 of 16 columns: −2, −1 and 16 are outside
    assert diagnose(nn.Sequential(padded), IMAGES)["0"]["outside_at_rest"] == pytest.approx(3 / 27)


def test_a_known_metric():
    """A constant metric: anisotropy sqrt(λ_max / λ_min), asymmetry ‖ω‖_{M⁻¹}, the displacement of its own positions."""
    conv = MetricConv2d(3, 4, 3, parametrization="logspd", drift="whitened", eps_omega=0.25)
    with torch.no_grad():
        conv.predictor.bias.copy_(torch.tensor([0.2, 0.3, -0.4, 0.6, 0.8]))
    numbers = diagnose(nn.Sequential(conv), IMAGES)["0"]
    metric = conv.metric(IMAGES)[0][0, :, :, 0, 0].double()
    values = torch.linalg.eigvalsh(metric)
    assert numbers["anisotropy"] == pytest.approx((values[1] / values[0]).sqrt().item(), rel=1e-4)
    assert numbers["asymmetry"] == pytest.approx(0.75 / math.sqrt(2), rel=1e-4)  # ‖v‖ = 1
    moved = conv.positions(IMAGES)[0, :, :, 0, 0] - conv.points.reshape(-1, 2)
    assert numbers["displacement"] == pytest.approx(moved.norm(dim=-1).mean().item(), rel=1e-4)
    assert numbers["anisotropy_std"] == pytest.approx(0, abs=1e-4) and "residual" not in numbers


def test_residual_tells_a_metric_from_no_metric():
    """Offsets that are those of a metric leave nothing; random ones leave much."""
    ball, conv = MetricConv2d(3, 4, 3, parametrization="logspd", sampling="rays"), DeformConv2d(3, 4, 3)
    with torch.no_grad():
        ball.predictor.bias.copy_(torch.tensor([0.2, 0.3, -0.4, 0.6, 0.8]))
        offsets = ball.positions(IMAGES)[0, :, :, 0, 0] - ball.points.reshape(-1, 2)
        conv.predictor.bias.copy_(offsets.flip(-1).flatten())
        explained = diagnose(nn.Sequential(conv), IMAGES)["0"]["residual"]
        conv.predictor.bias.copy_(torch.randn(18))
        assert explained < 1e-3 < 0.05 < diagnose(nn.Sequential(conv), IMAGES)["0"]["residual"]


def test_what_of_a_deformable_layer_is_affine():
    """Offsets that a frame and a wind explain leave no rest; at random two thirds are left."""
    ball, conv = MetricConv2d(3, 4, 3), DeformConv2d(3, 4, 3)
    with torch.no_grad():
        ball.predictor.bias.copy_(torch.tensor([0.2, 0.3, -0.4, 0.6, 0.8, -0.1]))
        offsets = ball.positions(IMAGES)[0, :, :, 0, 0] - ball.points.reshape(-1, 2)
        conv.predictor.bias.copy_(offsets.flip(-1).flatten())
        numbers = diagnose(nn.Sequential(conv), IMAGES)["0"]
        assert numbers["rest"] < 1e-6 < 0.1 < min(numbers["shift"], numbers["linear"])
        torch.nn.init.normal_(conv.predictor.weight)
        numbers = diagnose(nn.Sequential(conv), torch.randn(2, 3, 32, 32))["0"]
        assert sum(numbers[part] for part in ("shift", "linear", "rest")) == pytest.approx(1)
        assert 0.5 < numbers["rest"] < 0.85


def test_images_come_from_all_classes():
    config = DataConfig(data="textures", input_size=32, workers=0)
    val = make_datasets(config)[1]
    cfg = {
        "input_size": (3, 32, 32),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    }
    images = sample_images(make_loader(config, val, cfg, train=False), 6)
    assert images.shape == (6, 3, 32, 32)
    assert torch.equal(images[0], val[0][0]) and torch.equal(images[-1], val[len(val) - 1][0])


def test_picture_and_mean():
    report = diagnose(timm.create_model("test_resnet_metric", stem="cifar"), torch.randn(1, 3, 16, 16))
    far = {layer: {key: 3 * value for key, value in numbers.items()} for layer, numbers in report.items()}
    mean = mean_diagnosis([report, far])
    for layer, numbers in report.items():
        assert mean[layer] == pytest.approx({key: 2 * value for key, value in numbers.items()})
    assert mean_diagnosis([{}, {}]) == {}
    diagnoses = {("scratch", "metric"): far, ("scratch", "standard"): {}, ("transfer", "metric"): report}
    axes = plot_geometry(diagnoses, {"metric": "red"}).axes
    assert len(axes) == 2 * 4  # displacement, outside, anisotropy, asymmetry
    assert [axis.get_title() for axis in axes[:2]] == ["scratch", "transfer"]
    assert list(axes[0].lines[0].get_ydata()) == pytest.approx([n["displacement"] for n in far.values()])
    assert len(plot_geometry({("scratch", "standard"): {}}, {}).axes) == 1  # nothing adaptive: an empty panel


def test_metric_groups_count_alike():
    """Two groups of channels, one at rest and one moved: the mean is half of the moved one's."""
    one, two = MetricConv2d(4, 4, 3), MetricConv2d(4, 4, 3, metric_groups=2)
    raw = torch.tensor([0.2, 0.3, -0.4, 0.6, 0.8, -0.1])
    with torch.no_grad():
        one.predictor.bias.copy_(raw)
        two.predictor.bias.copy_(torch.cat((torch.zeros(6), raw)))
    x = torch.randn(2, 4, 12, 16)
    alone, both = (diagnose(nn.Sequential(layer), x)["0"] for layer in (one, two))
    for key, rest in (("displacement", 0), ("anisotropy", 1), ("asymmetry", 0), ("outside", alone["outside_at_rest"])):
        assert both[key] == pytest.approx((alone[key] + rest) / 2, rel=1e-3)
