"""Pictures: made for every layer kind without a display, drawn where they should be, with errors that help."""

import importlib
import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

pytest.importorskip("matplotlib", reason="needs the extra [recipes]")

from timm_metricconv import LAYERS, convert, viz

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)


def network(conv="metric", seed=0):
    """A tiny network whose predictors have learned something."""
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=3)
    for layer in convert(model, conv, "layer[23].*").values():
        for name, parameter in layer.named_parameters():
            if name.startswith(("predictor.", "offset")):
                nn.init.normal_(parameter, std=0.05)
    return model.eval()


def rendered(figure):
    """The figure's pixels; drawing is where most of matplotlib's errors come from."""
    file = io.BytesIO()
    figure.savefig(file, dpi=40)
    return np.asarray(Image.open(file).convert("RGB"))


@pytest.mark.parametrize("conv", list(LAYERS))
def test_every_layer_kind_has_its_pictures(conv):
    pytest.importorskip("matplotlib")
    model = network(conv)
    view = viz.capture(model, "layer2.0.conv1", torch.randn(1, 3, 32, 40))
    field = viz.layer_field(view)
    assert (field.residual is None) == (conv == "metric")
    assert field.omega.shape[:2] == (len(field.y), len(field.x)) == tuple(view.layer.out_size(view.input))
    for figure in (
        viz.plot_samples({"": view}, IMAGE, [[10, 10], [30, 20]]),
        viz.plot_field(field, IMAGE, spacing=8),
        viz.plot_maps(field, IMAGE),
    ):
        assert rendered(figure).std() > 0


def test_networks_are_compared_in_one_scale():
    """At the same pixel, so that a longer ball looks longer."""
    pytest.importorskip("matplotlib")
    x = torch.randn(1, 3, 32, 40)
    views = {conv: viz.capture(network(conv), "layer2.0.conv1", x) for conv in ("shifted", "deform", "metric")}
    close_ups = viz.plot_samples(views, IMAGE, [[10, 10]]).axes[1:]
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in close_ups}) == 1
    assert [axes.get_xlabel().split(":")[0] for axes in close_ups] == list(views)


class Probe(nn.Module):
    """Keeps what reaches it."""

    def forward(self, x):
        self.input = x
        return x


@pytest.mark.parametrize(
    "stem, step, origin",
    [
        (nn.Conv2d(3, 4, 7, 2, 3), 2.0, 0.0),
        (nn.Conv2d(3, 4, 4, 4), 4.0, 1.5),
        (nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.AvgPool2d(2)), 4.0, 1.0),
        (nn.Conv2d(3, 4, 3), 1.0, 1.0),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=0.5)), 2.0, 0.5),
    ],
)
def test_samples_are_mapped_through_strides_and_paddings(stem, step, origin):
    """The traced grid is where the receptive field's middle is, which the gradient of a linear network tells."""
    model = nn.Sequential(stem, nn.Conv2d(4, 4, 3, 2, 1))
    convert(model, "deform", "1")
    view = viz.capture(model, "1", torch.randn(1, 3, 32, 40))
    assert view.step == (step, step) and view.origin == (origin, origin)
    x, y = view.centres()
    assert float(x[1] - x[0]) == 2 * step and float(y[0]) == origin
    if not isinstance(stem, nn.Sequential) or isinstance(stem[-1], nn.AvgPool2d):
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.ones_(module.weight)
        for name, parameter in model[1].named_parameters():
            nn.init.zeros_(parameter) if name.startswith("predictor") else nn.init.ones_(parameter)
        image = torch.zeros(1, 3, 32, 40, requires_grad=True)
        model(image)[0, 0, 2, 3].backward()
        mass = image.grad[0].sum(0)
        middle = [float((mass.sum(1 - i) * torch.arange(mass.shape[i])).sum() / mass.sum()) for i in (0, 1)]
        assert middle == pytest.approx([float(y[2]), float(x[3])], abs=1e-3)


def test_capture_leaves_the_network_as_it_was():
    model = network().train()
    model.layer1.eval()
    viz.capture(model, "layer3.0.conv2", torch.randn(1, 3, 32, 40))
    assert model.training and not model.layer1.training and not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"layer2\.0\.conv1"):
        viz.capture(model, "layer9", torch.randn(1, 3, 32, 40))
    with pytest.raises(ValueError, match="no such layer"):
        viz.capture(timm.create_model("test_resnet"), "conv1", torch.randn(1, 3, 32, 40))


def test_balls_of_an_image_are_drawn_where_they_are():
    pytest.importorskip("matplotlib")
    field = viz.image_field(IMAGE, smoothing=1.0, scale=0.1, anisotropy=0.0)
    outline = field.outlines(torch.tensor([5]), torch.tensor([7]))[0]
    torch.testing.assert_close((outline - torch.tensor([7.0, 5.0])).norm(dim=-1), torch.full((181,), 0.1**-0.5))
    axes = viz.plot_field(field, IMAGE, spacing=10).axes[0]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # y goes down
    assert axes.get_aspect() == 1


def test_grad_cam_of_four_networks():
    pytest.importorskip("pytorch_grad_cam")
    pytest.importorskip("matplotlib")
    models = {"standard": timm.create_model("test_resnet", num_classes=3)}
    models.update({conv: network(conv) for conv in ("shifted", "deform", "metric")})
    inputs = {label: torch.randn(1, 3, 32, 40) for label in models}
    figure = viz.plot_grad_cam(models, inputs, IMAGE)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "image" and all(label in title for label, title in zip(models, titles[1:], strict=True))
    rendered(figure)


@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout"])
def test_grad_cam_is_that_of_its_formula(name):
    """Channels first and (as in Swin) last; over an image of another size than the network's."""
    pytest.importorskip("pytorch_grad_cam")
    model, x, kept = timm.create_model(name).eval(), torch.randn(1, 3, 160, 160), []
    axes = viz.plot_grad_cam({name: model}, {name: x}, IMAGE, target=10).axes[1]
    heat = axes.images[-1]
    assert heat.get_extent() == axes.images[0].get_extent()
    model.get_submodule(model.feature_info[-1]["module"]).register_forward_hook(lambda *call: kept.append(call[2]))
    score = model(x)[0, 10]
    slope = torch.autograd.grad(score, kept[0])[0]
    space = (2, 3) if name == "test_resnet" else (1, 2)
    expected = (slope.mean(space, keepdim=True) * kept[0]).sum(1 if name == "test_resnet" else 3)[0].relu()
    expected = nn.functional.interpolate(expected[None, None], (160, 160), mode="bilinear")[0, 0].detach()
    assert np.corrcoef(np.ravel(heat.get_array()), expected.flatten())[0, 1] > 0.99


def test_grad_cam_of_tokens_is_refused():
    pytest.importorskip("pytorch_grad_cam")
    model = timm.create_model("test_vit").eval()
    with pytest.raises(ValueError, match=r"a: Grad-CAM needs feature maps .* blocks\.\d gives is \[1, \d+, 64\]"):
        viz.plot_grad_cam({"a": model}, {"a": torch.randn(1, 3, 160, 160)}, IMAGE)


def test_a_missing_extra_is_told(monkeypatch):
    real = importlib.import_module

    def absent(name, *args):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args)

    monkeypatch.setattr(viz.importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r'pip install "timm_metricconv\[recipes\]"'):
        viz.plot_maps(viz.image_field(IMAGE), IMAGE)
