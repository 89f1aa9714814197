"""`ball_conv2d`: the one door of the op, and the choice of a backend behind it."""

import os
from typing import Callable, Dict, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from .grid_sample import grid_sample_conv2d
from .reference import ball_conv2d_reference
from .samples import FIELDS, Samples, metric_groups_of
from .torchvision_deform import ball_conv2d_torchvision
from .triton_fused import triton_conv2d
from .triton_fused import why_not as _triton_why_not

try:
    from .compiled import compiled_conv2d
except Exception:  # a broken installation of Numba must not break this import
    compiled_conv2d = None  # type: ignore[assignment]

IntPair = Union[int, Sequence[int]]
# The backend to prefer wherever it can compute a call.
PREFERRED = os.environ.get("TIMM_METRICCONV_BACKEND")


class Backend(NamedTuple):
    """A way to compute the op.

    Attributes:
        function: Same arguments as `ball_conv2d_reference`; one that cannot fuse the samples places them.
        why_not: (x, positions or fields, weight, groups) → why it cannot compute that call, or None where it can.
    """

    function: Callable[..., Tensor]
    why_not: Callable[[Tensor, Tensor, Tensor, int], Optional[str]]


def _compiled_why_not(x: Tensor, source: Tensor, weight: Tensor, groups: int) -> Optional[str]:
    if compiled_conv2d is None:
        return "numba is not installed, or fails here"
    if torch.float64 in (x.dtype, source.dtype):
        return "it computes in float32, and the call is in float64"
    return _crossed(source, weight, groups) if x.device.type == "cpu" else "it is written for the CPU"


def _crossed(source: Tensor, weight: Tensor, groups: int) -> Optional[str]:
    metric_groups = source.shape[1] // (FIELDS if source.dim() == 4 else weight.shape[2:].numel())
    divides = groups % metric_groups == 0 or metric_groups % groups == 0
    return None if divides else f"of metric_groups={metric_groups} and groups={groups} one must divide the other"


def _torchvision_why_not(x: Tensor, source: Tensor, weight: Tensor, groups: int) -> Optional[str]:
    if x.device.type not in ("cpu", "cuda"):
        return "torchvision has its kernel for CPUs and CUDA alone"
    return None if weight.dim() == 4 else "it takes a [C_out, C_in/groups, k, k] kernel only"


# In order of preference: the first that can compute a call is taken. The reference can compute all, so what comes after
# it is computed with only by name: `grid_sample` is for images of few channels, and `triton` has not yet run on a GPU
# (`python -m timm_metricconv --check` tells whether it may).
BACKENDS: Dict[str, Backend] = {
    "compiled": Backend(compiled_conv2d, _compiled_why_not),
    "torchvision": Backend(ball_conv2d_torchvision, _torchvision_why_not),
    "reference": Backend(ball_conv2d_reference, lambda *call: None),
    "grid_sample": Backend(grid_sample_conv2d, lambda *call: None),
    "triton": Backend(triton_conv2d, lambda *call: _triton_why_not(*call) or _crossed(*call[1:])),
}


def why_not_on(device: str, backend: str) -> Optional[str]:
    """Why a backend cannot compute a plain float32 layer on a device, or None where it can."""
    x, weight = torch.empty(1, 1, 3, 3, device=device), torch.empty(1, 1, 3, 3, device=device)
    return BACKENDS[backend].why_not(x, torch.empty(1, 6, 3, 3, device=device), weight, 1)


def choose(x: Tensor, source: Tensor, weight: Tensor, groups: int, backend: Optional[str] = None) -> str:
    """The backend that computes a call: the one named, or the first that can.

    Raises:
        ValueError: There is no backend of that name, or it cannot compute the call; the message says why.
    """
    for what, name in (("backend", backend), ("the environment variable TIMM_METRICCONV_BACKEND", PREFERRED)):
        if name is not None and name not in BACKENDS:
            raise ValueError(f"{what}={name!r}: expected one of {', '.join(BACKENDS)}.")
    if backend is not None:
        reason = BACKENDS[backend].why_not(x, source, weight, groups)
        if reason is not None:
            raise ValueError(f"backend={backend!r} cannot compute this call: {reason}; backend=None chooses one.")
        return backend
    # An exported or traced program is to run without this package, so it is made of ordinary operators.
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "reference"
    names = BACKENDS if PREFERRED is None else (PREFERRED, *BACKENDS)
    return next(name for name in names if BACKENDS[name].why_not(x, source, weight, groups) is None)


def int_pair(name: str, value: IntPair, least: int) -> Tuple[int, int]:
    """(vertical, horizontal) of an argument that `nn.Conv2d` has too, or a ValueError that names it."""
    pair = tuple(_pair(value)) if isinstance(value, (int, tuple, list)) else ()
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < least for v in pair):
        raise ValueError(f"{name}={value!r}: expected an integer of at least {least}, or two of them.")
    return pair[0], pair[1]


