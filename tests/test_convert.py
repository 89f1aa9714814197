"""`convert` on networks that know nothing of it: what it replaces, what it leaves, what it returns."""

import copy

import pytest
import timm
import torch
from timm.layers import StdConv2d
from torch import nn
from torchvision.models import resnet18

from timm_metricconv import LAYERS, BallConv2d, MetricConv2d, convert

NETWORKS = {
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=5),
    "efficientnet": lambda: timm.create_model("efficientnet_b0", num_classes=5),
    "regnet": lambda: timm.create_model("regnety_002", num_classes=5),
    "torchvision": lambda: resnet18(num_classes=5),
}
CONVS = {"metric": {}, "deform": {"modulated": True}, "shifted": {}, "active": {}, "affine": {}}


def replaceable(model):
    """Written out anew: plain nn.Conv2d, square, k > 1, zero padding."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is nn.Conv2d
        and module.kernel_size[0] == module.kernel_size[1] > 1
        and module.padding_mode == "zeros"
    }


class Block(nn.Module):
    """One convolution used twice, one beside it, one in a list."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding="same", groups=4)
        self.again = self.shared
        self.rest = nn.ModuleList([nn.Conv2d(8, 8, 5, padding=2, bias=False), nn.Conv2d(8, 4, 1)])
        self.alike = nn.Sequential(self.rest[0])

    def forward(self, x):
        x = self.again(self.shared(self.first(x)))
        return self.rest[1](self.alike(self.rest[0](x)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("conv", "network"), [("deform", "torchvision"), *(("metric", network) for network in NETWORKS)]
)
def test_converted_network_computes_the_same(conv, network):
    model = NETWORKS[network]().eval()
    x = torch.randn(2, 3, 32, 32)
    expected, before = replaceable(model), {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        out = model(x)
        replaced = convert(model, conv, **CONVS[conv])
        assert set(replaced) == set(expected) and replaced
        assert (model(x) - out).abs().max() < 1e-4 * out.abs().max()
    assert any(layer.groups > 1 for layer in replaced.values()) or network == "torchvision"
    for name, layer in replaced.items():
        old = expected[name]
        assert type(layer) is LAYERS[conv] and model.get_submodule(name) is layer
        assert layer.weight is old.weight and layer.bias is old.bias and layer.training == old.training
        assert (layer.stride, layer.dilation, layer.groups) == (old.stride, old.dilation, old.groups)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {key.split(".predictor.")[0] for key in set(after) - set(before)} == set(replaced)

    model.train()
    model(x).square().sum().backward()
    for name, layer in replaced.items():
        assert layer.weight.grad is not None and layer.predictor.weight.grad.isfinite().all(), name
    assert any(layer.predictor.weight.grad.any() for layer in replaced.values())


@pytest.mark.parametrize("conv", LAYERS)
def test_hand_written_module(conv):
    model = Block().double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    expected = model(x)
    replaced = convert(model, conv, **CONVS[conv])
    assert set(replaced) == {"first", "shared", "again", "rest.0", "alike.0"}
    # a module that stands in two places is one module still
    assert model.shared is model.again is replaced["shared"] is replaced["again"]
    assert model.rest[0] is model.alike[0] is replaced["alike.0"] and type(model.rest[1]) is nn.Conv2d
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("first", {"first"}),
        ("rest.*", {"rest.0"}),
        ("*", {"first", "shared", "again", "rest.0", "alike.0"}),
        (["first", "r[a-f]st.0"], {"first", "rest.0"}),
        (lambda name, conv: conv.groups == 4 and name == "again", {"again"}),
        (lambda name, conv: conv.out_channels == 8 and conv.kernel_size == (5, 5), {"rest.0", "alike.0"}),
    ],
)
def test_where(where, expected):
    model = Block()
    assert set(convert(model, "shifted", where)) == expected
    found = {name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, BallConv2d)}
    assert found == expected


@pytest.mark.parametrize("where", ["stage*", [], ["rest.1"], lambda name, conv: False])
def test_nothing_selected(where):
    model = Block()
    with pytest.raises(ValueError, match=r"where=.*first"):
        convert(model, "metric", where)
    assert not any(isinstance(module, BallConv2d) for module in model.modules())


def test_nothing_to_replace_is_no_error_without_where():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(2, 2))
    assert convert(model) == {} and type(model[0]) is nn.Conv2d


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"conv": "metrics"}, ValueError, "conv='metrics': expected one of metric, deform, shifted"),
        ({"drift": "none"}, ValueError, "drift='none'"),
        ({"conv": "deform", "drift": "whitened"}, TypeError, "drift"),
        ({"pattern": "onion", "stride": 3}, TypeError, "stride"),
    ],
)
def test_bad_arguments_leave_the_network(arguments, error, message):
    model = Block()
    with pytest.raises(error, match=message):
        convert(model, **arguments)
    assert len(replaceable(model)) == 5


@pytest.mark.parametrize("make", [nn.Conv2d, LAYERS["metric"]])
def test_a_convolution_is_not_converted_in_place(make):
    with pytest.raises(ValueError, match="from_conv"):
        convert(make(3, 4, 3), "deform")


def test_converted_network_is_left_alone():
    """The predictors of a converted network are convolutions of its geometry, not of the network."""
    model = Block()
    convert(model, "metric", "first")
    predictor = model.first.predictor
    replaced = convert(model, "deform")
    assert set(replaced) == {"shared", "again", "rest.0", "alike.0"}
    assert model.first.predictor is predictor and type(predictor) is nn.Conv2d
    assert convert(model, "deform") == {}
    with pytest.raises(ValueError, match="where="):
        convert(model, "deform", "first*")


@pytest.mark.parametrize(
    "conv",
    [
        StdConv2d(3, 4, 3),
        nn.Conv2d(3, 4, (1, 3)),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 4, 2, padding="same"),
        nn.Conv1d(3, 4, 3),
        nn.ConvTranspose2d(3, 4, 3),
    ],
    ids=lambda conv: repr(conv)[:40],
)
def test_what_computes_something_else_stays(conv):
    model = nn.Sequential(conv)
    assert convert(model, "metric") == {} and model[0] is conv
    with pytest.raises(ValueError, match=r"conv: no MetricConv2d computes what .*: .*(expected|uneven)"):
        MetricConv2d.from_conv(conv)


def test_arguments_of_the_layers():
    arguments = {"eps_omega": 0.1, "fixed_kernel": True, "pattern": "polar", "init": "paper"}
    layer = convert(Block(), "metric", "first", **arguments)["first"]
    assert {key: getattr(layer, key) for key in arguments} == arguments
    assert not layer.weight.requires_grad and torch.equal(layer.weight, torch.full_like(layer.weight, 1 / 27))


def test_kept_on_the_meta_device():
    with torch.device("meta"):
        model = Block()
    replaced = convert(model, "metric")
    assert all(p.is_meta for p in model.parameters()) and len(replaced) == 5


def test_converted_network_is_copied_whole():
    model = Block()
    convert(model, "metric")
    other = copy.deepcopy(model)
    assert other.shared is other.again and other.shared is not model.shared
    x = torch.randn(1, 3, 6, 6)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_convolutions_whose_weight_is_computed_stay(wrap):
    """Its weight is no parameter that a layer could take over."""
    model = nn.Sequential(wrap(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 3))
    assert list(convert(model, "metric")) == ["1"]
