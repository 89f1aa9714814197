"""The Triton kernels against the reference; `test_triton.py` runs this file, in the interpreter where no GPU is."""

import itertools

import pytest
import torch

from timm_metricconv import MetricConv2d
from timm_metricconv.geometry import PATTERNS, randers
from timm_metricconv.ops import BACKENDS, ball_conv2d, fuses_metric
from timm_metricconv.ops.triton_fused import triton_metric_conv2d, why_not

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the interpreter is no target of the compiler")
if why_not(DEVICE, 4) is not None:
    pytest.skip(f"triton cannot run here: {why_not(DEVICE, 4)}", allow_module_level=True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def out_size(size, k, stride, padding, dilation):
    return [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n in size]


def make(
    batch=2, c_in=10, c_out=6, size=(5, 4), k=3, stride=1, padding=1, dilation=1, groups=1, mask=True, bias=True,
    free=False, dtype=torch.float32,
):  # fmt: skip
    """Leaves (x, positions, weight, bias, mask) and the keyword arguments of `ball_conv2d`."""
    arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    taps = 5 if free else k * k
    out = out_size(size, 1 if free else k, stride, padding, dilation)
    leaves = {
        "x": torch.randn(batch, c_in, *size).to(dtype),
        "positions": 2 * torch.randn(batch, taps, 2, *out),
        "weight": torch.randn(c_out, c_in // groups, *([taps] if free else [k, k])).to(dtype),
        "bias": torch.randn(c_out).to(dtype) if bias else None,
        "mask": torch.rand(batch, taps, *out) if mask else None,
    }
    return {name: t if t is None else t.to(DEVICE).requires_grad_() for name, t in leaves.items()}, arguments


def run(leaves, arguments, backend, cotangent=None):
    """The output and the gradient of every leaf."""
    out = ball_conv2d(**leaves, **arguments, backend=backend)
    used = [t for t in leaves.values() if t is not None]
    if cotangent is None:
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, used, cotangent)]


def close(actual, expected, rtol=1e-4, atol=1e-4):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        # relative to the size of the whole: sums of many terms cancel
        scale = e.detach().abs().max().clamp(min=1).item() if e.numel() else 1.0
        torch.testing.assert_close(a, e, rtol=rtol, atol=atol * scale)


CASES = {
    "plain": {},
    "no_mask": {"mask": False, "bias": False, "batch": 1},
    "wide": {"c_in": 70, "c_out": 67, "size": (3, 2)},
    "batch_3_stride_2": {"batch": 3, "stride": 2, "size": (9, 6)},
    "dilation_2": {"dilation": 2, "padding": 2},
    "kernel_2_no_padding": {"k": 2, "padding": 0},
    "groups_2": {"groups": 2, "c_in": 8, "c_out": 6},
    "groups_2_of_33": {"groups": 2, "c_in": 66, "c_out": 34, "size": (3, 2)},
    "groups_4_joined_in_pairs": {"groups": 4, "c_in": 64, "c_out": 8, "size": (3, 2)},
    "depthwise": {"groups": 6, "c_in": 6, "c_out": 6},
    "one_channel": {"c_in": 1, "c_out": 1},
    "free_taps": {"free": True, "padding": 0},
    "one_pixel": {"size": (1, 1)},
    "one_row": {"size": (1, 6), "mask": False},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_the_reference(case):
    leaves, arguments = make(**case)
    close(run(leaves, arguments, "triton"), run(leaves, arguments, "reference"))


DETERMINISTIC = {
    "plain": {"size": (3, 4)},
    "wide": {"c_in": 66, "c_out": 35, "size": (2, 3), "batch": 1, "mask": False},
    "groups_4_joined_in_pairs": {**CASES["groups_4_joined_in_pairs"], "batch": 1},
    "one_row_stride_2": {"size": (1, 6), "batch": 3, "stride": 2},
}


@pytest.mark.parametrize("case", DETERMINISTIC)
def test_deterministic_variant(case, deterministic):
    leaves, arguments = make(**DETERMINISTIC[case])
    first = run(leaves, arguments, "triton")
    if case == "plain":
        assert all(map(torch.equal, first, run(leaves, arguments, "triton")))
    torch.use_deterministic_algorithms(False)
    close(first, run(leaves, arguments, "reference"))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype):
    leaves, arguments = make(c_in=33, c_out=18, size=(4, 3), dtype=dtype)
    close(run(leaves, arguments, "triton"), run(leaves, arguments, "reference"), rtol=2e-2, atol=2e-2)


