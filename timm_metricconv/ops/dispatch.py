"""`ball_conv2d`: the one door of the op, and the choice of a backend behind it."""

from typing import Callable, Dict, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from .gather import gather_conv2d
from .grid_sample import grid_sample_conv2d
from .reference import ball_conv2d_reference
from .samples import Samples, metric_groups
from .torchvision_deform import ball_conv2d_torchvision
from .triton_fused import triton_conv2d
from .triton_fused import why_not as _triton_why_not

try:
    from .compiled import compiled_conv2d
except Exception:  # Numba is optional, and a broken installation of it must not break this import
    compiled_conv2d = None  # type: ignore[assignment]

IntPair = Union[int, Sequence[int]]


class Backend(NamedTuple):
    """A way to compute the op.

    Attributes:
        function: Same arguments as `ball_conv2d_reference`; one that cannot fuse the samples places them.
        why_not: (device type, number of weight dimensions) → why it cannot run there, or None where it can.
    """

    function: Callable[..., Tensor]
    why_not: Callable[[str, int], Optional[str]]


def _compiled_why_not(device: str, weight_dim: int) -> Optional[str]:
    return "numba is not installed, or fails here" if compiled_conv2d is None else _gather_why_not(device, weight_dim)


def _gather_why_not(device: str, weight_dim: int) -> Optional[str]:
    return None if device == "cpu" else "it is written for the CPU"


def _torchvision_why_not(device: str, weight_dim: int) -> Optional[str]:
    if device not in ("cpu", "cuda"):
        return "torchvision has its kernel for CPUs and CUDA alone"
    return None if weight_dim == 4 else "it takes a [C_out, C_in/groups, k, k] kernel only"


# In order of preference: the first that can run is taken. What stands before the reference is written for certain
# devices; the reference runs on all, and `grid_sample` is for images of few channels.
BACKENDS: Dict[str, Backend] = {
    "compiled": Backend(compiled_conv2d, _compiled_why_not),
    "gather": Backend(gather_conv2d, _gather_why_not),
    "triton": Backend(triton_conv2d, _triton_why_not),
    "torchvision": Backend(ball_conv2d_torchvision, _torchvision_why_not),
    "reference": Backend(ball_conv2d_reference, lambda device, weight_dim: None),
    "grid_sample": Backend(grid_sample_conv2d, lambda device, weight_dim: None),
}


def _choose(x: Tensor, weight: Tensor, backend: Optional[str]) -> Backend:
    if backend is None:
        # An exported or traced program is to run without this package, so it is made of ordinary operators.
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            return BACKENDS["reference"]
        for row in BACKENDS.values():
            if row.why_not(x.device.type, weight.dim()) is None:
                return row
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}.")
    reason = BACKENDS[backend].why_not(x.device.type, weight.dim())
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot run on {x.device.type} here: {reason}; backend=None chooses one.")
    return BACKENDS[backend]


def _check(
    x: Tensor,
    samples: Union[Tensor, Samples],
    weight: Tensor,
    mask: Optional[Tensor],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    if x.dim() != 4:
        raise ValueError(f"x: expected [B, C_in, H, W], got {tuple(x.shape)}.")
    if weight.dim() not in (3, 4):
        raise ValueError(
            f"weight: expected [C_out, C_in/groups, k, k] or taps [C_out, C_in/groups, K], got {tuple(weight.shape)}."
        )
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups != 0:
        raise ValueError(
            f"weight: shape {tuple(weight.shape)} with groups={groups} does not fit an input of {x.shape[1]} channels."
        )
    size = weight.shape[2:] if weight.dim() == 4 else (1, 1)
    out = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (size[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    taps = weight.shape[2:].numel()
    runs = metric_groups(samples, taps)
    expected: Tuple[int, ...]
    if isinstance(samples, Samples):
        if samples.points.numel() != 2 * taps or samples.points.shape[-1] != 2:
            raise ValueError(f"samples.points: expected [K={taps}, 2] or [R, D, 2], got {tuple(samples.points.shape)}.")
        name, source, axes = "samples.fields", samples.fields, "[B, G·5, H_out, W_out]"
        expected = x.shape[0], runs * 5, *out
    else:
        name, source, axes = "samples", samples, "positions [B, G·K, 2, H_out, W_out]"
        expected = x.shape[0], runs * taps, 2, *out
    if tuple(source.shape) != expected:
        raise ValueError(f"{name}: expected {axes} = {expected} (G = {runs}), got {tuple(source.shape)}.")
    if x.shape[1] % runs or (groups % runs and runs % groups):
        raise ValueError(
            f"{name}: metric_groups={runs} must divide the {x.shape[1]} channels, and one of metric_groups and "
            f"groups={groups} must divide the other."
        )
    if not source.is_floating_point() or source.element_size() < 4:
        raise TypeError(f"{name}: expected float32 or float64, got {source.dtype}, which cannot hold a position.")
    one_each = (x.shape[0], runs * taps, *out)
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
            kernel's receptive field, in float32 (float64 to differentiate numerically); or the `Samples` of a field of
            metrics. The input's channels fall into G equal runs (metric groups), each with samples of its own.
        weight: Kernel `[C_out, C_in/groups, k, k]` whose k² = K taps are the samples in row-major order; or K free
            taps `[C_out, C_in/groups, K]`, centred on the pixel as a 1×1 kernel is.
        bias: `[C_out]`.
        stride: As `nn.Conv2d`; like the next two an int or (vertical, horizontal).
        padding: As `nn.Conv2d`.
        dilation: As `nn.Conv2d`. It moves the centre of the receptive field; the samples are taken as they come.
        groups: As `nn.Conv2d`; G divides it or it divides G.
        mask: One factor for each sample, `[B, G·K, H_out, W_out]` (DCNv2's modulation).
        backend: A name from `BACKENDS`; by default the fastest that can run on the input's device.

    Returns:
        `[B, C_out, H_out, W_out]` in the dtype of x (under autocast, autocast's).

    Raises:
        ValueError: A shape does not fit, or the backend is unknown or cannot run here.
        TypeError: Samples in half precision or of integers.

    Example:
        >>> x, weight = torch.randn(1, 8, 5, 6), torch.randn(4, 8, 3, 3)
        >>> positions = torch.randn(1, 9, 2, 5, 6)
        >>> ball_conv2d(x, positions, weight, padding=1).shape
        torch.Size([1, 4, 5, 6])
    """
    geometry = list(_pair(stride)), list(_pair(padding)), list(_pair(dilation)), groups
    _check(x, samples, weight, mask, *geometry)
    dtype = _autocast(x)
    bias = None if bias is None else bias.to(dtype)
    mask = None if mask is None else mask.to(samples.dtype if isinstance(samples, Tensor) else samples.fields.dtype)
    return _choose(x, weight, backend).function(x.to(dtype), samples, weight.to(dtype), bias, mask, *geometry)
