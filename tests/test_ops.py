"""`ball_conv2d`: every backend against the reference and a loop, outputs and gradients; and what surrounds an op."""

import functools
import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from timm_metricconv import MetricConv2d
from timm_metricconv.geometry import PATTERNS
from timm_metricconv.ops import BACKENDS, Samples, ball_conv2d, dispatch, place, why_not_on
from timm_metricconv.ops.reference import ball_conv2d_reference

RUNNABLE = [name for name in BACKENDS if why_not_on("cpu", name) is None]
backends = pytest.mark.parametrize("backend", RUNNABLE)
CHECKED = ("x", "samples", "weight", "bias", "mask")
# float64 where a backend has it, and how near it is to the truth there
DTYPE = {name: torch.float32 if name in ("compiled", "triton") else torch.float64 for name in BACKENDS}


def tolerance_of(backend, tight=1e-10):
    return tight if DTYPE[backend] == torch.float64 else 2e-5


def can_take(backend, tensors, groups=1):
    source = tensors["samples"]
    return BACKENDS[backend].why_not(tensors["x"], source, tensors["weight"], groups) is None


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def loop(x, samples, weight, bias=None, mask=None, stride=1, padding=0, dilation=1, groups=1):
    """The equation, pixel by pixel. The hat function over whole rows and columns stands for the bilinear read."""
    (batch, channels, height, width), (*_, out_height, out_width) = x.shape, samples.shape
    kernel_size = weight.shape[2:] if weight.dim() == 4 else (1, 1)
    taps = weight.shape[2:].numel()
    share = channels // (samples.shape[1] // taps)  # channels of a metric group
    sy, sx = (
        torch.arange(n) * s - p + d * (k - 1) / 2
        for n, s, p, d, k in zip(
            (out_height, out_width), pair(stride), pair(padding), pair(dilation), kernel_size, strict=True
        )
    )
    kernel = weight.flatten(2).unflatten(0, (groups, -1))  # [groups, C_out/groups, C_in/groups, K]
    rows = []
    for b in range(batch):
        for i in range(out_height):
            for j in range(out_width):
                columns = []
                for channel in range(channels):
                    for tap in range(channel // share * taps, (channel // share + 1) * taps):
                        px, py = sx[j] + samples[b, tap, 0, i, j], sy[i] + samples[b, tap, 1, i, j]
                        hat_x = (1 - (px - torch.arange(width)).abs()).clamp(min=0)
                        hat_y = (1 - (py - torch.arange(height)).abs()).clamp(min=0)
                        value = hat_y @ x[b, channel] @ hat_x
                        columns.append(value if mask is None else value * mask[b, tap, i, j])
                columns = torch.stack(columns).view(groups, -1, taps)
                rows.append(torch.einsum("goct,gct->go", kernel, columns).flatten())
    out = torch.stack(rows).view(batch, out_height, out_width, -1).permute(0, 3, 1, 2)
    return out if bias is None else out + bias[:, None, None]


# kernel size k (None: K free taps), image size, and what differs from the defaults
CASES = {
    "plain": {},
    "no bias": {"bias": False},
    "no padding": {"padding": 0},
    "stride": {"stride": 2},
    "stride, pairs": {"stride": (3, 2), "padding": (0, 2), "dilation": (1, 2)},
    "dilation": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 4},
    "depthwise, multiplied": {"groups": 4, "out_channels": 8},
    "one channel": {"channels": 1},
    "mask": {"mask": True},
    "mask, groups, stride": {"mask": True, "groups": 2, "stride": 2},
    "even kernel": {"kernel_size": (2, 2)},
    "1x1 kernel": {"kernel_size": (1, 1), "padding": 0},
    "kernel of two sizes": {"kernel_size": (2, 3)},
    "free taps": {"kernel_size": None, "padding": 0},
    "free taps, mask, groups": {"kernel_size": None, "padding": 0, "mask": True, "groups": 2, "stride": 2},
    "batch of 1": {"batch": 1},
    "batch of 3": {"batch": 3, "size": (3, 4)},
    "one pixel": {"size": (1, 1)},
    "one row": {"size": (1, 6)},
    "one column": {"size": (5, 1), "stride": 2},
    "metric groups": {"metric_groups": 2},
    "metric groups in a group": {"metric_groups": 4, "groups": 2, "mask": True, "batch": 3},
    "groups in a metric group": {"metric_groups": 2, "groups": 4, "out_channels": 8, "mask": True, "stride": 2},
    "depthwise, metric groups": {"metric_groups": 2, "groups": 4, "out_channels": 4, "batch": 1},
    "groups across metric groups": {"channels": 6, "metric_groups": 3, "groups": 2, "mask": True},
    "metric groups, free taps": {"metric_groups": 2, "kernel_size": None, "padding": 0},
    "image below the kernel": {"size": (2, 3), "kernel_size": (5, 5), "padding": 2},
}