def test_half_precision_deterministic(deterministic):
    leaves, arguments = make(c_in=9, c_out=8, size=(3, 3), dtype=torch.bfloat16)
    actual = run(leaves, arguments, "triton")
    torch.use_deterministic_algorithms(False)
    close(actual, run(leaves, arguments, "reference"), rtol=2e-2, atol=2e-2)


def test_lattice_positions_equal_conv2d_and_its_one_sided_derivative():
    leaves, arguments = make(mask=False)
    lattice = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=2))).flip(1)
    shape = leaves["positions"].shape
    leaves["positions"] = lattice.to(DEVICE)[None, :, :, None, None].expand(shape).contiguous().requires_grad_()
    actual = run(leaves, arguments, "triton")
    expected = torch.nn.functional.conv2d(leaves["x"], leaves["weight"], leaves["bias"], padding=1)
    close(actual[:1], [expected])
    close(actual, run(leaves, arguments, "reference" if DEVICE == "cuda" else "gather"))


def test_sampling_at_borders_and_far_outside():
    leaves, arguments = make(mask=False, c_in=3, c_out=2)
    positions = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.25, 4.5, 6.0, 1e4, -1e9])
    with torch.no_grad():
        leaves["positions"].copy_(positions[torch.randint(9, leaves["positions"].shape)])
    close(run(leaves, arguments, "triton"), run(leaves, arguments, "reference"))


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf"), 3e38))
def test_no_position_reads_or_writes_outside(value, deterministic):
    leaves, arguments = make(batch=1, c_in=3, c_out=2, k=2)
    with torch.no_grad():
        leaves["positions"][:, ::2] = value
    out, grad_x, *_ = run(leaves, arguments, "triton")
    torch.use_deterministic_algorithms(False)
    again = run(leaves, arguments, "triton")
    assert out.isfinite().all() and grad_x.isfinite().all() and again[1].isfinite().all()
    close([out], [ball_conv2d(**leaves, **arguments, backend="reference")])


def test_empty_batch(deterministic):
    leaves, arguments = make(batch=0)
    for grad, leaf in zip(run(leaves, arguments, "triton")[1:], leaves.values(), strict=True):
        assert grad.shape == leaf.shape and not grad.any()


def test_memory_formats():
    leaves, arguments = make(size=(3, 4))
    expected = run(leaves, arguments, "reference")
    assert run(leaves, arguments, "triton")[0].is_contiguous(memory_format=torch.channels_last)
    for view in (lambda t: t.to(memory_format=torch.channels_last), lambda t: t.repeat_interleave(2, -1)[..., ::2]):
        strided = {name: view(t.detach()) if t.dim() == 4 else t for name, t in leaves.items()}
        strided["positions"] = leaves["positions"].detach().permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
        strided = {name: t.detach().requires_grad_() for name, t in strided.items()}
        cotangent = view(torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE))
        close(run(strided, arguments, "triton", cotangent), expected)


def test_only_the_gradients_asked_for():
    leaves, arguments = make(batch=1, size=(3, 4))
    expected = dict(zip(leaves, run(leaves, arguments, "reference")[1:], strict=True))
    for name in leaves:
        some = {key: t.detach().requires_grad_(key == name) for key, t in leaves.items()}
        out = ball_conv2d(**some, **arguments, backend="triton")
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        close(torch.autograd.grad(out, some[name], cotangent), [expected[name]])


def test_float64_is_left_to_the_reference():
    leaves, arguments = make(size=(3, 3), c_in=2, c_out=2)
    leaves = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    close(run(leaves, arguments, "triton"), run(leaves, arguments, "reference"), 0, 0)


