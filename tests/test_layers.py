"""The layers: identity start, geometry, dtypes, conversions, serialisation, errors."""

import copy
import inspect
import math
import pickle
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision.ops import deform_conv2d

from timm_metricconv import LAYERS, ActiveConv2d, AffineConv2d, BallConv2d, DeformConv2d, MetricConv2d, ShiftedConv2d
from timm_metricconv.geometry import DRIFTS, PARAMETRIZATIONS, PATTERNS
from timm_metricconv.ops import BACKENDS, place, why_not_on

PAPERS = {"parametrization": "spectral_scale", "drift": "sigmoid_norm_detach", "pattern": "onion"}
VARIANTS = {name: (layer, {}) for name, layer in LAYERS.items()}
VARIANTS |= {f"{name}, modulated": (layer, {"modulated": True}) for name, layer in LAYERS.items()}
VARIANTS |= {f"{name}, separable": (LAYERS[name], {"separable_predictor": True}) for name in ("metric", "deform")}
VARIANTS |= {"metric, unbounded": (MetricConv2d, {"modulated": "unbounded"})}
VARIANTS |= {"paper's metric": (MetricConv2d, PAPERS), "Riemannian": (MetricConv2d, {"eps_omega": 1.0})}
VARIANTS |= {f"{name}, bounded": (LAYERS[name], {"max_offset": 1.5}) for name in ("deform", "shifted")}
VARIANTS |= {"geodesic": (MetricConv2d, {"ball": "geodesic"})}
variants = pytest.mark.parametrize("variant", VARIANTS)


def build(variant, *args, **kwargs):
    layer, own = VARIANTS[variant]
    return layer(*args, **own | kwargs)


def bend(layer, size=0.3):
    """Gives the geometry random parameters, away from the identity."""
    for name, parameter in layer.named_parameters():
        if name.startswith("predictor.") or name == "offset":
            fan_in = parameter[0].numel() if parameter.dim() == 4 else 1
            nn.init.normal_(parameter, std=size * fan_in**-0.5)
    return layer


def is_bent(layer, x):
    """Guards the tests that would hold for the lattice as well."""
    positions = layer.positions(x)
    return (positions - layer.points.flatten(0, 1)[None, :, :, None, None]).abs().max() > 0.02


@pytest.mark.parametrize("name", LAYERS)
def test_signatures_are_written_out(name):
    """Help and editors show every argument, with the default that all layers share."""
    shared, own = inspect.signature(BallConv2d).parameters, inspect.signature(LAYERS[name]).parameters
    assert all(own[key] == parameter for key, parameter in shared.items())
    assert not {parameter.kind for parameter in own.values()} & {
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    }
    values = {
        "stride": (2, 1),
        "padding": (3, 4),
        "dilation": (1, 2),
        "groups": 2,
        "metric_groups": 2,
        "modulated": True,
    }
    values |= {"separable_predictor": True, "fixed_kernel": True, "init": "paper", "backend": "torchvision"}
    layer = LAYERS[name](4, 6, 5, **values, bias=False, dtype=torch.float64)
    assert all(getattr(layer, key) == value for key, value in values.items())
    assert layer.bias is None and layer.weight.shape == (6, 2, 5, 5) and layer.weight.dtype == torch.float64


@pytest.mark.parametrize("arguments", [{}, {"stride": (2, 1), "dilation": (1, 2)}, {"kernel_size": 4, "dilation": 3}])
def test_centres_are_where_the_taps_lie_around(arguments):
    """The mean of a linear image over the taps is its value at their centre; padding shifts all centres alike."""
    arguments = {"kernel_size": 3, "dtype": torch.float64, **arguments}
    layer, image = DeformConv2d(1, 1, padding=0, init="paper", **arguments), torch.zeros(1, 1, 13, 17).double()
    nn.init.zeros_(layer.predictor.weight)
    columns, rows = layer.centres(image)
    torch.testing.assert_close(layer(image + torch.arange(17.0))[0, 0, 0] - layer.bias, columns)
    torch.testing.assert_close(layer(image + torch.arange(13.0)[:, None])[0, 0, :, 0] - layer.bias, rows)
    padded = DeformConv2d(1, 1, padding=(2, 3), **arguments).centres(image)
    assert padded[0][0] == columns[0] - 3 and padded[1][0] == rows[0] - 2


CONVOLUTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "stride": {"stride": 2, "padding": 1},
    "pairs": {"stride": (2, 1), "padding": (0, 3), "dilation": (1, 2)},
    "dilation": {"dilation": 3, "padding": 3},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "out_channels": 4, "padding": 1},
    "metric groups": {"metric_groups": 2, "padding": 1},
    "depthwise, metric groups": {"groups": 4, "metric_groups": 2, "out_channels": 4, "padding": 1},
    "even kernel": {"kernel_size": 2, "padding": 1},
    "even kernel, dilation": {"kernel_size": 4, "dilation": 2, "stride": 2, "padding": 3},
    "1x1": {"kernel_size": 1, "padding": 0},
    "5x5": {"kernel_size": 5, "padding": 2},
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "paper's metric"])  # its pattern is not the lattice
def test_identity_start_is_conv2d(variant, case):
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1} | CONVOLUTIONS[case]
    if "separable" in variant and case == "even kernel":
        pytest.skip("no 3×3 window is centred between two pixels")
    layer = build(variant, **arguments)
    conv = nn.Conv2d(**{key: value for key, value in arguments.items() if key != "metric_groups"})
    x = torch.randn(2, 4, 11, 14)
    missing, unknown = layer.load_state_dict(conv.state_dict(), strict=False)
    assert not unknown and all(re.match(r"predictor\.|offset$", key) for key in missing)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-5)


@variants
def test_metric_groups_are_layers_side_by_side(variant):
    """Each run of channels is read where a layer with that group's raw channels reads, and weighed as it weighs."""
    layer, alone = bend(build(variant, 6, 6, 3, groups=6, metric_groups=3)), build(variant, 2, 2, 3, groups=2)
    own, masks = layer.predicted, 9 * bool(layer.modulated)
    raw = torch.randn(2, 3 * (own + masks), 5, 4)
    positions, factors = place(layer.samples(raw)), layer.density(raw)
    for number in range(3):
        part = torch.cat((raw[:, own * number :][:, :own], raw[:, 3 * own + masks * number :][:, :masks]), 1)
        if hasattr(layer, "offset"):
            alone.offset = nn.Parameter(layer.offset[9 * number :][:9].detach())
        taps = slice(9 * number, 9 * number + 9)
        torch.testing.assert_close(place(alone.samples(part)), positions[:, taps])
        if masks:
            torch.testing.assert_close(alone.density(part), factors[:, taps])
    assert not torch.allclose(positions[:, :9], positions[:, 9:18])
    if isinstance(layer, MetricConv2d):
        m, omega = layer.metric(torch.randn(2, 6, 5, 4))
        assert m.shape == (2, 3, 2, 2, 5, 4) and omega.shape == (2, 3, 2, 5, 4)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("drift", DRIFTS)
def test_identity_start_of_every_metric(parametrization, drift):
    conv, x = nn.Conv2d(4, 6, 3, padding=2, dilation=2), torch.randn(2, 4, 9, 8)
    layer = MetricConv2d.from_conv(conv, parametrization=parametrization, drift=drift)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_default_padding_keeps_the_size(kernel_size):
    for dilation in (1, 2, (1, 3)):
        layer = MetricConv2d(2, 3, kernel_size, dilation=dilation)
        assert layer(torch.randn(1, 2, 7, 9)).shape == (1, 3, 7, 9)
    assert MetricConv2d(2, 3, 4, dilation=2).padding == (4, 4)


@variants
@pytest.mark.parametrize("padding", [2, "same", "valid"])
def test_from_conv_owns_the_parameters(variant, padding):
    conv = nn.Conv2d(4, 6, 5, padding=padding, dilation=(2, 1), groups=2).double().eval()
    if "separable" in variant and padding == "valid":
        pytest.skip("the 3×3 window would begin inside the image")
    layer, own = VARIANTS[variant]
    new = layer.from_conv(conv, **own)
    assert new.weight is conv.weight and new.bias is conv.bias and not new.training
    assert all(p.dtype == torch.float64 for p in new.parameters())
    x = torch.randn(2, 4, 12, 11, dtype=torch.float64)
    assert new(x).shape == conv(x).shape
    if "pattern" not in own:
        torch.testing.assert_close(new(x), conv(x))


def test_from_conv_with_the_papers_start_and_a_fixed_kernel():
    conv = nn.Conv2d(4, 6, 3, bias=False)
    layer = DeformConv2d.from_conv(conv, init="paper")
    assert layer.bias is None and layer.weight is not conv.weight
    assert torch.equal(layer.weight, torch.full_like(layer.weight, 1 / 36))
    layer = ShiftedConv2d.from_conv(conv, fixed_kernel=True)
    assert layer.weight is conv.weight and not layer.weight.requires_grad