def problem(
    batch=2,
    channels=4,
    out_channels=6,
    size=(5, 4),
    kernel_size=(3, 3),
    stride=1,
    padding=1,
    dilation=1,
    groups=1,
    metric_groups=1,
    bias=True,
    mask=False,
    spread=1.5,
    dtype=torch.float64,
):
    """Random tensors and the keyword arguments of `ball_conv2d`; positions reach outside the image.

    They keep off the pixels, where the derivative jumps and rounding chooses the side.
    """
    sizes = kernel_size or (1, 1)
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(size, pair(padding), pair(dilation), sizes, pair(stride), strict=True)
    ]
    taps = 5 if kernel_size is None else math.prod(kernel_size)
    wide = torch.promote_types(dtype, torch.float32)
    positions = spread * torch.randn(batch, metric_groups * taps, 2, *out, dtype=torch.float64)
    positions = (2 * positions).floor() / 2 + 0.02 + 0.46 * torch.rand_like(positions)
    tensors = {
        "x": torch.randn(batch, channels, *size, dtype=dtype),
        "samples": positions.to(wide),
        "weight": torch.randn(out_channels, channels // groups, *(kernel_size or (taps,)), dtype=dtype),
        "bias": torch.randn(out_channels, dtype=dtype) if bias else None,
        "mask": torch.rand(batch, metric_groups * taps, *out, dtype=torch.float64).to(wide) if mask else None,
    }
    return tensors, {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


def outputs_and_gradients(function, tensors, arguments, dtype=None):
    leaves = {
        key: None if value is None else value.detach().to(dtype or value.dtype, copy=True).requires_grad_()
        for key, value in tensors.items()
    }
    out = function(**leaves, **arguments)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).cos()
    (out.double() * cotangent).sum().backward()
    return {"out": out.detach()} | {key: leaf.grad for key, leaf in leaves.items() if leaf is not None}


def compare(actual, expected, tolerance):
    """Every tensor to `tolerance` of its largest value."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].shape == value.shape, key
        error, size = (actual[key].double() - value.double()).abs(), value.double().abs()
        if value.numel():
            assert error.max() <= tolerance * (1e-3 + size.max()), f"{key}: {error.max()} of {size.max()}"


@functools.cache
def solved_by_the_loop(case, dtype):
    tensors, arguments = problem(**CASES[case], dtype=dtype)
    return tensors, arguments, outputs_and_gradients(loop, tensors, arguments, torch.float64)


@backends
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop(case, backend):
    tensors, arguments, expected = solved_by_the_loop(case, DTYPE[backend])
    if not can_take(backend, tensors, arguments["groups"]):
        pytest.skip("free taps, or groups across metric groups, are nothing for it")
    actual = outputs_and_gradients(functools.partial(ball_conv2d, backend=backend), tensors, arguments)
    compare(actual, expected, tolerance_of(backend))


@pytest.mark.parametrize("backend", [name for name in RUNNABLE if name != "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize(
    "case", ["plain", "mask, groups, stride", "depthwise", "free taps", "one pixel", "metric groups in a group"]
)
def test_equals_the_reference_in_low_precision(case, dtype, tolerance, backend):
    """Against the reference on the same (rounded) tensors in float64; every result keeps its dtype."""
    tensors, arguments = problem(**{"channels": 8, "size": (9, 11)} | CASES[case], dtype=dtype)
    if not can_take(backend, tensors, arguments["groups"]):
        pytest.skip("free taps, or groups across metric groups, are nothing for it")
    actual = outputs_and_gradients(functools.partial(ball_conv2d, backend=backend), tensors, arguments)
    reference = functools.partial(ball_conv2d, backend="reference")
    compare(actual, outputs_and_gradients(reference, tensors, arguments, torch.float64), tolerance)
    assert {key: value.dtype for key, value in actual.items()} == {"out": dtype} | {
        key: value.dtype for key, value in tensors.items() if value is not None
    }


@backends
def test_many_pieces(backend):
    """Large enough for several pieces of columns, in the forward and in the backward pass."""
    tensors, arguments = problem(batch=3, channels=64, out_channels=3, size=(31, 27), spread=2, mask=True)
    tensors = {key: value.float() for key, value in tensors.items()}
    actual = outputs_and_gradients(functools.partial(ball_conv2d, backend=backend), tensors, arguments)
    reference = functools.partial(ball_conv2d, backend="reference")
    compare(actual, outputs_and_gradients(reference, tensors, arguments, torch.float64), 1e-4)


@backends
@pytest.mark.parametrize("grouped", [False, True])
def test_batch_of_0(grouped, backend):
    tensors, arguments = problem(batch=0, mask=grouped, groups=2 if grouped else 1, dtype=DTYPE[backend])
    result = outputs_and_gradients(functools.partial(ball_conv2d, backend=backend), tensors, arguments)
    assert result["out"].shape == (0, 6, 5, 4)
    for key, value in tensors.items():
        assert value is None or torch.equal(result[key], torch.zeros_like(value)), key


@backends
@pytest.mark.parametrize("layout", ["channels-last", "strided", "expanded", "flipped"])
def test_memory_layouts(layout, backend):
    tensors, arguments = problem(mask=True, groups=2, dtype=DTYPE[backend])
    function = functools.partial(ball_conv2d, backend=backend)

    def lay(value):
        if layout == "channels-last":
            return value.to(memory_format=torch.channels_last) if value.dim() == 4 else value
        if layout == "strided":
            return torch.stack((value, torch.full_like(value, math.nan)), -1)[..., 0]
        return value.flip(-1).contiguous().flip(-1) if layout == "flipped" else value

    if layout == "expanded":
        tensors["samples"] = tensors["samples"][:1, :, :, :1, :1].expand_as(tensors["samples"])
    expected = outputs_and_gradients(function, {k: v.contiguous() for k, v in tensors.items()}, arguments)
    leaves = {key: value.detach().clone().requires_grad_() for key, value in tensors.items()}
    out = function(**{key: lay(value) for key, value in leaves.items()}, **arguments)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).cos()
    (out * cotangent).sum().backward()
    compare(
        {"out": out.detach()} | {key: leaf.grad for key, leaf in leaves.items()}, expected, tolerance_of(backend, 1e-12)
    )


@backends
@pytest.mark.parametrize("needed", CHECKED)
def test_one_gradient_alone(needed, backend):
    tensors, arguments = problem(mask=True, groups=2, dtype=DTYPE[backend])
    function = functools.partial(ball_conv2d, backend=backend)
    expected = outputs_and_gradients(function, tensors, arguments)[needed]
    tensors[needed].requires_grad_()
    out = function(**tensors, **arguments)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).cos()
    (gradient,) = torch.autograd.grad((out * cotangent).sum(), tensors[needed])
    torch.testing.assert_close(gradient, expected, rtol=tolerance_of(backend), atol=tolerance_of(backend))


@backends
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "arguments", [{}, {"stride": 2, "padding": 3}, {"dilation": (2, 3), "groups": 2, "padding": (4, 5)}]
)
def test_lattice_is_conv2d(arguments, kernel_size, backend):
    dtype = DTYPE[backend]
    x = torch.randn(2, 4, 13, 14, dtype=dtype)
    weight = torch.randn(6, 4 // arguments.get("groups", 1), kernel_size, kernel_size, dtype=dtype)
    bias = torch.randn(6, dtype=dtype)
    expected = F.conv2d(x, weight, bias, **arguments)
    dilation = pair(arguments.get("dilation", 1))
    axis = torch.arange(kernel_size, dtype=dtype) - (kernel_size - 1) / 2
    lattice = torch.stack([torch.stack((dilation[1] * column, dilation[0] * row)) for row in axis for column in axis])
    positions = lattice[None, :, :, None, None].expand(2, -1, -1, *expected.shape[2:])
    out = ball_conv2d(x, positions, weight, bias, **arguments, backend=backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance_of(backend, 1e-12))


@backends
@pytest.mark.parametrize("place", [-2.0, -1.0, -0.5, 0.0, 1.0, 2.5, 3.0, 4.0, 5.0])
@pytest.mark.parametrize("axis", ["x", "y"])
def test_on_a_pixel_the_derivative_is_the_right_one(place, axis, backend):
    """A ramp of four values along one axis: value and derivative from the right of its interpolation, zero outside."""
    dtype = DTYPE[backend]
    image = torch.tensor([3.0, 5.0, 11.0, 2.0], dtype=dtype)
    x = image.view(1, 1, 1, 4) if axis == "x" else image.view(1, 1, 4, 1)
    # one output pixel, whose centre is pixel (0, 0): stride beyond the image
    positions = torch.zeros(1, 1, 2, 1, 1, dtype=dtype)
    positions[0, 0, 0 if axis == "x" else 1] = place
    positions.requires_grad_()
    out = ball_conv2d(x, positions, torch.ones(1, 1, 1, 1, dtype=dtype), stride=9, backend=backend)
    (gradient,) = torch.autograd.grad(out.sum(), positions)
    padded = F.pad(image, (4, 4))
    left = math.floor(place) + 4
    assert out.item() == pytest.approx(torch.lerp(padded[left], padded[left + 1], place - math.floor(place)).item())
    along = gradient[0, 0, 0 if axis == "x" else 1].item()
    assert along == pytest.approx((padded[left + 1] - padded[left]).item())


@backends
@pytest.mark.parametrize("place", [-1e-9, 1e-9, 1 - 6e-8, 3 + 3e-7, -1 + 6e-8, -1 - 2e-7, 4 - 3e-7])
@pytest.mark.parametrize("axis", ["x", "y"])
def test_beside_a_pixel_in_float32(place, axis, backend):
    """Rounding may choose the side, but the derivative is that of one of the two sides."""
    image = torch.tensor([3.0, 5.0, 11.0, 2.0])
    positions = torch.zeros(1, 1, 2, 1, 1)
    positions[0, 0, 0 if axis == "x" else 1] = place
    positions.requires_grad_()
    x = image.view(1, 1, 1, 4) if axis == "x" else image.view(1, 1, 4, 1)
    out = ball_conv2d(x, positions, torch.ones(1, 1, 1, 1), stride=9, backend=backend)
    gradient = torch.autograd.grad(out.sum(), positions)[0][0, 0, 0 if axis == "x" else 1].item()
    left, here, right = F.pad(image, (4, 4))[round(place) + 3 : round(place) + 6].tolist()
    assert out.item() == pytest.approx(here, abs=1e-4)
    assert min(abs(gradient - (here - left)), abs(gradient - (right - here))) < 1e-4


@backends
def test_far_outside_is_zero(backend):
    tensors, arguments = problem(dtype=torch.float32)
    for far in (7.0, 1e3, 1e9, 1e20):
        far = tensors | {"samples": far * torch.randn_like(tensors["samples"]).sign()}
        result = outputs_and_gradients(functools.partial(ball_conv2d, backend=backend), far, arguments)
        torch.testing.assert_close(result["out"], tensors["bias"][:, None, None].expand_as(result["out"]))
        assert not result["x"].any() and not result["samples"].any() and not result["weight"].any()


@backends
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_positions_that_are_no_numbers(bad, backend):
    """They may spoil what reads them, and nothing else; and nothing crashes."""
    tensors, arguments = problem(dtype=torch.float32)
    good = outputs_and_gradients(functools.partial(ball_conv2d, backend=backend), tensors, arguments)
    spoilt = tensors | {"samples": tensors["samples"].clone()}
    spoilt["samples"][0, 4, :, 2, 1] = bad
    result = outputs_and_gradients(functools.partial(ball_conv2d, backend=backend), spoilt, arguments)
    elsewhere = torch.ones(2, 5, 4, dtype=torch.bool)
    elsewhere[0, 2, 1] = False
    for key in ("out", "samples"):
        here, there = (value[key].flatten(1, -3).movedim(1, -1)[elsewhere] for value in (result, good))
        torch.testing.assert_close(here, there)
    torch.testing.assert_close(result["x"][1], good["x"][1])


@pytest.mark.parametrize("backend", [name for name in RUNNABLE if DTYPE[name] == torch.float64])
def test_gradcheck(backend):
    tensors, arguments = problem(batch=1, channels=2, out_channels=2, size=(4, 3), groups=2, mask=True)
    tensors = [tensors[key].requires_grad_() for key in CHECKED]

    def function(*values):
        return ball_conv2d(**dict(zip(CHECKED, values, strict=True)), **arguments, backend=backend)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=False)


def test_reference_has_second_derivatives():
    tensors, arguments = problem(batch=1, channels=1, out_channels=1, size=(3, 3))
    leaves = [tensors[key].requires_grad_() for key in CHECKED[:3]]
    assert torch.autograd.gradgradcheck(
        lambda x, positions, weight: ball_conv2d(x, positions, weight, **arguments, backend="reference"), leaves
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 5, 4)}, ValueError, r"x: expected \[B, C_in, H, W\]"),
        ({"x": torch.zeros(2, 3, 5, 4)}, ValueError, "weight: .*3 channels"),
        ({"groups": 2}, ValueError, "weight: .*groups=2"),
        ({"weight": torch.zeros(6, 4)}, ValueError, "weight: expected"),
        ({"weight": torch.zeros(6, 4, 2, 2)}, ValueError, "samples: expected"),
        ({"samples": torch.zeros(2, 9, 2, 5, 5)}, ValueError, "samples: expected .*2, 9, 2, 5, 4.*2, 9, 2, 5, 5"),
        ({"samples": torch.zeros(1, 9, 2, 5, 4)}, ValueError, "samples: expected"),
        ({"stride": 2}, ValueError, "samples: expected"),
        ({"stride": 0}, ValueError, "stride=0: expected an integer of at least 1"),
        ({"stride": (1, 1, 1)}, ValueError, r"stride=\(1, 1, 1\)"),
        ({"padding": "same"}, ValueError, "padding='same'"),
        ({"x": torch.zeros(2, 4, 5, 4, dtype=torch.complex64)}, TypeError, "x: expected real .*complex64"),
        ({"x": torch.zeros(2, 4, 5, 4).long()}, TypeError, "x: expected real .*int64"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias: expected \[C_out\] = \(6,\), got \(5,\)"),
        ({"bias": torch.zeros(1)}, ValueError, "bias: expected"),
        ({"samples": torch.zeros(2, 9, 2, 5, 4).bfloat16()}, TypeError, "samples: .*bfloat16"),
        ({"samples": torch.zeros(2, 9, 2, 5, 4).long()}, TypeError, "samples: .*int64"),
        ({"mask": torch.ones(2, 9, 5, 5)}, ValueError, "mask: expected"),
        ({"backend": "cudnn"}, ValueError, "backend='cudnn': expected one of compiled"),
        ({"backend": "torchvision", "weight": torch.zeros(6, 4, 9), "padding": 0}, ValueError, "torchvision.*cannot"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    tensors, arguments = problem(dtype=torch.float32)
    with pytest.raises(error, match=message):
        ball_conv2d(**tensors | arguments | change)


@backends
def test_autocast_keeps_positions_in_float32(backend):
    """Teeth of period 2, read at 250 + a fraction: in bfloat16 such positions would be whole."""
    fraction = torch.tensor([0.125, 0.375, 0.625, 0.875])
    x = (torch.arange(260) % 2).float().expand(1, 1, 2, 260).clone().requires_grad_()
    positions = torch.full((1, 4, 2, 1, 259), -0.5)
    positions[0, :, 0, 0] = 250 + fraction[:, None] - (torch.arange(259) + 0.5)
    positions.requires_grad_()
    weight = torch.eye(4).view(4, 1, 2, 2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = ball_conv2d(x, positions, weight, backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.float(), fraction[None, :, None, None].expand_as(out))
    out.float().sum().backward()
    assert x.grad.dtype == positions.grad.dtype == weight.grad.dtype == torch.float32
    assert torch.equal(positions.grad[:, :, 0], torch.ones(1, 4, 1, 259))


@backends
def test_autocast_leaves_float64_alone(backend):
    tensors, arguments = problem()
    if not can_take(backend, tensors):
        with pytest.raises(ValueError, match=f"backend='{backend}' cannot compute this call: .*float64"):
            ball_conv2d(**tensors, **arguments, backend=backend)
        return
    with torch.autocast("cpu", torch.bfloat16):
        out = ball_conv2d(**tensors, **arguments, backend=backend)
    assert out.dtype == torch.float64 and torch.equal(out, ball_conv2d(**tensors, **arguments, backend=backend))


@pytest.mark.parametrize("backend", ["compiled", "torchvision"])
@pytest.mark.parametrize("case", ["plain", "depthwise", "stride", "free taps", "mask, groups, stride"])
def test_flops(case, backend):
    """A bilinear sample is four multiply-adds a channel, and a multiply-add is two operations."""
    tensors, arguments = problem(**CASES[case], dtype=torch.float32)
    if not can_take(backend, tensors, arguments["groups"]):
        pytest.skip("free taps are nothing for it")
    tensors = {key: None if value is None else value.requires_grad_() for key, value in tensors.items()}
    with FlopCounterMode(display=False) as counter:
        out = ball_conv2d(**tensors, **arguments, backend=backend)
    batch, taps, _, height, width = tensors["samples"].shape
    samples = batch * taps * height * width
    gather, product = (
        4 * samples * tensors["x"].shape[1],
        samples
        * tensors["weight"][:, :, 0].numel()
        // (tensors["weight"].shape[3] if tensors["weight"].dim() == 4 else 1),
    )
    assert counter.get_total_flops() == 2 * (gather + product)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * (3 * gather + 2 * product)


@backends
def test_compiles_without_a_break(backend):
    tensors, arguments = problem(mask=True, groups=2, dtype=torch.float32)

    def function(**tensors):
        return 2 * ball_conv2d(**tensors, **arguments, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    compare(outputs_and_gradients(compiled, tensors, {}), outputs_and_gradients(function, tensors, {}), 1e-6)


# the reference's gradients are torch's index_put, which adds with atomics
@pytest.mark.parametrize("backend", [name for name in RUNNABLE if name != "reference"])
def test_gradients_are_deterministic(backend, set_threads):
    """The same bits twice, with many samples on one pixel and several threads."""
    set_threads(2)
    tensors, arguments = problem(batch=2, channels=32, size=(40, 40), spread=0.1, mask=True, dtype=torch.float32)
    first, second = (
        outputs_and_gradients(functools.partial(ball_conv2d, backend=backend), tensors, arguments) for _ in range(2)
    )
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def recorded(monkeypatch):
    """The names of the backends that are called."""
    called = []
    for name, row in BACKENDS.items():

        def record(*args, name=name, function=row.function):
            called.append(name)
            return function(*args)

        monkeypatch.setitem(BACKENDS, name, row._replace(function=record))
    return called


def test_what_is_named_runs_and_the_default_is_the_first_that_can(monkeypatch):
    called = recorded(monkeypatch)
    tensors, arguments = problem(dtype=torch.float32)
    ball_conv2d(**tensors, **arguments)
    for name in RUNNABLE:
        ball_conv2d(**tensors, **arguments, backend=name)
    assert called == ["compiled", *RUNNABLE]


@pytest.mark.parametrize(
    ("case", "dtype", "expected"),
    [
        ("plain", torch.bfloat16, "compiled"),
        ("free taps", torch.float32, "compiled"),
        ("plain", torch.float64, "torchvision"),
        ("groups across metric groups", torch.float32, "torchvision"),
        ("free taps", torch.float64, "reference"),
    ],
)
def test_the_default_on_a_cpu(case, dtype, expected, monkeypatch):
    called = recorded(monkeypatch)
    tensors, arguments = problem(**CASES[case], dtype=dtype)
    ball_conv2d(**tensors, **arguments)
    assert called == [expected]


def test_the_environment_names_what_to_prefer(monkeypatch):
    called = recorded(monkeypatch)
    monkeypatch.setattr(dispatch, "PREFERRED", "torchvision")
    for change in ({}, {"kernel_size": None, "padding": 0}):
        tensors, arguments = problem(**change, dtype=torch.float32)
        ball_conv2d(**tensors, **arguments)
    # free taps are nothing for torchvision
    assert called == ["torchvision", "compiled"]
    monkeypatch.setattr(dispatch, "PREFERRED", "cudnn")
    with pytest.raises(ValueError, match="TIMM_METRICCONV_BACKEND='cudnn': expected one of"):
        ball_conv2d(**tensors, **arguments)


@pytest.mark.parametrize("case", ["plain", "depthwise"])
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_computes_by_itself(case, threads, set_threads):
    """Its operators run, and no other backend's."""
    set_threads(threads)
    tensors, arguments = problem(**CASES[case], dtype=torch.float32)
    with torch.profiler.profile() as profile:
        outputs_and_gradients(functools.partial(ball_conv2d, backend="compiled"), tensors, arguments)
    ran = {event.key for event in profile.key_averages() if event.key.startswith("timm_metricconv::")}
    assert ran == {"timm_metricconv::compiled_conv2d", "timm_metricconv::compiled_conv2d_backward"}


# --- a pattern under affine maps -------------------------------------------------------------------------------------

AFFINE = {
    "lattice": {},
    "onion": {"pattern": "onion"},
    "polar, stride, groups": {"pattern": "polar", "stride": 2, "groups": 2},
    "far away": {"spread": 5.0},
    "mask": {"mask": True, "batch": 3},
    "even kernel": {"kernel_size": (2, 2)},
    "dilation": {"dilation": 2, "padding": 2},
    "one pixel": {"size": (1, 1)},
    "batch of 1": {"batch": 1, "size": (7, 5)},
    "batch of 0": {"batch": 0},
    "metric groups": {"metric_groups": 2, "batch": 3},
    "metric groups in a group": {"metric_groups": 4, "groups": 2, "mask": True, "pattern": "polar"},
    "depthwise": {"metric_groups": 2, "groups": 4, "out_channels": 4, "stride": 2},
    "wide, batch of 1": {"batch": 1, "channels": 64, "size": (9, 5), "mask": True},
}


def affine_problem(pattern="lattice", spread=0.4, metric_groups=1, **others):
    """Leaves with `fields` for positions, the arguments, and functions from those leaves: fused, and by positions."""
    tensors, arguments = problem(metric_groups=metric_groups, **others)
    (batch, taps, _, *out), dtype = tensors["samples"].shape, tensors["samples"].dtype
    points = PATTERNS[pattern](math.isqrt(taps // metric_groups), pair(arguments["dilation"])).flatten(0, 1).to(dtype)
    maps = spread * torch.randn(batch, metric_groups, 6, *out, dtype=dtype)
    maps[:, :, [0, 3]] += 1
    leaves = {"x": tensors["x"], "fields": maps.flatten(1, 2)}
    leaves |= {key: tensors[key] for key in ("weight", "bias", "mask")}

    def fused(x, fields, weight, bias, mask, backend=None, **geometry):
        return ball_conv2d(x, Samples(fields, points.to(fields)), weight, bias, mask=mask, backend=backend, **geometry)

    def by_positions(fields, **others):
        linear = fields.unflatten(1, (-1, 6))[:, :, :4].unflatten(2, (2, 2))
        moved = torch.einsum("bgrchw,kc->bgkrhw", linear, points.to(fields))
        positions = moved + fields.unflatten(1, (-1, 1, 6))[:, :, :, 4:]
        return ball_conv2d(samples=positions.flatten(1, 2), backend="reference", **others)

    return leaves, arguments, fused, by_positions


@backends
@pytest.mark.parametrize("case", AFFINE)
def test_affine_samples_equal_their_positions(case, backend):
    leaves, arguments, fused, by_positions = affine_problem(**AFFINE[case], dtype=DTYPE[backend])
    expected = outputs_and_gradients(by_positions, leaves, arguments, torch.float64)
    actual = outputs_and_gradients(functools.partial(fused, backend=backend), leaves, arguments)
    compare(actual, expected, tolerance_of(backend, 1e-9))


@pytest.mark.parametrize("backend", [name for name in RUNNABLE if name != "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("case", ["lattice", "mask", "polar, stride, groups", "metric groups in a group", "depthwise"])
def test_affine_samples_in_low_precision(case, dtype, tolerance, backend):
    leaves, arguments, fused, by_positions = affine_problem(**{"size": (9, 8)} | AFFINE[case], dtype=dtype)
    actual = outputs_and_gradients(functools.partial(fused, backend=backend), leaves, arguments)
    assert actual["out"].dtype == dtype and actual["fields"].dtype == torch.float32
    compare(actual, outputs_and_gradients(by_positions, leaves, arguments, torch.float64), tolerance)


@pytest.mark.parametrize("case", ["lattice", "mask", "metric groups"])
def test_affine_samples_gradcheck(case):
    leaves, arguments, fused, _ = affine_problem(**AFFINE[case] | {"size": (3, 2), "out_channels": 2, "batch": 2})
    leaves = {key: None if value is None else value.requires_grad_() for key, value in leaves.items()}
    assert torch.autograd.gradcheck(lambda *v: fused(*v, **arguments), tuple(leaves.values()), fast_mode=True)


@backends
def test_maps_of_any_memory_layout(backend):
    case = {"mask": True, "batch": 3, "out_channels": 2, "metric_groups": 2}
    leaves, arguments, fused, by_positions = affine_problem(**case, dtype=DTYPE[backend])
    fused = functools.partial(fused, backend=backend)
    expected = outputs_and_gradients(by_positions, leaves, arguments, torch.float64)
    for layout in (torch.channels_last, torch.contiguous_format):
        laid = {key: t.contiguous(memory_format=layout) if t.dim() == 4 else t for key, t in leaves.items()}
        compare(outputs_and_gradients(fused, laid, arguments), expected, tolerance_of(backend, 1e-9))


@backends
def test_a_map_that_is_no_number_stays_in_its_image(backend):
    leaves, arguments, fused, _ = affine_problem(dtype=torch.float32)
    expected = fused(**leaves, **arguments, backend=backend)
    leaves["fields"][0, :, 2, 1] = math.nan
    out = fused(**leaves, **arguments, backend=backend)
    torch.testing.assert_close(out[1], expected[1])


# --- what surrounds the kernels --------------------------------------------------------------------------------------

operators = pytest.mark.parametrize("backend", ["compiled", "torchvision"])
SURROUNDED = {
    "plain": {},
    "one channel": {"channels": 1},
    "one pixel": {"size": (1, 1)},
    "odd channels, depthwise": {"channels": 5, "groups": 5, "out_channels": 5},
    "odd channels, channels-last": {"channels": 7, "out_channels": 5, "layout": torch.channels_last},
    "mask, groups, stride": {"mask": True, "groups": 2, "stride": 2},
    "groups and metric groups": {"metric_groups": 2, "groups": 4, "out_channels": 8, "mask": True},
    "batch of 0": {"batch": 0},
}


@pytest.mark.parametrize(("backend", "affine"), [("compiled", False), ("compiled", True), ("torchvision", False)])
@pytest.mark.parametrize("case", SURROUNDED)
def test_opcheck(case, backend, affine):
    """Schema, fake tensors, autograd and dynamic shapes of a custom op and of its backward op: strides included."""
    case = dict(SURROUNDED[case])
    layout = case.pop("layout", torch.contiguous_format)
    (leaves, arguments, *_), points = affine_problem(**case, dtype=torch.float32), torch.randn(9, 2)
    if not affine:
        points, others = None, problem(**case, dtype=torch.float32)[0]
        leaves["fields"] = others["samples"]
    leaves = {k: None if t is None else t.requires_grad_() for k, t in leaves.items()}
    leaves["x"] = leaves["x"].detach().contiguous(memory_format=layout).requires_grad_()
    tail = [list(pair(arguments[key])) for key in ("stride", "padding", "dilation")] + [arguments["groups"]]
    forward = getattr(torch.ops.timm_metricconv, f"{backend}_conv2d")
    backward = getattr(torch.ops.timm_metricconv, f"{backend}_conv2d_backward")
    torch.library.opcheck(forward.default, (*leaves.values(), *tail, points))
    x, source, weight, _, mask = (None if t is None else t.detach() for t in leaves.values())
    grad = torch.randn_like(forward(x, source, weight, None, mask, *tail, points))
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        arguments = (grad, *needs, x, source, weight, None, mask, *tail, points)
        torch.library.opcheck(backward.default, arguments, test_utils=("test_schema", "test_faketensor"))


@backends
@pytest.mark.parametrize("affine", [False, True])
def test_what_follows_may_work_in_place(affine, backend):
    """As a ReLU does behind a layer without a norm: nothing that the op returns is a view."""
    leaves, arguments, fused, by_positions = affine_problem(groups=2, dtype=torch.float32)
    function = fused if affine else by_positions
    name = {"backend": backend} if affine else {}

    def behind(**leaves):
        return function(**leaves, **name, **arguments).relu_()

    expected = outputs_and_gradients(lambda **leaves: function(**leaves, **name, **arguments).relu(), leaves, {})
    compare(outputs_and_gradients(behind, leaves, {}), expected, 1e-6)


@backends
@pytest.mark.parametrize("affine", [False, True])
def test_second_derivatives(affine, backend):
    """By every backend: a graph of the backward pass is the reference's."""
    small = {"batch": 1, "channels": 2, "out_channels": 2, "size": (3, 2), "mask": True}
    leaves, arguments, fused, by_positions = affine_problem(**small)
    if DTYPE[backend] == torch.float64:
        leaves = {k: t.requires_grad_() for k, t in leaves.items()}
        named = functools.partial(fused, backend=backend) if affine else by_positions
        assert torch.autograd.gradgradcheck(
            lambda *values: named(**dict(zip(leaves, values, strict=True)), **arguments).cos(),
            tuple(leaves.values()),
            fast_mode=True,
        )
        return

    def second(backend, dtype):
        inputs = {k: t.detach().to(dtype).requires_grad_() for k, t in leaves.items()}
        out = fused(**inputs, **arguments, backend=backend).cos().sum()
        first = torch.autograd.grad(out, list(inputs.values()), create_graph=True)
        total = sum(t.square().sum() for t in first)
        return dict(zip(inputs, torch.autograd.grad(total, list(inputs.values())), strict=True))

    compare(second(backend, DTYPE[backend]), second("reference", torch.float64), 1e-4)


@operators
@pytest.mark.parametrize("mask", [False, True])
def test_per_sample_gradients(mask, backend):
    """`vmap` over `grad`: what a loop over the samples gives."""
    leaves, arguments, fused, _ = affine_problem(batch=3, groups=2, mask=mask, dtype=DTYPE[backend])
    mapped = {"x": leaves["x"], "fields": leaves["fields"], "mask": leaves["mask"]}

    def loss(weight, bias, x, fields, mask):
        mask = None if mask is None else mask[None]
        return fused(x[None], fields[None], weight, bias, mask, **arguments, backend=backend).cos().sum()

    gradients = torch.func.grad(loss, argnums=(0, 1))
    shared = leaves["weight"], leaves["bias"]
    in_dims = (None, None, 0, 0, 0 if mask else None)
    actual = torch.vmap(gradients, in_dims)(*shared, *mapped.values())
    for i in range(3):
        one = gradients(*shared, *(None if t is None else t[i] for t in mapped.values()))
        for together, alone in zip(actual, one, strict=True):
            torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-4)


@operators
def test_vmap_and_hessian(backend):
    leaves, arguments, fused, _ = affine_problem(batch=2, channels=2, out_channels=2, size=(3, 2), dtype=DTYPE[backend])
    leaves.pop("mask")
    function = functools.partial(fused, mask=None, **arguments, backend=backend)
    stacked = torch.randn(3, *leaves["x"].shape, dtype=DTYPE[backend])
    weights = torch.randn(3, *leaves["weight"].shape, dtype=DTYPE[backend])
    others = leaves["fields"], leaves["weight"], leaves["bias"]
    images = torch.vmap(lambda x: function(x, *others))(stacked)
    kernels = torch.vmap(lambda w: function(leaves["x"], leaves["fields"], w, leaves["bias"]))(weights)
    for i in range(3):
        torch.testing.assert_close(images[i], function(stacked[i], *others))
        torch.testing.assert_close(kernels[i], function(leaves["x"], leaves["fields"], weights[i], leaves["bias"]))

    def energy(weight, backend):
        out = fused(leaves["x"], leaves["fields"], weight, leaves["bias"], None, **arguments, backend=backend)
        return out.square().sum()

    hessian = torch.func.hessian(energy)(leaves["weight"], backend)
    assert hessian.abs().max() > 0.1
    torch.testing.assert_close(hessian, torch.func.hessian(energy)(leaves["weight"], "reference"), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fields": torch.zeros(2, 7, 5, 4)}, r"samples.fields: expected affine maps .*2, 6, 5, 4.*2, 7, 5, 4"),
        ({"fields": torch.zeros(2, 18, 5, 4)}, "samples.fields: metric_groups=3 must divide the 4 channels"),
        ({"points": torch.zeros(8, 2)}, r"samples.points: expected \[K, 2\] = \(9, 2\), got \(8, 2\)"),
        ({"points": torch.zeros(1, 9, 2)}, r"samples.points: expected \[K, 2\]"),
    ],
)
def test_samples_that_do_not_fit(change, message):
    tensors, arguments = problem(dtype=torch.float32)
    parts = {"fields": torch.zeros(2, 6, 5, 4), "points": torch.zeros(9, 2)} | change
    with pytest.raises(ValueError, match=message):
        ball_conv2d(**tensors | {"samples": Samples(**parts)}, **arguments)


@pytest.mark.parametrize("sampling", ["navigation", "rays"])
@pytest.mark.parametrize("drift", ["whitened", "sigmoid_norm"])
@pytest.mark.parametrize("parametrization", ["frame", "logspd", "spectral"])
def test_layer_computes_what_its_positions_say(parametrization, drift, sampling):
    kind = {"parametrization": parametrization, "drift": drift, "sampling": sampling}
    layer = MetricConv2d(6, 4, 3, stride=2, pattern="onion", **kind)
    torch.nn.init.normal_(layer.predictor.weight, std=0.2)
    x = torch.randn(2, 6, 9, 8)
    results = []
    for layer.backend in (None, "reference"):
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        gradients = torch.autograd.grad(out.cos().sum(), [leaf, *layer.parameters()])
        results.append({str(i): t.detach() for i, t in enumerate((out, *gradients))})
    compare(*results, 1e-4)


def test_samples_of_ones_own_count():
    class Still(MetricConv2d):
        def samples(self, raw):
            return self.points.flatten(0, 1)[None, :, :, None, None].expand_as(place(super().samples(raw)))

    layer = Still(4, 6, 3)
    torch.nn.init.normal_(layer.predictor.weight)
    x = torch.randn(2, 4, 6, 5)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))


def test_what_torchscript_and_export_take():
    """TorchScript refuses `ball_conv2d` itself: docs/works_with.md names these in its place."""
    x, weight, positions = torch.randn(1, 8, 5, 6), torch.randn(4, 8, 3, 3), torch.randn(1, 9, 2, 5, 6)

    class Conv(torch.nn.Module):
        def forward(self, x, positions, weight):
            return ball_conv2d(x, positions, weight, padding=1)

    arguments, pair = (x, positions, weight), [1, 1]
    expected = Conv()(*arguments)
    for program in (torch.jit.trace(Conv(), arguments), torch.export.export(Conv(), arguments).module()):
        torch.testing.assert_close(program(*arguments), expected, rtol=1e-4, atol=1e-5)
    scripted = torch.jit.script(ball_conv2d_reference)
    torch.testing.assert_close(scripted(*arguments, None, None, pair, pair, pair, 1), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only arguments with defaults"):
        torch.jit.script(ball_conv2d)


@pytest.mark.parametrize(("device", "expected"), [("mps", "reference"), ("meta", "reference"), ("cuda", "torchvision")])
def test_the_default_on_other_devices(device, expected):
    """Ordinary operators where nothing was tried, and on CUDA a kernel that ran there."""

    x = torch.empty(1, 1, 3, 3)
    elsewhere = types.SimpleNamespace(device=torch.device(device), dtype=x.dtype)
    assert dispatch.choose(elsewhere, x, x, 1) == expected
