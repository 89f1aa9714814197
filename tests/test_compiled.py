"""The compiled CPU backend where `test_ops.py` does not look: random shapes, memory layouts, threads and processes."""

import hashlib
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from timm_metricconv.geometry import PATTERNS
from timm_metricconv.ops import Samples, ball_conv2d, compiled

ROOT = Path(__file__).parent.parent


def problem(seed, depthwise, affine, dtype=torch.float32, **fixed):
    """Leaves (x, source, weight, bias, mask), and the function of them that a backend computes."""
    choose = random.Random(seed)
    sizes = {
        "batch": choose.choice([1, 2, 3]),
        "balls": choose.choice([1, 2, 3]),
        "width": choose.choice([1, 4, 16, 20, 32]),  # channels of a metric group
        "k": choose.choice([1, 2, 3, 5]),
        "size": (choose.choice([1, 2, 5, 9]), choose.choice([1, 3, 8])),
        "mask": choose.random() < 0.5,
        "bias": choose.random() < 0.5,
    } | fixed
    k, channels = sizes["k"], sizes["balls"] * sizes["width"]
    groups = channels if depthwise else sizes.get("groups", choose.choice([1, sizes["balls"]]))
    out_channels = channels if depthwise else groups * sizes.get("outputs", choose.choice([1, 3]))
    stride, dilation = ([choose.choice([1, 2]) for _ in "yx"] for _ in range(2))
    padding = [d * (k - 1) for d in dilation]
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, s in zip(sizes["size"], padding, dilation, stride, strict=True)
    ]
    shape = sizes["batch"], sizes["balls"], k * k, *out
    if affine:
        source = 0.3 * torch.randn(shape[0], shape[1], 6, *out)
        source[:, :, [0, 3]] += 1
        source = source.flatten(1, 2)
    else:
        source = 1.5 * torch.randn(*shape[:3], 2, *out).flatten(1, 2)
    leaves = {
        "x": torch.randn(sizes["batch"], channels, *sizes["size"], dtype=dtype),
        "source": source,
        "weight": torch.randn(out_channels, channels // groups, k, k, dtype=dtype),
    }
    leaves |= {"bias": torch.randn(out_channels, dtype=dtype)} if sizes["bias"] else {}
    leaves |= {"mask": torch.rand(shape).flatten(1, 2)} if sizes["mask"] else {}
    points = PATTERNS["lattice"](k, tuple(dilation))[0]
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}

    def function(source, backend="compiled", **others):
        samples = Samples(source, points.to(source)) if affine else source
        return ball_conv2d(samples=samples, backend=backend, **geometry, **others)

    return leaves, function


def run(function, leaves, **options):
    """The output and the gradient of every leaf."""
    leaves = {key: leaf.detach().requires_grad_() for key, leaf in leaves.items()}
    out = function(**leaves, **options)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).cos()
    (out.double() * cotangent).sum().backward()
    return {"out": out.detach()} | {key: leaf.grad for key, leaf in leaves.items()}


def compare_with_reference(function, leaves, tolerance):
    actual = run(function, leaves)
    expected = run(function, {key: leaf.double() for key, leaf in leaves.items()}, backend="reference")
    for key, value in expected.items():
        error, size = (actual[key].double() - value).abs().max(), value.abs().max()
        assert error <= tolerance * (1e-2 + size), f"{key}: {error} of {size}"


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_equals_the_reference(seed, depthwise, affine):
    leaves, function = problem(seed, depthwise, affine)
    compare_with_reference(function, leaves, 1e-4)


@pytest.mark.parametrize("depthwise", [True, False])
def test_equals_the_reference_in_bfloat16(depthwise):
    leaves, function = problem(0, depthwise, True, torch.bfloat16, size=(9, 8), mask=True, bias=True)
    compare_with_reference(function, leaves, 4e-2)
    assert function(**leaves).dtype == torch.bfloat16


@pytest.mark.parametrize("depthwise", [True, False])
def test_any_memory_layout(depthwise):
    """x, source and mask as slices, transposed, and channels-last."""
    leaves, function = problem(1, depthwise, True, size=(6, 5), mask=True, batch=2, balls=2)
    expected = run(function, leaves)
    for lay in (
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: torch.stack((t, t), -1)[..., 1],
        lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    ):
        laid = {key: lay(t) if key in ("x", "source", "mask") else t for key, t in leaves.items()}
        for key, value in run(function, laid).items():
            torch.testing.assert_close(value, expected[key], msg=key)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("depthwise", [True, False])
