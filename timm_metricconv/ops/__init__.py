"""One op, `ball_conv2d`, and its backends. This folder imports nothing else of the package."""

from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from .gather import gather_conv2d
from .grid_sample import grid_sample_conv2d
from .reference import ball_conv2d_reference
from .torchvision_deform import ball_conv2d_torchvision
from .triton_fused import triton_conv2d
from .triton_fused import why_not as _triton_why_not

IntPair = Union[int, Sequence[int]]


class Backend(NamedTuple):
    """A way to compute the op.

    Attributes:
        function: Same arguments as `ball_conv2d_reference`.
        why_not: (device type, number of weight dimensions) → why it cannot run there, or None where it can.
        metric_function: The same straight from a field of metrics, where the backend has it: fields for positions, and
            after groups points, ε_ω and ε, see `metric_conv2d`.
    """

    function: Callable[..., Tensor]
    why_not: Callable[[str, int], Optional[str]]
    metric_function: Optional[Callable[..., Tensor]] = None


def _gather_why_not(device: str, weight_dim: int) -> Optional[str]:
    return None if device == "cpu" else "it is written for the CPU"


def _torchvision_why_not(device: str, weight_dim: int) -> Optional[str]:
    return None if weight_dim == 4 else "it takes a [C_out, C_in/groups, k, k] kernel only"


# In order of preference: on the CPU, where Triton's interpreter may run, the first row is always taken.
BACKENDS: Dict[str, Backend] = {
    "gather": Backend(gather_conv2d, _gather_why_not, gather_conv2d),
    "triton": Backend(triton_conv2d, _triton_why_not),
    "torchvision": Backend(ball_conv2d_torchvision, _torchvision_why_not),
    "grid_sample": Backend(grid_sample_conv2d, lambda device, weight_dim: None),
    "reference": Backend(ball_conv2d_reference, lambda device, weight_dim: None),
}


def _choose(x: Tensor, weight: Tensor, backend: Optional[str]) -> Backend:
    if backend is None:
        # An exported program is to run without this package, so it is made of ordinary operators.
        if torch.compiler.is_exporting():
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
    positions: Tensor,
    weight: Tensor,
    mask: Optional[Tensor],
    stride: List[int],
    padding: List[int],
    dilation: List[int],
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
    taps = weight.shape[2] * weight.shape[3] if weight.dim() == 4 else weight.shape[2]
    expected = (x.shape[0], taps, 2, out[0], out[1])
    if tuple(positions.shape) != expected:
        raise ValueError(f"positions: expected [B, K, 2, H_out, W_out] = {expected}, got {tuple(positions.shape)}.")
    if not positions.is_floating_point() or positions.element_size() < 4:
        raise TypeError(f"positions: expected float32 or float64, got {positions.dtype}, which cannot hold a position.")
    one_each = expected[:2] + expected[3:]
    if mask is not None and tuple(mask.shape) != one_each:
        raise ValueError(f"mask: expected [B, K, H_out, W_out] = {one_each}, got {tuple(mask.shape)}.")


def _autocast(x: Tensor) -> torch.dtype:
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # "meta" has no autocast
        return torch.get_autocast_dtype(device)
    return x.dtype


def ball_conv2d(
    x: Tensor,
    positions: Tensor,
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
        positions: y_j, `[B, K, 2, H_out, W_out]` as (x, y) in pixels of the input, from the centre of the kernel's
            receptive field. float32 (float64 to differentiate numerically).
        weight: Kernel `[C_out, C_in/groups, k, k]` whose k² = K taps are the positions in row-major order; or K free
            taps `[C_out, C_in/groups, K]`, centred on the pixel as a 1×1 kernel is.
        bias: `[C_out]`.
        stride: As `nn.Conv2d`; like the next two an int or (vertical, horizontal).
        padding: As `nn.Conv2d`.
        dilation: As `nn.Conv2d`. It moves the centre of the receptive field; the positions are taken as they come.
        groups: As `nn.Conv2d`.
        mask: One factor for each sample, `[B, K, H_out, W_out]` (DCNv2's modulation).
        backend: A name from `BACKENDS`; by default the fastest that can run on the input's device.

    Returns:
        `[B, C_out, H_out, W_out]` in the dtype of x (under autocast, autocast's).

    Raises:
        ValueError: A shape does not fit, or the backend is unknown or cannot run here.
        TypeError: Positions in half precision or of integers.
    """
    strides, paddings, dilations = list(_pair(stride)), list(_pair(padding)), list(_pair(dilation))
    _check(x, positions, weight, mask, strides, paddings, dilations, groups)
    function = _choose(x, weight, backend).function
    dtype = _autocast(x)
    bias = None if bias is None else bias.to(dtype)
    mask = None if mask is None else mask.to(positions.dtype)
    return function(x.to(dtype), positions, weight.to(dtype), bias, mask, strides, paddings, dilations, groups)


def fuses_metric(x: Tensor, weight: Tensor, backend: Optional[str]) -> bool:
    """Whether the backend that `ball_conv2d` would take for these has a way around the positions: `metric_conv2d`."""
    return x.dtype != torch.float64 and _choose(x, weight, backend).metric_function is not None


def metric_conv2d(
    x: Tensor,
    fields: Tensor,
    points: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    mask: Optional[Tensor],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps_omega: float,
    eps: float,
    backend: Optional[str],
) -> Tensor:
    """`ball_conv2d` at y_j = p_j / (F(û_j) + `eps`), where `fuses_metric`; positions never exist.

    Args:
        x: Input `[B, C_in, H, W]`.
        fields: (a, b, d, ω_x, ω_y) of the metrics at the output pixels, `[B, 5, H_out, W_out]`, float32.
        points: The pattern's points p_j, `[K, 2]`, float32.
        weight: `[C_out, C_in/groups, k, k]`; this and the rest as in `ball_conv2d`, pairs written out.
        bias: `[C_out]`.
        mask: `[B, K, H_out, W_out]`.
        stride: (vertical, horizontal), as the next two.
        padding: Zeros around the input.
        dilation: Of the kernel.
        groups: Of the kernel.
        eps_omega: Margin of the drift.
        eps: Added to F.
        backend: As in `ball_conv2d`.

    Returns:
        `[B, C_out, H_out, W_out]`.
    """
    function = _choose(x, weight, backend).metric_function
    assert function is not None, "ask fuses_metric first"
    dtype = _autocast(x)
    bias = None if bias is None else bias.to(dtype)
    geometry = list(stride), list(padding), list(dilation), groups
    return function(x.to(dtype), fields, weight.to(dtype), bias, mask, *geometry, points, eps_omega, eps)


__all__ = ["BACKENDS", "Backend", "ball_conv2d", "fuses_metric", "metric_conv2d"]