def _check(
    x: Tensor,
    samples: Union[Tensor, Samples],
    weight: Tensor,
    bias: Optional[Tensor],
    mask: Optional[Tensor],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    if x.dim() != 4:
        raise ValueError(f"x: expected [B, C_in, H, W], got {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise TypeError(f"x: expected real floating-point numbers, got {x.dtype}.")
    if weight.dim() not in (3, 4):
        raise ValueError(
            f"weight: expected [C_out, C_in/groups, k, k] or taps [C_out, C_in/groups, K], got {tuple(weight.shape)}."
        )
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups != 0:
        raise ValueError(
            f"weight: shape {tuple(weight.shape)} with groups={groups} does not fit an input of {x.shape[1]} channels."
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias: expected [C_out] = {(weight.shape[0],)}, got {tuple(bias.shape)}.")
    size = weight.shape[2:] if weight.dim() == 4 else (1, 1)
    out = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (size[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    taps = weight.shape[2:].numel()
    metric_groups = metric_groups_of(samples, taps)
    expected: Tuple[int, ...]
    if isinstance(samples, Samples):
        if tuple(samples.points.shape) != (taps, 2):
            raise ValueError(f"samples.points: expected [K, 2] = {(taps, 2)}, got {tuple(samples.points.shape)}.")
        name, source, axes = "samples.fields", samples.fields, "affine maps [B, G·6, H_out, W_out]"
        expected = x.shape[0], metric_groups * FIELDS, *out
    else:
        name, source, axes = "samples", samples, "positions [B, G·K, 2, H_out, W_out]"
        expected = x.shape[0], metric_groups * taps, 2, *out
    if tuple(source.shape) != expected:
        raise ValueError(f"{name}: expected {axes} = {expected} (G = {metric_groups}), got {tuple(source.shape)}.")
    if x.shape[1] % metric_groups:
        raise ValueError(f"{name}: metric_groups={metric_groups} must divide the {x.shape[1]} channels.")
    if not source.is_floating_point() or source.element_size() < 4:
        raise TypeError(f"{name}: expected float32 or float64, got {source.dtype}, which cannot hold a position.")
    one_each = (x.shape[0], metric_groups * taps, *out)
    if mask is not None and tuple(mask.shape) != one_each:
        raise ValueError(f"mask: expected [B, G·K, H_out, W_out] = {one_each}, got {tuple(mask.shape)}.")


def _autocast(x: Tensor) -> torch.dtype:
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # "meta" has no autocast
        return torch.get_autocast_dtype(device)
    return x.dtype


def ball_conv2d(
    x: Tensor,
    samples: Union[Tensor, Samples],
    weight: Tensor,
    bias: Optional[Tensor] = None,
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    mask: Optional[Tensor] = None,
    backend: Optional[str] = None,
) -> Tensor:
    """out(x) = bias + Σ_j W_j · m_j · f(x + y_j): a convolution that reads its input at given positions.

    f is read bilinearly and is zero outside the image; a sample less than one pixel outside still interpolates towards
    the border. Source: Dagès, Lindenbaum, Bruckstein, Metric Convolutions (ICCV 2025), section 3; the convention at the
    border is that of torchvision's `deform_conv2d`.

    Args:
        x: Input `[B, C_in, H, W]`.
        samples: Positions y_j, `[B, G·K, 2, H_out, W_out]` as (x, y) in pixels of the input, from the centre of the
            kernel's receptive field, in float32 (float64 to differentiate numerically); or the `Samples` of a pattern
            under a field of affine maps. The input's channels fall into G equal runs (metric groups), each with samples
            of its own.
        weight: Kernel `[C_out, C_in/groups, k, k]` whose k² = K taps are the samples in row-major order; or K free
            taps `[C_out, C_in/groups, K]`, centred on the pixel as a 1×1 kernel is.
        bias: `[C_out]`.
        stride: As `nn.Conv2d`; like the next two an int or (vertical, horizontal).
        padding: As `nn.Conv2d`.
        dilation: As `nn.Conv2d`. It moves the centre of the receptive field; the samples are taken as they come.
        groups: As `nn.Conv2d`; independent of G, but the fast backends need one to divide the other.
        mask: One factor for each sample, `[B, G·K, H_out, W_out]` (DCNv2's modulation).
        backend: A name from `BACKENDS`; by default what the environment variable `TIMM_METRICCONV_BACKEND` names
            where that can compute the call, else the fastest that can.

    Returns:
        `[B, C_out, H_out, W_out]` in the dtype of x (under autocast, autocast's).

    Raises:
        ValueError: A shape does not fit, or the backend is unknown or cannot compute this call.
        TypeError: An input of integers or complex numbers, or samples in half precision or of integers.

    Example:
        >>> x, weight = torch.randn(1, 8, 5, 6), torch.randn(4, 8, 3, 3)
        >>> positions = torch.randn(1, 9, 2, 5, 6)
        >>> ball_conv2d(x, positions, weight, padding=1).shape
        torch.Size([1, 4, 5, 6])
    """
    geometry = (
        list(int_pair("stride", stride, 1)),
        list(int_pair("padding", padding, 0)),
        list(int_pair("dilation", dilation, 1)),
        groups,
    )
    _check(x, samples, weight, bias, mask, *geometry)
    dtype = _autocast(x)
    source = samples if isinstance(samples, Tensor) else samples.fields
    bias = None if bias is None else bias.to(dtype)
    mask = None if mask is None else mask.to(source.dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    function = BACKENDS[choose(x, source, weight, groups, backend)].function
    return function(x, samples, weight, bias, mask, *geometry)