@variants
def test_batch_independence(variant):
    """Values and gradients of an image are the same whatever its batch mates are, NaN included."""
    layer = bend(build(variant, 4, 6, 3, stride=2)).double()
    x = torch.randn(3, 4, 9, 7, dtype=torch.float64)
    assert is_bent(layer, x)
    together = layer(x)
    for i in range(3):
        torch.testing.assert_close(layer(x[i : i + 1])[0], together[i], rtol=1e-12, atol=1e-12)
    spoilt = x.clone()
    spoilt[1] = math.nan
    torch.testing.assert_close(layer(spoilt)[::2], together[::2], rtol=1e-12, atol=1e-12)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0].sum(), x)
    assert gradient[0].any() and not gradient[1:].any()


@variants
@pytest.mark.parametrize(("dy", "dx"), [(0, 2), (2, -4)])
def test_shift_equivariance(variant, dy, dx):
    """Away from the border; the margin of zeros keeps the image's mean, which the affine layer reads."""
    layer = bend(build(variant, 2, 3, 3, stride=2), 0.5).double()
    x = torch.zeros(1, 2, 32, 32, dtype=torch.float64)
    x[:, :, 11:21, 11:21] = torch.randn(1, 2, 10, 10)
    assert is_bent(layer, x)
    out, moved = layer(x), layer(x.roll((dy, dx), (2, 3)))
    torch.testing.assert_close(moved[..., 3:-3, 3:-3], out.roll((dy // 2, dx // 2), (2, 3))[..., 3:-3, 3:-3])
    assert not torch.allclose(moved, out, atol=1e-2)


@variants
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_dtypes(variant, dtype, wide):
    layer = bend(build(variant, 4, 6, 3, stride=2, dtype=dtype))
    x = torch.randn(2, 4, 9, 7, dtype=dtype, requires_grad=True)
    positions, out = layer.positions(x), layer(x)
    assert positions.dtype == wide and positions.shape == (2, 9, 2, 5, 4)
    assert out.dtype == dtype and out.shape == (2, 6, 5, 4)
    if isinstance(layer, MetricConv2d):
        m, omega = layer.metric(x)
        assert m.dtype == omega.dtype == wide and m.shape == (2, 2, 2, 5, 4) and omega.shape == (2, 2, 5, 4)
    out.sum().backward()
    assert x.grad.dtype == dtype
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())
    exact = copy.deepcopy(layer).double()(x.double())
    tolerance = 0.1 if wide != dtype else 1e-5
    assert (out.double() - exact).abs().max() < tolerance * exact.abs().max()


@variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(variant, dtype):
    layer = bend(build(variant, 4, 6, 3))
    x = torch.randn(2, 4, 9, 7).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype):
        out, positions = layer(x), layer.positions(x)
        out.float().sum().backward()
        if isinstance(layer, MetricConv2d):
            assert all(t.dtype == torch.float32 for t in layer.metric(x))
    assert out.dtype == dtype and positions.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    expected = layer(x)
    assert (out - expected).abs().max() < 0.1 * expected.abs().max()


@variants
def test_conversion_keeps_the_tables(variant):
    """Rounded to bfloat16 and back, the pattern is as accurate as at the start."""
    layer = build(variant, 2, 2, 5, dilation=3)
    points = PATTERNS[layer.pattern](5, (3, 3))
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.bfloat16, torch.float64):
        layer.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        assert torch.equal(layer.points, points.to(wide)) and layer.points.dtype == wide
        assert layer.weight.dtype == dtype


@variants
def test_meta_device(variant):
    layer = build(variant, 4, 6, 3, stride=2, device="meta")
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    expected = build(variant, 4, 6, 3, stride=2)
    expected.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 9, 7)
    torch.testing.assert_close(layer(x), expected(x))
    with torch.device("meta"):
        layer = build(variant, 4, 6, 3, stride=2)
    layer.load_state_dict(expected.state_dict(), assign=True)
    assert torch.equal(layer(x), expected(x))
    with torch.device("meta"):
        assert build(variant, 4, 6, 3).points.is_meta
        assert build(variant, 4, 6, 3, device="cpu").points.device.type == "cpu"