def make_metric(pattern="lattice", k=3, batch=2, size=(4, 3), eps_omega=0.3, eps=0.0, **others):
    """(leaves with fields for positions, arguments, points, positions of leaves)."""
    leaves, arguments = make(batch=batch, size=size, k=k, padding=k // 2, **others)
    out = leaves["positions"].shape[3:]
    lower = torch.randn(batch, 3, *out) * 0.3
    l0, l1, l2 = 1 + lower[:, 0], lower[:, 1], 1 - lower[:, 2]
    drift = 0.3 * torch.randn(batch, 2, *out)
    fields = torch.stack((l0 * l0, l0 * l1, l1 * l1 + l2 * l2, drift[:, 0], drift[:, 1]), 1).to(DEVICE).requires_grad_()
    directions, radii = (t.float().to(DEVICE) for t in PATTERNS[pattern](k))
    points = (radii[:, :, None] * directions).flatten(0, 1)
    directions = directions.repeat(len(radii), 1)

    def positions(fields):
        a, b, d = fields[:, 0], fields[:, 1], fields[:, 2]
        metric = a, b, d, (a * d - b * b).sqrt()
        finsler = randers(directions, metric, fields[:, 3:].permute(0, 2, 3, 1), eps_omega)
        return (points * (1 / (finsler + eps))[..., None]).permute(0, 3, 4, 1, 2)

    del leaves["positions"]
    return {"fields": fields, **leaves}, arguments, points, positions, {"eps_omega": eps_omega, "eps": eps}


def run_metric(leaves, arguments, points, settings):
    x, fields, weight, bias, mask = (leaves[name] for name in ("x", "fields", "weight", "bias", "mask"))
    pairs = [[arguments[name]] * 2 for name in ("stride", "padding", "dilation")]
    out = triton_metric_conv2d(x, fields, weight, bias, mask, *pairs, arguments["groups"], points, **settings)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, [t for t in leaves.values() if t is not None], cotangent)]


METRICS = {
    "lattice": {},
    "onion_with_eps": {"pattern": "onion", "eps": 1e-6, "mask": False},
    "polar": {"pattern": "polar", "stride": 2, "batch": 3, "size": (5, 4), "groups": 2},
    "riemannian": {"eps_omega": 1.0},
    "even_kernel": {"k": 2},
    "bfloat16": {"dtype": torch.bfloat16, "c_in": 20, "c_out": 18},
}


@pytest.mark.parametrize(
    "name, deterministically", [*((name, False) for name in METRICS), ("lattice", True), ("polar", True)]
)
def test_metric_entry_matches_the_positions(name, deterministically):
    case = METRICS[name]
    leaves, arguments, points, positions, settings = make_metric(**case)
    torch.use_deterministic_algorithms(deterministically)
    try:
        actual = run_metric(leaves, arguments, points, settings)
    finally:
        torch.use_deterministic_algorithms(False)
    named = {"positions": positions(leaves["fields"]), **{n: t for n, t in leaves.items() if n != "fields"}}
    out = ball_conv2d(**named, **arguments, backend="reference")
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    used = [t for t in leaves.values() if t is not None]
    expected = [out, *torch.autograd.grad(out, used, cotangent)]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if case.get("dtype") else {"rtol": 2e-4, "atol": 2e-4}
    close(actual, expected, **tolerance)


def test_metric_entry_wants_float32_fields():
    leaves, arguments, points, _, settings = make_metric()
    leaves["fields"] = leaves["fields"].detach().bfloat16()
    with pytest.raises(TypeError, match="float32 fields"):
        run_metric(leaves, arguments, points, settings)


