"""The Triton kernels against the reference; `test_triton.py` runs this file, in the interpreter where no GPU is."""

import itertools

import pytest
import torch

from timm_metricconv import MetricConv2d
from timm_metricconv.geometry import PATTERNS
from timm_metricconv.ops import Samples, ball_conv2d, why_not_on
from timm_metricconv.ops.triton_common import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the interpreter is no target of the compiler")
if why_not_on(DEVICE, "triton") is not None:
    pytest.skip(f"triton cannot run here: {why_not_on(DEVICE, 'triton')}", allow_module_level=True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def lattice(k):
    return torch.tensor(list(itertools.product(range(k), repeat=2)), dtype=torch.float32).flip(1) - (k - 1) / 2


def make(
    batch=2, c_in=10, c_out=6, size=(5, 4), k=3, stride=1, padding=1, dilation=1, groups=1, balls=1, mask=True,
    bias=True, free=False, dtype=torch.float32, affine=False, pattern="lattice",
):  # fmt: skip
    """Leaves (x, source, weight, bias, mask), the keyword arguments of `ball_conv2d` and its samples, of a source."""
    arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    taps = 5 if free else k * k
    out = [(n + 2 * padding - dilation * ((1 if free else k) - 1) - 1) // stride + 1 for n in size]
    if affine:
        points = PATTERNS[pattern](k).flatten(0, 1).float().to(DEVICE)
        source = 0.3 * torch.randn(batch, balls, 6, *out)
        source[:, :, (0, 3)] += 1
        source = source.flatten(1, 2)
    else:
        source = 2 * torch.randn(batch, balls * taps, 2, *out)
    leaves = {
        "x": torch.randn(batch, c_in, *size).to(dtype),
        "source": source,
        "weight": torch.randn(c_out, c_in // groups, *([taps] if free else [k, k])).to(dtype),
        "bias": torch.randn(c_out).to(dtype) if bias else None,
        "mask": torch.rand(batch, balls * taps, *out) if mask else None,
    }
    leaves = {name: t if t is None else t.to(DEVICE).requires_grad_() for name, t in leaves.items()}
    return leaves, arguments, (lambda fields: Samples(fields, points)) if affine else lambda positions: positions


def apply(leaves, arguments, samples, backend):
    source, *others = (leaves[name] for name in ("source", "weight", "bias"))
    return ball_conv2d(leaves["x"], samples(source), *others, mask=leaves["mask"], **arguments, backend=backend)


def run(leaves, arguments, samples, backend, cotangent=None):
    """The output and the gradient of every leaf."""
    out = apply(leaves, arguments, samples, backend)
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


def matches(call, **tolerances):
    close(run(*call, "triton"), run(*call, "reference"), **tolerances)


DEPTHWISE = {"groups": 8, "c_in": 8, "c_out": 8}
CASES = {
    "plain": {},
    "no_mask": {"mask": False, "bias": False, "batch": 1},
    "wide": {"c_in": 70, "c_out": 67, "size": (3, 2), "k": 2},
    "batch_3_stride_2": {"batch": 3, "stride": 2, "size": (9, 6)},
    "dilation_2": {"dilation": 2, "padding": 2, "batch": 1},
    "kernel_2_no_padding": {"k": 2, "padding": 0},
    "groups_2_of_33": {"groups": 2, "c_in": 66, "c_out": 34, "k": 2, "size": (3, 2)},
    "groups_4_joined_in_pairs": {"groups": 4, "c_in": 64, "c_out": 8, "size": (3, 2)},
    "one_channel": {"c_in": 1, "c_out": 1},
    "free_taps": {"free": True, "padding": 0},
    "one_pixel": {"size": (1, 1)},
    "one_row": {"size": (1, 6), "mask": False},
    "balls_2": {"balls": 2, "batch": 3, "size": (3, 4), "k": 2},
    "balls_and_groups_2": {"balls": 2, "groups": 2, "c_in": 8, "size": (3, 4), "stride": 2},
    "balls_2_groups_4_joined_in_pairs": {"balls": 2, "groups": 4, "c_in": 64, "c_out": 8, "size": (3, 2), "batch": 1},
    "balls_4_groups_2_wide": {"balls": 4, "groups": 2, "c_in": 72, "c_out": 4, "k": 2, "size": (2, 2), "padding": 0},
    "affine": {"affine": True},
    "affine_onion_no_mask": {"affine": True, "pattern": "onion", "mask": False, "batch": 1},
    "affine_polar_stride_2": {"affine": True, "pattern": "polar", "stride": 2, "batch": 3, "groups": 2},
    "affine_even_kernel": {"affine": True, "k": 2, "padding": 1},
    "affine_balls_4_groups_2": {"affine": True, "balls": 4, "groups": 2, "c_in": 8, "size": (3, 3), "stride": 2},
    "affine_balls_2_groups_4": {"affine": True, "balls": 2, "groups": 4, "c_in": 8, "c_out": 4, "size": (3, 3)},
    "depthwise": DEPTHWISE,
    "depthwise_kernel_5_stride_2": {**DEPTHWISE, "k": 5, "padding": 2, "stride": 2, "batch": 3, "size": (7, 5)},
    "depthwise_free_taps_one_row": {**DEPTHWISE, "free": True, "padding": 0, "size": (1, 6), "mask": False},
    "depthwise_uneven_channels": {"groups": 70, "c_in": 70, "c_out": 70, "size": (3, 2), "bias": False, "batch": 1},
    "depthwise_balls_4": {**DEPTHWISE, "balls": 4, "size": (3, 3)},
    "depthwise_affine": {**DEPTHWISE, "affine": True, "pattern": "onion"},
    "depthwise_affine_balls_3": {"groups": 36, "c_in": 36, "c_out": 36, "affine": True, "balls": 3, "batch": 1},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_the_reference(case):
    matches(make(**case))


HALF = {
    "dense": {"c_in": 33, "c_out": 18, "size": (4, 3)},
    "affine_balls": {"affine": True, "c_in": 32, "c_out": 18, "balls": 2, "size": (4, 3), "batch": 1},
    "depthwise": {**DEPTHWISE, "balls": 2},
    "depthwise_affine": {**DEPTHWISE, "affine": True},
}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("case", HALF.values(), ids=HALF)
def test_half_precision(case, dtype):
    matches(make(**case, dtype=dtype), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("case", ({}, DEPTHWISE), ids=("dense", "depthwise"))
def test_lattice_positions_equal_conv2d_and_its_one_sided_derivative(case):
    leaves, *others = make(mask=False, **case)
    shape = leaves["source"].shape
    leaves["source"] = lattice(3).to(DEVICE)[None, :, :, None, None].expand(shape).contiguous().requires_grad_()
    actual = run(leaves, *others, "triton")
    groups = others[0]["groups"]
    expected = torch.nn.functional.conv2d(leaves["x"], leaves["weight"], leaves["bias"], padding=1, groups=groups)
    close(actual[:1], [expected])
    close(actual, run(leaves, *others, "reference"))


@pytest.mark.parametrize("case", ({"c_in": 3, "c_out": 2}, DEPTHWISE), ids=("dense", "depthwise"))
def test_sampling_at_borders_and_far_outside(case):
    leaves, *others = make(mask=False, **case)
    positions = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.25, 4.5, 6.0, 1e4, -1e9])
    with torch.no_grad():
        leaves["source"].copy_(positions[torch.randint(9, leaves["source"].shape)])
    matches((leaves, *others))


@pytest.mark.parametrize("case", ({"c_in": 3, "c_out": 2}, DEPTHWISE), ids=("dense", "depthwise"))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf"), 3e38))
def test_no_position_reads_or_writes_outside(value, case):
    leaves, *others = make(batch=1, k=2, **case)
    with torch.no_grad():
        leaves["source"][:, ::2] = value
    out, grad_x, *_ = run(leaves, *others, "triton")
    assert out.isfinite().all() and grad_x.isfinite().all()
    close([out], [apply(leaves, *others, "reference")])


def torn(shape):
    return lattice(3)[:, :, None, None] + 0.7 * torch.arange(shape[4]).remainder(3)


def gathered(shape):
    rows, columns = (torch.arange(float(n)) for n in shape[3:])
    return 0.4 - torch.stack((columns.expand(shape[3:]), rows[:, None].expand(shape[3:])))


# What neighbours add to one pixel is summed before it is written; these tell all cases of who takes whose share.
NEIGHBOURS = {
    "one shift for all": lambda shape: lattice(3)[:, :, None, None] + 0.3,
    "a shift for each image": lambda shape: lattice(3)[:, :, None, None] + 2 * torch.randn(shape[0], 1, 2, 1, 1),
    "every third column torn off": torn,
    "all samples in one place": gathered,
}


@pytest.mark.parametrize("size, batch", (((3, 9), 2), ((18, 4), 1)))
@pytest.mark.parametrize("positions", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_depthwise_neighbours_add_what_each_adds_alone(positions, size, batch):
    leaves, *others = make(size=size, batch=batch, **DEPTHWISE)
    shape = leaves["source"].shape
    leaves["source"] = positions(shape).expand(shape).contiguous().to(DEVICE).requires_grad_()
    matches((leaves, *others))


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter can count")
def test_depthwise_needs_few_atomics(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    written, add = [0], InterpreterBuilder.create_atomic_rmw

    def counting(self, operation, pointer, value, mask, *others):
        written[0] += int(mask.data.sum())
        return add(self, operation, pointer, value, mask, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", counting)
    size = (16, 16)
    leaves, *others = make(batch=1, size=size, **DEPTHWISE)
    shape = leaves["source"].shape
    leaves["source"] = (lattice(3)[:, :, None, None] + 0.3).expand(shape).to(DEVICE).requires_grad_()
    run(leaves, *others, "triton")
    samples = 16 * 16 * 9 * 8
    # four corners each; two tiles of 8×16 pixels have 17·9 corners each, and count some on their rim twice
    assert samples / 2 < written[0] < 1.4 * samples


@pytest.mark.parametrize("case", ({}, DEPTHWISE, {"affine": True, "balls": 2}), ids=("dense", "depthwise", "affine"))
def test_empty_batch(case):
    call = make(batch=0, **case)
    for grad, leaf in zip(run(*call, "triton")[1:], call[0].values(), strict=True):
        assert grad.shape == leaf.shape and not grad.any()


@pytest.mark.parametrize("case", ({}, DEPTHWISE), ids=("dense", "depthwise"))
def test_memory_formats(case):
    leaves, *others = make(size=(3, 4), balls=2, **case)
    expected = run(leaves, *others, "reference")
    assert run(leaves, *others, "triton")[0].is_contiguous(memory_format=torch.channels_last)
    for view in (lambda t: t.to(memory_format=torch.channels_last), lambda t: t.repeat_interleave(2, -1)[..., ::2]):
        strided = {name: view(t.detach()) if t.dim() == 4 else t for name, t in leaves.items()}
        strided["source"] = leaves["source"].detach().permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
        strided = {name: t.detach().requires_grad_() for name, t in strided.items()}
        cotangent = view(torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE))
        close(run(strided, *others, "triton", cotangent), expected)


@pytest.mark.parametrize("case", ({}, DEPTHWISE), ids=("dense", "depthwise"))
def test_only_the_gradients_asked_for(case):
    leaves, *others = make(batch=1, size=(3, 4), **case)
    expected = dict(zip(leaves, run(leaves, *others, "reference")[1:], strict=True))
    for name in leaves:
        some = {key: t.detach().requires_grad_(key == name) for key, t in leaves.items()}
        out = apply(some, *others, "triton")
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        close(torch.autograd.grad(out, some[name], cotangent), [expected[name]])


def test_what_it_cannot_compute_is_refused():
    leaves, *others = make(size=(3, 3), c_in=2, c_out=2)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match=r"backend='triton' cannot compute this call: .*deterministic"):
            apply(leaves, *others, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    leaves = {name: t.detach().double() for name, t in leaves.items()}
    with pytest.raises(ValueError, match=r"backend='triton' cannot compute this call: .*float64"):
        apply(leaves, *others, "triton")


@pytest.mark.parametrize("affine", (False, True))
@pytest.mark.parametrize("c_out", (2, 4), ids=("dense", "depthwise"))
def test_registration(affine, c_out):
    groups, fake = (2 if c_out == 2 else 4), ("test_schema", "test_faketensor")
    leaves, arguments, samples = make(
        batch=1, size=(1, 2), k=2, padding=1, c_in=4, c_out=c_out, groups=groups, affine=affine
    )
    pairs = [[arguments[name]] * 2 for name in ("stride", "padding", "dilation")]
    points = (samples(None).points,) if affine else ()
    ops = torch.ops.timm_metricconv
    torch.library.opcheck(ops.triton_conv2d.default, (*leaves.values(), *pairs, groups, *points))
    x, source, weight, _, mask = (t.detach() for t in leaves.values())
    grad = torch.randn(1, c_out, *source.shape[-2:], device=DEVICE)
    for needs in ((True, True, True), (False, False, True)):
        call = (grad, *needs, x, source, weight, None, mask, *pairs, groups, *points)
        torch.library.opcheck(ops.triton_conv2d_backward.default, call, test_utils=fake)


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for affine in (False, True):
        call = make(batch=1, size=(3, 3), affine=affine)
        with FlopCounterMode(display=False) as counter:
            run(*call, "triton")
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("compiler", ("aot_eager", pytest.param("inductor", marks=needs_gpu)))
@pytest.mark.parametrize("affine", (False, True))
def test_compiles_without_graph_breaks(affine, compiler):
    leaves, *others = make(batch=1, size=(4, 4), c_in=4, c_out=3, affine=affine)
    torch._dynamo.reset()
    out = torch.compile(lambda **kw: apply(kw, *others, "triton"), fullgraph=True, backend=compiler)(**leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    close([out, *torch.autograd.grad(out, list(leaves.values()), cotangent)], run(leaves, *others, "reference"))


def test_activation_checkpointing():
    leaves, *others = make(batch=1, size=(4, 4), c_in=4, c_out=3)
    out = torch.utils.checkpoint.checkpoint(lambda **kw: apply(kw, *others, "triton"), use_reentrant=False, **leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    close([out, *torch.autograd.grad(out, list(leaves.values()), cotangent)], run(leaves, *others, "reference"))


@needs_gpu
def test_cuda_graph():
    call = make(batch=1, mask=False)
    ones = torch.ones_like(run(*call, "triton")[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*call, "triton", ones)
    graph.replay()
    close(captured, run(*call, "triton", ones))


@needs_gpu
@pytest.mark.parametrize("groups", (1, 256), ids=("dense", "depthwise"))
def test_more_than_two_to_the_31_elements(groups):
    x = torch.randn(5, 256, 1300, 1300, device=DEVICE, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    weight = torch.randn(4 if groups == 1 else 256, 256 // groups, 1, device=DEVICE, dtype=torch.bfloat16)
    positions = torch.zeros(5, 1, 2, 1300, 1300, device=DEVICE)
    out = ball_conv2d(x, positions, weight, groups=groups, backend="triton")
    close([out], [torch.nn.functional.conv2d(x, weight[..., None], groups=groups)], 2e-2, 2e-2)


LAYERS = [
    {},
    {"modulated": True, "stride": 2},
    {"parametrization": "cholesky", "drift": "sigmoid_norm", "pattern": "onion", "sampling": "rays"},
    {"parametrization": "logspd", "pattern": "polar", "metric_groups": 2},
    {"groups": 8, "metric_groups": 4, "modulated": True},
]


@pytest.mark.parametrize("arguments", LAYERS)
def test_layer_takes_it(arguments):
    layer = MetricConv2d(8, 8, 3, backend="triton", **arguments).to(DEVICE)
    torch.nn.init.normal_(layer.predictor.weight, std=0.2)
    x = torch.randn(2, 8, 5, 4, device=DEVICE, requires_grad=True)
    results = []
    for layer.backend in ("triton", "reference"):
        out = layer(x)
        cotangent = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)
        results.append([out, *torch.autograd.grad(out, [x, *layer.parameters()], cotangent)])
    assert "triton" in results[0][0].grad_fn.name()
    for value, truth in zip(*results, strict=True):
        assert (value - truth).norm() <= 1e-4 * truth.norm()