@variants
def test_forward_on_meta(variant):
    layer = build(variant, 4, 6, 3, stride=2, device="meta")
    assert layer(torch.randn(2, 4, 9, 7, device="meta")).shape == (2, 6, 5, 4)


@variants
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state dict"])
def test_copies(variant, way):
    layer = bend(build(variant, 4, 6, 3, groups=2, init="paper")).eval()
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        other = build(variant, 4, 6, 3, groups=2).eval()
        other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 6, 5)
    assert torch.equal(layer(x), other(x))
    with torch.no_grad():
        other.weight.zero_()
    assert layer.weight.any()


@variants
def test_state_dict_is_conv2ds_and_the_geometry(variant):
    keys = set(build(variant, 4, 6, 3).state_dict())
    parts = ("0.weight", "1.weight", "1.bias") if "separable" in variant else ("weight", "bias")
    geometry = {f"predictor.{part}" for part in parts} if variant != "active" else set()
    assert keys == {"weight", "bias"} | geometry | ({"offset"} if variant.startswith("active") else set())


@variants
@pytest.mark.parametrize("compiler", ["script", "trace", "compile"])
def test_compilers(variant, compiler):
    """The same values (scripted and traced: at another size than the first, too) and the same gradient."""
    if compiler == "compile" and variant not in ("metric, modulated", "deform", "affine"):
        pytest.skip("slow; the three compile what all are made of")
    layer = bend(build(variant, 4, 6, 3, stride=2, groups=2))
    x = torch.randn(2, 4, 6, 5)
    if compiler == "script":
        compiled = torch.jit.script(layer)
    elif compiler == "trace":
        compiled = torch.jit.trace(layer, x)
        # a process without this package can load it
        assert {node.kind().split("::")[0] for node in compiled.inlined_graph.nodes()} == {"aten", "prim"}
    else:
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for other in (x, torch.randn(1, 4, 9, 7))[: 1 if compiler == "compile" else 2]:
        torch.testing.assert_close(compiled(other), layer(other), rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(layer(x).sum(), list(layer.parameters()))
    for actual, value in zip(torch.autograd.grad(compiled(x).sum(), list(layer.parameters())), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-3, atol=1e-4)


@variants
def test_an_image_without_a_batch(variant):
    layer, x = bend(build(variant, 4, 6, 3)), torch.randn(4, 6, 5)
    assert torch.equal(layer(x), layer(x[None])[0])
    assert torch.equal(layer.positions(x), layer.positions(x[None])[0])
    for alone, first in zip(layer.centres(x), layer.centres(x[None]), strict=True):
        assert torch.equal(alone, first)
    if isinstance(layer, MetricConv2d):
        for alone, batch in zip(layer.metric(x), layer.metric(x[None]), strict=True):
            assert torch.equal(alone, batch[0])


@variants
def test_weights_may_be_loaded_in_inference_mode(variant):
    layer, x = build(variant, 4, 6, 3), torch.randn(1, 4, 6, 5)
    with torch.inference_mode():
        layer.load_state_dict(bend(build(variant, 4, 6, 3)).state_dict())
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@variants
def test_fx_keeps_the_layer_whole(variant):
    model, x = nn.Sequential(bend(build(variant, 4, 4, 3)), nn.ReLU()), torch.randn(1, 4, 6, 5)
    graph = torch.fx.symbolic_trace(model)
    assert isinstance(graph.get_submodule("0"), BallConv2d) and torch.equal(graph(x), model(x))


SHARDED = """
import torch
from torch.distributed.fsdp import fully_shard
from timm_metricconv import LAYERS, MetricConv2d

torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
for kind, arguments in [*((name, {}) for name in LAYERS), ("metric", {"init": "paper", "parametrization": "cholesky"})]:
    expected = LAYERS[kind](4, 4, 3, **arguments)
    with torch.device("meta"):
        layer = LAYERS[kind](4, 4, 3, **arguments)
    fully_shard(layer).to_empty(device="cpu")
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        if name not in ("weight", "bias"):
            assert torch.equal(parameter.full_tensor(), expected.get_parameter(name)), (kind, name)
    layer(torch.randn(1, 4, 6, 5)).sum().backward()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_parameters_start_as_whole_ones():
    """FSDP2 from the meta device: no part of an initialisation is a plain tensor, nor a new parameter."""
    result = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@variants
def test_fixed_kernel(variant):
    layer = bend(build(variant, 4, 6, 3, fixed_kernel=True))
    assert "weight" in layer.state_dict() and not layer.weight.requires_grad
    layer(torch.randn(2, 4, 6, 5)).square().sum().backward()
    assert layer.weight.grad is None
    assert all(p.grad.any() for name, p in layer.named_parameters() if name != "weight")
    assert "fixed_kernel=True" in repr(layer)


@variants
def test_learning_starts_at_the_identity(variant):
    """No parameter sits on a plateau: each has a gradient at the start."""
    layer = build(variant, 4, 6, 3)
    layer(torch.rand(2, 4, 6, 5)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        # the depthwise part waits for the 1×1 behind it, which starts at zero
        assert parameter.grad.isfinite().all() and parameter.grad.any() != (name == "predictor.0.weight"), name


PAPER_ROWS = {  # the authors' initialisation: row → value of the predictor's weight; rows not named keep nn.Conv2d's
    "cholesky": {0: 1 / 36, 2: 1 / 36, 1: 1e-6, 3: 1e-6, 4: 1e-6},
    "ldl": {1: 1 / 36, 2: 1 / 36, 0: 1e-6, 3: 1e-6, 4: 1e-6},
    "spectral": {},
    "spectral_scale": dict.fromkeys(range(2, 7), 1e-6),
}


@pytest.mark.parametrize("parametrization", PAPER_ROWS)
def test_papers_start_of_the_predictor(parametrization):
    layer = MetricConv2d(4, 6, 3, parametrization=parametrization, init="paper", groups=2)
    rows = PAPER_ROWS[parametrization]
    assert not layer.predictor.bias.any()
    for channel, row in enumerate(layer.predictor.weight):
        if channel in rows:
            torch.testing.assert_close(row, torch.full_like(row, rows[channel]))
        else:  # uniform within ±1/sqrt(fan-in)
            assert row.unique().numel() == row.numel() and 0.05 < row.abs().max() <= 1 / 6


@variants
def test_papers_start_of_the_kernel_and_of_offsets(variant):
    layer = build(variant, 4, 6, 3, groups=2, init="paper")
    torch.testing.assert_close(layer.weight, torch.full_like(layer.weight, 1 / (9 * 2)))
    head = layer.predictor_head()
    if not isinstance(layer, MetricConv2d) and head is not None:
        assert torch.equal(head.weight, torch.full_like(head.weight, 1e-6)) and not head.bias.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 0}, "kernel_size=0"),
        ({"kernel_size": (3, 5)}, r"kernel_size=\(3, 5\).*square"),
        ({"kernel_size": 3.0}, "kernel_size=3.0"),
        ({"kernel_size": ()}, r"kernel_size=\(\)"),
        ({"kernel_size": "3"}, "kernel_size='3'"),
        ({"kernel_size": None}, "kernel_size=None"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"out_channels": -1}, "out_channels=-1"),
        ({"in_channels": 4.0}, "in_channels=4.0"),
        ({"stride": 0}, "stride=0"),
        ({"stride": (1, 2, 3)}, r"stride=\(1, 2, 3\)"),
        ({"padding": -1}, "padding=-1"),
        ({"padding": "same"}, "padding='same'"),
        ({"dilation": 0}, "dilation=0"),
        ({"groups": 0}, "groups=0"),
        ({"groups": 3}, "groups=3.*in_channels=4"),
        ({"metric_groups": 0}, "metric_groups=0"),
        ({"metric_groups": 3}, "metric_groups=3.*in_channels=4"),
        ({"modulated": "softmax"}, "modulated='softmax'.*'unbounded'"),
        ({"modulated": 1}, "modulated=1.*'unbounded'"),
        ({"bias": "no"}, "bias='no': expected True or False"),
        ({"fixed_kernel": "no"}, "fixed_kernel='no': expected True or False"),
        ({"separable_predictor": 0}, "separable_predictor=0: expected True or False"),
        ({"init": "kaiming"}, "init='kaiming'.*identity, paper"),
        ({"backend": "cudnn"}, "backend='cudnn'.*torchvision"),
    ],
)
@pytest.mark.parametrize("layer", LAYERS.values())
def test_bad_arguments(layer, arguments, message):
    with pytest.raises(ValueError, match=message):
        layer(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parametrization": "logspf"}, "parametrization='logspf'.*logspd"),
        ({"drift": "none"}, "drift='none'.*whitened"),
        ({"pattern": "hex"}, "pattern='hex'.*lattice"),
        ({"ball": "round"}, "ball='round'.*geodesic"),
        ({"ball": "geodesic", "steps": 0}, "steps=0"),
        ({"eps_omega": 0}, "eps_omega=0"),
        ({"eps_omega": 1.5}, "eps_omega=1.5"),
        ({"eps_omega": math.nan}, "eps_omega=nan"),
        ({"eps_omega": "0.5"}, "eps_omega='0.5'"),
        ({"scale": (1.5, 0.1)}, "scale="),
        ({"scale": (0.0, 1.5)}, "scale="),
        ({"scale": (1.0,)}, "scale="),
        ({"scale": 1.0}, "scale=1.0"),
        ({"scale": ("0.1", "1.5")}, "scale="),
    ],
)
def test_bad_arguments_of_metric_layers(arguments, message):
    with pytest.raises(ValueError, match=message):
        MetricConv2d(4, 6, 3, **arguments)


@variants
def test_bad_inputs(variant):
    layer = build(variant, 4, 6, 3)
    with pytest.raises(ValueError, match=r"input: expected \[B, C_in, H, W\]"):
        layer(torch.randn(6, 5))
    with pytest.raises((ValueError, RuntimeError), match="3 channels"):
        layer(torch.randn(1, 3, 6, 5))


@variants
@pytest.mark.parametrize(
    ("batch", "size", "kernel_size"),
    [(0, (6, 5), 3), (1, (1, 1), 3), (3, (2, 3), 5), (1, (3, 9), 7), (2, (1, 6), 4), (3, (12, 1), 3)],
)
def test_sizes(variant, batch, size, kernel_size):
    """Empty batches, one pixel, one row, images below the kernel: forward and backward."""
    if kernel_size % 2 == 0 and ("paper" in variant or "separable" in variant):
        pytest.skip("onion and a separable predictor take odd kernels")
    layer = bend(build(variant, 4, 6, kernel_size))
    x = torch.randn(batch, 4, *size, requires_grad=True)
    out = layer(x)
    extra = 1 - kernel_size % 2
    assert out.shape == (batch, 6, size[0] + extra, size[1] + extra)
    assert layer.positions(x).shape == (batch, kernel_size**2, 2, *out.shape[2:])
    out.square().sum().backward()
    assert x.grad.shape == x.shape and x.grad.isfinite().all()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@variants
def test_channels_last(variant):
    layer, x = bend(build(variant, 4, 6, 3)), torch.randn(2, 4, 6, 5)
    last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), layer(x), rtol=1e-5, atol=1e-5)


def test_without_drift_the_ball_is_its_mirror_image():
    x = torch.randn(2, 4, 6, 5)
    for parametrization in PARAMETRIZATIONS:
        layer = bend(MetricConv2d(4, 6, 3, eps_omega=1, parametrization=parametrization), 1.0)
        positions = layer.positions(x)
        torch.testing.assert_close(positions, -positions.flip(1))
        assert not layer.metric(x)[1].any()
        drifting = bend(MetricConv2d(4, 6, 3, eps_omega=0.1, parametrization=parametrization), 1.0)
        assert not torch.allclose(drifting.positions(x), -drifting.positions(x).flip(1), atol=1e-2)


def test_an_offset_moves_the_pixel_that_it_names():
    """Of tap k, row by row, channel 2k is how far down and 2k + 1 how far right it looks: one bright pixel tells."""
    x = torch.zeros(1, 1, 11, 12)
    x[0, 0, 5, 6] = 1
    for k, (row, column) in enumerate((r, c) for r in (-1, 0, 1) for c in (-1, 0, 1)):
        layer = DeformConv2d(1, 1, 3, bias=False)
        layer.weight.data = torch.nn.functional.one_hot(torch.tensor(k), 9).view(1, 1, 3, 3).float()
        layer.predictor.bias.data[2 * k : 2 * k + 2] = torch.tensor([1.0, 2.0])
        assert layer(x).nonzero().tolist() == [[0, 0, 5 - row - 1, 6 - column - 2]]


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("layer", [DeformConv2d, ShiftedConv2d])
def test_offsets_have_torchvisions_order(layer, modulated):
    layer = bend(layer(4, 6, 3, stride=2, dilation=2, groups=2, modulated=modulated), 1.0)
    x = torch.randn(2, 4, 9, 8)
    raw = layer.predictor(x)
    offset = raw[:, :18] if isinstance(layer, DeformConv2d) else raw[:, :2].repeat(1, 9, 1, 1)
    mask = 2 * raw[:, -9:].sigmoid() if modulated else None
    expected = deform_conv2d(x, offset, layer.weight, layer.bias, (2, 2), (2, 2), (2, 2), mask)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    lattice = layer.points[0][None, :, :, None, None]
    shift = (layer.positions(x) - lattice).flip(2).flatten(1, 2)
    torch.testing.assert_close(shift, offset, rtol=1e-5, atol=1e-5)


def test_modulated_metric():
    layer, x = bend(MetricConv2d(4, 6, 3, modulated=True), 1.0), torch.randn(2, 4, 9, 8)
    raw = layer.predictor(x)
    assert raw.shape[1] == 6 + 9
    offset = (layer.positions(x) - layer.points[0][None, :, :, None, None]).flip(2).flatten(1, 2)
    mask = 2 * raw[:, 6:].sigmoid()
    expected = deform_conv2d(x, offset, layer.weight, layer.bias, padding=(1, 1), mask=mask)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_unbounded_modulation_is_dcnv4s_sum():
    """Σ_k m_gk·x(p + y_gk) for each channel of group g, m unbounded (DCNv4, equation 1): a depthwise kernel of ones."""
    layer = MetricConv2d(8, 8, 3, groups=8, metric_groups=2, bias=False, modulated="unbounded")
    x = torch.randn(2, 8, 7, 6)
    torch.testing.assert_close(layer.density(layer.predict(x)), torch.ones(2, 18, 7, 6))
    nn.init.ones_(layer.weight)
    bend(layer, 2.0)
    positions, mask = layer.positions(x), layer.density(layer.predict(x))
    assert mask.min() < 0 and mask.max() > 2
    torch.testing.assert_close(mask, 1 + layer.predictor(x)[:, 12:])
    offset = (positions - layer.points[0].repeat(2, 1)[None, :, :, None, None]).flip(2).flatten(1, 2)
    expected = deform_conv2d(x, offset, torch.ones(8, 1, 3, 3), padding=(1, 1), mask=mask)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


class DynamicBlock(nn.Module):
    """A block as InternImage and DCNv4 have it, with metric balls: project, sample with dynamic weights, project."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        sampled = {"groups": channels, "metric_groups": groups, "modulated": "unbounded", "separable_predictor": True}
        self.norm, self.value = nn.GroupNorm(1, channels), nn.Conv2d(channels, channels, 1)
        self.sample = MetricConv2d(channels, channels, 3, **sampled)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + self.project(self.sample(self.value(self.norm(x))))


def test_a_block_with_dynamic_weights_learns():
    """Every parameter, the predictor's depthwise part after the first step, and the loss falls."""
    block, x = DynamicBlock(8, 2), torch.randn(2, 8, 6, 6)
    target = x.roll(1, 3).tanh()
    start = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    optimizer, losses = torch.optim.Adam(block.parameters(), 0.02), []
    for _ in range(20):
        loss = (block(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    assert all(not torch.equal(parameter, start[name]) for name, parameter in block.named_parameters())


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 7},
        {"kernel_size": 5, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": (1, 2), "padding": (0, 2)},
        {"kernel_size": 7, "dilation": (2, 1), "padding": (6, 2)},
        {"kernel_size": 4, "dilation": 2, "stride": 2, "padding": 3},
        {"kernel_size": 1},
    ],
)
def test_separable_predictor_is_centred_as_the_kernel(arguments):
    """Its middle tap reads the pixel in the middle of the kernel's receptive field, at every output pixel."""
    layer = DeformConv2d(2, 2, groups=2, separable_predictor=True, **arguments)
    depthwise, head = layer.predictor
    assert (depthwise.kernel_size, depthwise.dilation, depthwise.stride) == ((3, 3), layer.dilation, layer.stride)
    nn.init.zeros_(depthwise.weight)
    depthwise.weight.data[:, :, 1, 1] = 1.0
    nn.init.zeros_(head.weight)
    head.weight.data[:2, :, 0, 0] = torch.eye(2)
    rows, columns = torch.arange(1.0, 14.0), torch.arange(1.0, 13.0)  # zero is what lies outside
    x = torch.stack((rows[:, None].expand(13, 12), columns.expand(13, 12)))[None]
    raw = layer.predict(x)[0]
    assert list(raw.shape[1:]) == layer.out_size(x) == list(layer(x).shape[2:])
    for axis, size in ((0, 13), (1, 12)):
        index = torch.arange(raw.shape[1 + axis]) * layer.stride[axis] - layer.padding[axis]
        centre = index + layer.dilation[axis] * (layer.kernel_size[0] - 1) / 2 + 1
        seen = raw[axis].amax(1 - axis)  # over the other axis, whose border is outside
        torch.testing.assert_close(seen, torch.where((centre > 0) & (centre <= size), centre, torch.zeros(())))


@pytest.mark.parametrize("arguments", [{"kernel_size": 4}, {"kernel_size": 7, "padding": 1}])
def test_separable_predictor_that_cannot_be_centred_is_refused(arguments):
    with pytest.raises(ValueError, match=r"separable_predictor=True.*kernel_size=\d with padding=.*expected"):
        MetricConv2d(2, 2, separable_predictor=True, **arguments)


def test_reset_predictor_leaves_both_parts_able_to_learn():
    layer = bend(MetricConv2d(4, 4, 7, groups=4, metric_groups=2, separable_predictor=True))
    nn.init.zeros_(layer.predictor[0].weight)
    layer.reset_predictor()
    m, omega = layer.metric(torch.randn(1, 4, 5, 5))
    torch.testing.assert_close(m, torch.eye(2)[:, :, None, None].expand_as(m))
    assert not omega.any() and layer.predictor[0].weight.std() > 0.1


def test_active_has_one_set_of_offsets():
    layer = bend(ActiveConv2d(4, 6, 3))
    positions = layer.positions(torch.randn(2, 4, 6, 5))
    expected = (layer.points[0] + layer.offset)[None, :, :, None, None].expand_as(positions)
    assert torch.equal(positions, expected) and layer.predictor is None


@pytest.mark.parametrize("kind", [DeformConv2d, ShiftedConv2d])
def test_max_offset(kind):
    """No offset is longer in x or y, however large the raw channels; small ones are what they were."""
    x, wild = torch.randn(1, 4, 6, 5), bend(kind(4, 6, 3, max_offset=1.5, metric_groups=2), 1e4)
    lattice = wild.points[0].repeat(2, 1)[None, :, :, None, None]
    offsets = (wild.positions(x) - lattice).abs()
    assert 1.49 < offsets.max() <= 1.5 + 1e-5
    assert wild.positions(x).unflatten(1, (2, 9)).norm(dim=3).max() <= wild.max_radius + 1e-5
    free = bend(kind(4, 6, 3, metric_groups=2), 1e-2)
    wild.load_state_dict(free.state_dict())
    torch.testing.assert_close(wild.positions(x) - lattice, free.positions(x) - lattice, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, True, "far"])