def test_registration():
    groups, fake = 2, ("test_schema", "test_faketensor")
    leaves, arguments = make(batch=1, size=(2, 3), k=2, padding=1, c_in=4, c_out=2, groups=groups)
    pairs = [[arguments[name]] * 2 for name in ("stride", "padding", "dilation")]
    ops = torch.ops.timm_metricconv
    torch.library.opcheck(ops.triton_conv2d.default, (*leaves.values(), *pairs, groups))
    x, positions, weight, _, mask = (t.detach() for t in leaves.values())
    grad = torch.randn(1, 2, *positions.shape[3:], device=DEVICE)
    backward = (grad, x, positions, weight, mask, *pairs, groups)
    for needs in ((True, True, True), (False, True, False), (True, False, False), (False, False, True)):
        torch.library.opcheck(ops.triton_conv2d_backward.default, (*backward, *needs), test_utils=fake)

    leaves, arguments, points, _, settings = make_metric(batch=1, k=2, size=(2, 3), c_in=4, c_out=2, groups=groups)
    x, fields, weight, bias, mask = (leaves[name] for name in ("x", "fields", "weight", "bias", "mask"))
    metric = (points, *settings.values())
    torch.library.opcheck(ops.triton_conv2d.default, (x, fields, weight, bias, mask, *pairs, groups, *metric))
    x, fields, weight, mask = (t.detach() for t in (x, fields, weight, mask))
    backward = (grad, x, fields, weight, mask, *pairs, groups, True, True, True, *metric)
    torch.library.opcheck(ops.triton_conv2d_backward.default, backward, test_utils=fake)


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    leaves, arguments, points, positions, settings = make_metric(mask=False)
    with FlopCounterMode(display=False) as counter:
        run_metric(leaves, arguments, points, settings)
    counts.append(counter.get_total_flops())
    named = {"positions": positions(leaves["fields"]).detach().requires_grad_(), "mask": None}
    named.update({name: leaves[name] for name in ("x", "weight", "bias")})
    with FlopCounterMode(display=False) as counter:
        run(named, arguments, "triton")
    counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_choice_of_backend():
    assert list(BACKENDS).index("triton") < list(BACKENDS).index("torchvision")
    leaves, arguments = make(batch=1, size=(3, 3), c_in=2, c_out=2)
    name = ball_conv2d(**leaves, **arguments).grad_fn.name()
    assert ("gather" if DEVICE == "cpu" else "triton") in name


@pytest.mark.parametrize("compiler", ("aot_eager", pytest.param("inductor", marks=needs_gpu)))
def test_compiles_without_graph_breaks(compiler):
    leaves, arguments = make(batch=1, size=(4, 4), c_in=4, c_out=3)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **kw: ball_conv2d(**kw, **arguments, backend="triton"), fullgraph=True, backend=compiler
    )
    out = compiled(**leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    close([out, *torch.autograd.grad(out, list(leaves.values()), cotangent)], run(leaves, arguments, "reference"))


def test_activation_checkpointing():
    leaves, arguments = make(batch=1, size=(4, 4), c_in=4, c_out=3)
    out = torch.utils.checkpoint.checkpoint(
        lambda **kw: ball_conv2d(**kw, **arguments, backend="triton"), use_reentrant=False, **leaves
    )
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    close([out, *torch.autograd.grad(out, list(leaves.values()), cotangent)], run(leaves, arguments, "reference"))


@needs_gpu
def test_cuda_graph():
    leaves, arguments = make(batch=1, mask=False)
    expected = run(leaves, arguments, "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(leaves, arguments, "triton", torch.ones_like(expected[0]))
    graph.replay()
    close(captured, run(leaves, arguments, "triton", torch.ones_like(expected[0])))


@needs_gpu
def test_more_than_two_to_the_31_elements():
    x = torch.randn(5, 256, 1300, 1300, device=DEVICE, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    weight = torch.randn(4, 256, 1, device=DEVICE, dtype=torch.bfloat16)
    positions = torch.zeros(5, 1, 2, 1300, 1300, device=DEVICE)
    out = ball_conv2d(x, positions, weight, backend="triton")
    close([out], [torch.nn.functional.conv2d(x, weight[..., None])], 2e-2, 2e-2)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"modulated": True, "stride": 2},
        {"parametrization": "cholesky", "drift": "sigmoid_norm", "pattern": "onion", "eps_omega": 1.0},
        {"pattern": "polar"},
    ],
)
def test_layer_takes_the_fused_metric(arguments):
    layer = MetricConv2d(6, 8, 3, backend="triton", **arguments).to(DEVICE)
    torch.nn.init.normal_(layer.predictor.weight, std=0.2)
    x = torch.randn(2, 6, 7, 5, device=DEVICE, requires_grad=True)
    assert fuses_metric(x, layer.weight, "triton")
    results = []
    for layer.backend in ("triton", "reference"):
        out = layer(x)
        cotangent = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)
        results.append([out, *torch.autograd.grad(out, [x, *layer.parameters()], cotangent)])
    for value, truth in zip(*results, strict=True):
        assert (value - truth).norm() <= 1e-4 * truth.norm()
