"""Does every backend compute what the reference does, on the devices at hand? `python -m timm_metricconv --check`."""

import time
from typing import Callable, Dict, Iterator, List, NamedTuple, Tuple

import torch
from torch import Tensor, nn

from .layers import MetricConv2d
from .ops import BACKENDS, Samples, ball_conv2d, why_not_on

# How far a backend may be from the reference in float64, relative to the largest number of a tensor.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
# What a call is like: metric groups, groups, stride, affine samples instead of positions, masks.
CALLS: Dict[str, Tuple[int, int, int, bool, bool]] = {
    "dense": (1, 1, 1, True, False),
    "dense, positions": (1, 1, 2, False, True),
    "groups": (4, 2, 2, True, True),
    "depthwise": (2, 32, 1, True, True),
    "depthwise, positions": (1, 32, 1, False, False),
}
REPETITIONS = 5


class Verdict(NamedTuple):
    """What a backend did on a device.

    Attributes:
        backend: Its name.
        device: The device's type.
        passed: It computed what the reference does, or does not run there.
        text: The verdict, one line.
    """

    backend: str
    device: str
    passed: bool
    text: str


def _call(name: str, dtype: torch.dtype, device: str) -> Tuple[Dict[str, Tensor], Callable[..., Tensor]]:
    """Random leaves of a call, the same for every backend, and the call as a function of them and of `backend`."""
    metric_groups, groups, stride, affine, masked = CALLS[name]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    size, batch, channels = 12 // stride, 2, 32
    maps = torch.tensor([1.0, 0, 0, 1, 0, 0])[:, None, None] + 0.3 * random(batch, metric_groups, 6, size, size)
    positions = 1.5 * random(batch, metric_groups * 9, 2, size, size)
    points = torch.cartesian_prod(torch.arange(-1.0, 2), torch.arange(-1.0, 2)).flip(1)
    leaves = {
        "x": random(batch, channels, stride * size, stride * size).to(dtype),
        "source": maps.flatten(1, 2) if affine else positions,
        "weight": random(32, channels // groups, 3, 3).to(dtype),
        "bias": random(32).to(dtype),
    }
    leaves |= {"mask": random(batch, metric_groups * 9, size, size).sigmoid()} if masked else {}

    def function(source: Tensor, **others) -> Tensor:
        samples = Samples(source, points.to(source)) if affine else source
        return ball_conv2d(samples=samples, **others, stride=stride, padding=1, groups=groups)

    return {key: leaf.to(device) for key, leaf in leaves.items()}, function


def _results(function: Callable[..., Tensor], leaves: Dict[str, Tensor], backend: str) -> Dict[str, Tensor]:
    """The output and the gradient of every leaf."""
    leaves = {key: leaf.detach().clone().requires_grad_() for key, leaf in leaves.items()}
    out = function(**leaves, backend=backend)
    cotangent = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return {"output": out} | {f"gradient of {key}": t for key, t in zip(leaves, gradients, strict=True)}


def _errors(backend: str, device: str, dtype: torch.dtype) -> Iterator[Tuple[float, str]]:
    """Relative errors of a backend, and of what."""
    for name in CALLS:
        leaves, function = _call(name, dtype, device)
        source, weight, groups = leaves["source"], leaves["weight"], CALLS[name][1]
        if BACKENDS[backend].why_not(leaves["x"], source, weight, groups) is None:
            found = _results(function, leaves, backend)
            truth = _results(function, {key: leaf.double() for key, leaf in leaves.items()}, "reference")
            for key, value in truth.items():
                error = (found[key].double() - value).abs().max() / value.abs().max()
                # NaN is an error, too
                yield error.nan_to_num(torch.inf).item(), f"{key}, {name}"


def seconds(function: Callable[[], object], device: str) -> float:
    """What one call takes, on a GPU from an idle device to an idle device."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _speed(backend: str, device: str) -> float:
    """A metric layer's forward and backward pass ÷ `nn.Conv2d`'s: 64 channels, 28×28 pixels, 4 images."""
    torch.manual_seed(0)
    x = torch.randn(4, 64, 28, 28, device=device, requires_grad=True)
    conv = nn.Conv2d(64, 64, 3, padding=1, device=device)
    layer = MetricConv2d.from_conv(conv, backend=backend)
    best = [
        min(seconds(step, device) for _ in range(REPETITIONS))
        for step in (lambda: layer(x).sum().backward(), lambda: conv(x).sum().backward())
    ]
    return best[0] / best[1]


def _verdict(backend: str, device: str) -> Verdict:
    reason = why_not_on(device, backend)
    if reason is not None:
        return Verdict(backend, device, True, f"does not run: {reason}")
    agreed = []
    for dtype in (torch.float32, torch.bfloat16, *[torch.float16] * (device != "cpu")):
        name = str(dtype).removeprefix("torch.")
        try:
            error, where = max(_errors(backend, device, dtype))
        except Exception as failure:  # whatever a compiler or a driver raises is the verdict
            return Verdict(backend, device, False, f"FAILS in {name}: {type(failure).__name__}: {failure}")
        if error > TOLERANCE[dtype]:
            return Verdict(backend, device, False, f"WRONG in {name}: {where} is off by {error:.1e} of its largest")
        agreed.append(f"{error:.0e} in {name}")
    ratio = _speed(backend, device)
    return Verdict(backend, device, True, f"agrees ({', '.join(agreed)}); {ratio:.1f} times nn.Conv2d")


def check(devices: List[str]) -> Iterator[Verdict]:
    """Compares every backend with the reference, outputs and gradients, and times it.

    Args:
        devices: Types of devices, "cpu" or "cuda".

    Yields:
        The verdict on each backend on each device.
    """
    for device in devices:
        for backend in BACKENDS:
            yield _verdict(backend, device)