def test_max_offset_that_is_no_distance_is_refused(value):
    with pytest.raises(ValueError, match=r"max_offset=.*: expected a positive number"):
        DeformConv2d(4, 6, 3, max_offset=value)


def test_affine_maps_the_lattice():
    layer, x = bend(AffineConv2d(4, 6, 3), 1.0), torch.randn(2, 4, 6, 5)
    raw = layer.predictor(x.mean((2, 3), keepdim=True))[:, :, 0, 0]
    matrix, shift = torch.eye(2) + raw[:, :4].view(2, 2, 2), raw[:, 4:]
    expected = torch.einsum("bij,kj->bki", matrix, layer.points[0]) + shift[:, None]
    positions = layer.positions(x)
    torch.testing.assert_close(positions, expected[:, :, :, None, None].expand_as(positions))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradcheck_through_the_layer(pattern):
    """Image → predictor → metric → positions → op, in float64."""
    layer = bend(MetricConv2d(2, 2, 3, pattern=pattern, dtype=torch.float64))
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    parameters = list(layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters), fast_mode=True)


@variants
@pytest.mark.parametrize("backend", [name for name in BACKENDS if why_not_on("cpu", name) is None])
def test_backends_agree(variant, backend):
    arguments = {"groups": 2, "metric_groups": 4}
    layer, x = bend(build(variant, 4, 6, 3, **arguments)), torch.randn(2, 4, 6, 5)
    other = build(variant, 4, 6, 3, **arguments, backend=backend)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x), rtol=1e-4, atol=1e-5)


def test_repr_names_what_differs():
    text = repr(MetricConv2d(4, 6, 3, bias=False, groups=2, dilation=2, modulated="unbounded", drift="sigmoid_norm"))
    for part in ("4, 6", "groups=2", "dilation=(2, 2)", "bias=False", "modulated='unbounded'", "drift='sigmoid_norm'"):
        assert part in text