def test_a_batch_of_nothing(depthwise, affine):
    leaves, function = problem(2, depthwise, affine, batch=0)
    for key, value in run(function, leaves).items():
        assert value.shape == leaves[key].shape if key in leaves else value.numel() == 0, key
        assert not value.any(), key


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, -1e20])
def test_samples_that_are_nowhere_read_zero(value, affine):
    """A wild index would read other memory or end the process; a sample far away has no gradient either."""
    leaves, function = problem(3, True, affine, size=(5, 8), bias=False, mask=False, k=2)
    leaves["source"].fill_(value)
    actual = run(function, leaves)
    assert not actual["out"].any() and not actual["x"].any() and not actual["weight"].any()
    if not affine:
        assert not actual["source"].any()


@pytest.mark.parametrize("needs", [{"x"}, {"source"}, {"weight"}, {"mask"}, {"x", "weight"}])
@pytest.mark.parametrize("depthwise", [True, False])
def test_only_the_gradients_that_are_wanted(depthwise, needs):
    leaves, function = problem(4, depthwise, True, mask=True)
    expected = run(function, leaves)
    leaves = {key: leaf.requires_grad_(key in needs) for key, leaf in leaves.items()}
    out = function(**leaves)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).cos()
    (out.double() * cotangent).sum().backward()
    for key, leaf in leaves.items():
        if key in needs:
            torch.testing.assert_close(leaf.grad, expected[key])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("depthwise", [True, False])
def test_threads_change_nothing(depthwise, monkeypatch):
    """A thread that wrote where another does, or a piece that was left out, would show."""
    monkeypatch.setattr(compiled, "THREAD_NUMBERS", 1)
    leaves, function = problem(5, depthwise, True, batch=3, balls=2, width=32, k=3, size=(9, 8), mask=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(function, leaves))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for key, value in results[0].items():
            if depthwise and key in ("out", "x"):
                assert torch.equal(value, other[key]), key
            else:  # blocks of channels and sets of images differ, and with them the order of sums
                torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("depthwise", [True, False])
def test_many_pieces(depthwise, monkeypatch):
    """Few output pixels at a time, and one gradient of the kernel for all images."""
    monkeypatch.setattr(compiled, "CACHED_NUMBERS", 1)
    monkeypatch.setattr(compiled, "GRADIENT_NUMBERS", 1)
    leaves, function = problem(6, depthwise, True, batch=3, balls=2, width=16, k=3, size=(9, 8), mask=True)
    compare_with_reference(function, leaves, 1e-4)


@pytest.mark.parametrize("threads", [1, 7])
@pytest.mark.parametrize("outputs", [64, 32, 48, 70])
@pytest.mark.parametrize(
    ("balls", "width", "groups"), [(1, 64, 1), (2, 32, 1), (1, 130, 1), (4, 24, 2), (2, 60, 6), (1, 100, 5)]
)
def test_tiles_of_every_width(balls, width, groups, outputs, threads, set_threads):
    """A tile has one, two or four registers of a kernel group's outputs, and going back of its channels."""
    set_threads(threads)
    fixed = {"balls": balls, "width": width, "groups": groups, "outputs": outputs}
    leaves, function = problem(9, False, True, **fixed, batch=2, k=3, size=(9, 8), mask=True, bias=True)
    compare_with_reference(function, leaves, 1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("width", "groups"), [(34, 2), (24, 3), (40, 1)])
def test_what_is_infinite_stays_where_it_belongs(width, groups, value):
    """A gradient of one pixel and kernel group, whose channels begin and end within a register."""
    torch.manual_seed(10)
    x, weight = torch.randn(1, width, 7, 7), torch.randn(2 * groups, width // groups, 2, 2)
    corner, mask = torch.tensor([-0.5, 0.5]), torch.rand(1, 4, 6, 6)
    positions = torch.stack(torch.meshgrid(corner, corner, indexing="xy"), 2).view(1, 4, 2, 1, 1)
    positions = positions.repeat(1, 1, 1, 6, 6) * 0.9  # strictly between the same pixels everywhere
    grad = torch.ones(1, 2 * groups, 6, 6)
    grad[0, -1, 2, 3] = value

    def finite(dtype, backend):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, positions, weight, mask)]
        out = ball_conv2d(*leaves[:3], mask=leaves[3], groups=groups, backend=backend)
        out.backward(grad.to(dtype))
        return [leaf.grad.isfinite() for leaf in leaves]

    for actual, expected in zip(finite(torch.float32, "compiled"), finite(torch.float64, "reference"), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("depthwise", [True, False])
def test_an_infinite_input_has_no_part_in_the_gradients_of_other_samples(depthwise):
    x, weight = torch.zeros(1, 1, 5, 5), torch.ones(1 if depthwise else 2, 1, 2)
    x[..., 3, 3] = float("inf")
    positions = torch.tensor([[0.25, 0.25], [-2.25, -2.25]]).view(1, 2, 2, 1, 1).repeat(1, 1, 1, 5, 5)
    positions.requires_grad_()
    ball_conv2d(x, positions, weight, backend="compiled").sum().backward()
    assert not positions.grad[0, 0, :, 3, 3].isfinite().any()
    assert positions.grad[0, 1, :, 3, 3].isfinite().all()


def test_no_image_is_read_where_there_is_none():
    out = ball_conv2d(
        torch.zeros(1, 2, 0, 4), torch.zeros(1, 9, 2, 2, 4), torch.ones(3, 2, 3, 3), padding=(2, 1), backend="compiled"
    )
    assert not out.any()


def test_gradients_of_a_filled_up_kernel_are_few(monkeypatch):
    """A kernel of one channel and two outputs for each of many groups is filled up to 128 times its size."""
    lengths, work = [], compiled._work

    def record(*call):
        lengths.append(len(call[-1].grad_weight))
        work(*call)

    monkeypatch.setattr(compiled, "_work", record)
    monkeypatch.setattr(compiled, "GRADIENT_NUMBERS", 40_000)
    leaves, function = problem(11, False, True, batch=3, balls=1, width=16, groups=16, outputs=2, k=3, size=(9, 8))
    compare_with_reference(function, leaves, 1e-4)
    assert 0 < max(lengths) <= 40_000


def test_two_callers_at_once():
    leaves, function = problem(7, True, True, batch=2, balls=2, width=32, k=5, size=(9, 8))
    expected = run(function, leaves)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: run(function, leaves), range(16)):
            for key, value in expected.items():
                assert torch.equal(value, result[key]), key


class Convolved(Dataset):
    """Runs the op in a worker."""

    def __init__(self, threads):
        self.leaves, self.function = problem(8, True, True, batch=2, balls=2, width=32, k=5, size=(9, 8))
        self.threads = threads

    def __len__(self):
        return 2

    def __getitem__(self, i):
        torch.set_num_threads(self.threads)
        return self.function(**self.leaves)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("threads", [1, 2])
def test_works_in_a_fork_of_a_process_that_has_used_it(threads, monkeypatch):
    """OpenMP's threads do not survive a fork: a process that waited for them would wait for ever."""
    monkeypatch.setattr(compiled, "THREAD_NUMBERS", 1)
    data = Convolved(threads)
    expected = data.function(**data.leaves)
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=240)
    for out in loader:
        assert torch.equal(out, expected)


def test_machine_code_on_disk_is_of_these_registers():
    digest = hashlib.sha256(Path(compiled.__file__).with_name("registers.py").read_text().encode()).hexdigest()[:16]
    assert digest == compiled.REGISTERS_DIGEST, f"registers.py changed: compiled.REGISTERS_DIGEST is {digest!r} now"


def test_torchvision_computes_without_numba():
    code = "import sys; sys.modules['numba'] = None; import torch; from timm_metricconv.ops import dispatch;"
    code += "x, positions, weight = torch.ones(1, 2, 3, 3), torch.zeros(1, 1, 2, 3, 3), torch.ones(1, 2, 1, 1);"
    code += "reason = dispatch.BACKENDS['compiled'].why_not(x, positions, weight, 1);"
    code += "assert reason == 'numba is not installed, or fails here';"
    code += "assert dispatch.choose(x, positions, weight, 1) == 'torchvision';"
    code += "print(dispatch.ball_conv2d(x, positions, weight).sum())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "18" in done.stdout


@pytest.mark.slow
def test_imports_where_nothing_can_be_written():
    """Numba raises where it finds no place for its cache; every process then compiles for itself."""
    code = "import numba.core.caching as caching; caching.CacheImpl._locator_classes = [];"
    code += "from timm_metricconv.ops import compiled;"
    code += "assert compiled._machine_code(compiled._run_dense).address"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
