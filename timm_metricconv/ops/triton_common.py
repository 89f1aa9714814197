"""What the Triton kernels share: device code that finds and reads samples, a call in their layout, and the launcher.

Layout: images are channels-last, x `[B, H, W, C]`. An output pixel has a number m below M = B·H_out·W_out `pixels`, and
each of its G metric groups one ball, number m·G + g below M·G. The samples lie ball by ball: source `[M·G, K, 2]`
positions, or `[M·G, 6]` fields (then `points` is `[K, 2]`); mask `[M·G, K]`. The kernel is `[K, C_out, C/groups]`. The
number of a pixel fits int32, an offset in elements need not.
"""

from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .custom_op import Arguments, with_far_corners
from .reference import first_centre

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except Exception:  # a broken installation of an optional package must not break the import of this one
    triton = tl = constexpr = None

# These change with the size of the image: a kernel compiled for each of their divisors would cost more than it saves.
_PLAIN = (
    "pixels", "taps", "height", "width", "out_height", "out_width", "stride_y", "stride_x", "slice_taps", "span", "rows"
)  # fmt: skip


def jit(function):
    """`triton.jit`, or the function where Triton is not installed."""
    if triton is None:
        return function
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in _PLAIN if name in names])


# --- device code -----------------------------------------------------------------------------------------------------


@jit
def centre(m, out_height, out_width, stride_y, stride_x, origin_y, origin_x):
    """Output pixel number → number of the image, and centre (x, y) of the receptive field."""
    row = m // out_width
    return row // out_height, (m % out_width) * stride_x + origin_x, (row % out_height) * stride_y + origin_y


@jit
def affine(source, points, ball, tap):
    """y = L·p + t, (x, y), of the pattern's point p number `tap` under the map number `ball`."""
    px, py = tl.load(points + 2 * tap), tl.load(points + 2 * tap + 1)
    at = source + ball * 6
    x = tl.load(at) * px + tl.load(at + 1) * py + tl.load(at + 4)
    return x, tl.load(at + 2) * px + tl.load(at + 3) * py + tl.load(at + 5)


@jit
def store_fields(at, grad, live):
    """Writes six fields `[M]`."""
    tl.store(at, grad[0], mask=live)
    tl.store(at + 1, grad[1], mask=live)
    tl.store(at + 2, grad[2], mask=live)
    tl.store(at + 3, grad[3], mask=live)
    tl.store(at + 4, grad[4], mask=live)
    tl.store(at + 5, grad[5], mask=live)


@jit
def _near(coordinate, last):
    """The near corner along an axis, clamped into the image; NaN compares false and gives 0, so no address is wild."""
    return tl.where(coordinate > 0, tl.minimum(coordinate, last), 0.0).to(tl.int32)


@jit
def _hat(distance):
    """Linear interpolation weight; 0 a pixel or more away and for NaN."""
    distance = tl.abs(distance)
    return tl.where(distance < 1, 1 - distance, 0.0)


@jit
def _slope(distance):
    """Derivative of the hat, from the right at the integers."""
    return tl.where((distance >= -1) & (distance < 0), 1.0, tl.where((distance >= 0) & (distance < 1), -1.0, 0.0))


@jit
def locate(source, points, ball, tap, taps, image, x, y, height, width):
    """Number of the pixel that is sample `tap`'s near corner, and the distance (x, y) of the sample from it."""
    if points is None:
        at = source + (ball * taps + tap) * 2
        x, y = x + tl.load(at), y + tl.load(at + 1)
    else:
        offset_x, offset_y = affine(source, points, ball, tap)
        x, y = x + offset_x, y + offset_y
    near_x, near_y = _near(x, width - 2), _near(y, height - 2)
    return (image * height + near_y) * width + near_x, x - near_x, y - near_y


@jit
def shares(dx, dy, factor):
    """Bilinear weights of the corners (0, 0), (0, 1), (1, 0), (1, 1) as (down, right), times a factor."""
    left, right, top, bottom = _hat(dx), _hat(dx - 1), _hat(dy) * factor, _hat(dy - 1) * factor
    return top * left, top * right, bottom * left, bottom * right


@jit
def modulation(mask, ball, tap, taps):
    if mask is None:
        return 1.0
    else:
        return tl.load(mask + ball * taps + tap)


@jit
def sample_gradient(
    grad_source, grad_mask, grad_fields, points, ball, tap, taps, live, dx, dy, factor, g00, g01, g10, g11
):
    """Gradients of the four corners' weights → writes those of the mask and of a position (x, y).

    Or adds the position's to those of the six fields behind it, which it returns.
    """
    if grad_mask is not None:
        s00, s01, s10, s11 = shares(dx, dy, 1.0)
        tl.store(grad_mask + ball * taps + tap, g00 * s00 + g01 * s01 + g10 * s10 + g11 * s11, mask=live)
    left, right = g00 * _hat(dy) + g10 * _hat(dy - 1), g01 * _hat(dy) + g11 * _hat(dy - 1)
    top, bottom = g00 * _hat(dx) + g01 * _hat(dx - 1), g10 * _hat(dx) + g11 * _hat(dx - 1)
    grad_x = (left * _slope(dx) + right * _slope(dx - 1)) * factor
    grad_y = (top * _slope(dy) + bottom * _slope(dy - 1)) * factor
    if points is None:
        at = grad_source + (ball * taps + tap) * 2
        tl.store(at, grad_x, mask=live)
        tl.store(at + 1, grad_y, mask=live)
        return grad_fields
    else:
        px, py = tl.load(points + 2 * tap), tl.load(points + 2 * tap + 1)
        xx, xy, yx, yy, shift_x, shift_y = grad_fields
        xx, xy, yx, yy = xx + grad_x * px, xy + grad_x * py, yx + grad_y * px, yy + grad_y * py
        return xx, xy, yx, yy, shift_x + grad_x, shift_y + grad_y


@jit
def columns(x, at, keep, down, right, s00, s01, s10, s11):
    """The four corners at element offsets `at` [M, C], weighted and summed in float32."""
    value = tl.load(x + at, mask=keep, other=0.0).to(tl.float32) * s00[:, None]
    value += tl.load(x + at + right, mask=keep, other=0.0).to(tl.float32) * s01[:, None]
    value += tl.load(x + at + down, mask=keep, other=0.0).to(tl.float32) * s10[:, None]
    return value + tl.load(x + at + down + right, mask=keep, other=0.0).to(tl.float32) * s11[:, None]


# --- the host's side -------------------------------------------------------------------------------------------------

INTERPRETED = triton is not None and not isinstance(columns, triton.runtime.JITFunction)


class Launcher:
    """Runs kernels on a device. `tests/compile_report.py` has one that compiles them, for a GPU that is not there.

    Attributes:
        hip: The device is AMD's.
        processors: How many multiprocessors it has.
    """

    hip = torch.version.hip is not None

    def __init__(self, device: torch.device):
        gpu = device.type == "cuda"
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count if gpu else 1

    def options(self, warps: int, stages: int = 1, registers: Optional[int] = None) -> dict:
        """The compiler's options, for warps of 32 threads. AMD's have 64; only NVIDIA's takes a limit of registers."""
        options = {"num_warps": warps // 2 if self.hip else warps, "num_stages": stages, "enable_fp_fusion": True}
        return options if registers is None or self.hip else {**options, "maxnreg": registers}

    def __call__(self, kernel: Any, grid: Tuple[int, ...], *arguments: Any, **settings: Any) -> None:
        """Launches `kernel` with its arguments, constants and compiler options."""
        kernel[grid](*arguments, **settings)


class Problem(NamedTuple):
    """A call in the kernels' layout, see the top of this file.

    Attributes:
        x: `[B, H, W, C]`, at least two pixels high and wide.
        source: Positions or fields.
        points: Of the pattern, where the source is fields.
        mask: Factors of the samples.
        kernel: `[K, C_out, C/groups]`.
        balls: Number of metric groups, G.
        pixels: M.
        geometry: The kernels' arguments `height` to `origin_x`.
    """

    x: Tensor
    source: Tensor
    points: Optional[Tensor]
    mask: Optional[Tensor]
    kernel: Tensor
    balls: int
    pixels: int
    geometry: Tuple[Any, ...]


def pose(arguments: Arguments) -> Problem:
    """The operator's arguments in the kernels' layout.

    Raises:
        ValueError: The images have too many pixels.
    """
    x, source, weight, _, mask, stride, padding, dilation, _, points = arguments
    x = with_far_corners(x)
    batch, _, height, width = x.shape
    out_height, out_width = source.shape[-2:]
    pixels = batch * out_height * out_width
    if max(pixels, batch * height * width) >= 2**31:
        raise ValueError(f"x: {tuple(x.shape)} has more pixels than int32 can number.")
    origin = first_centre(weight, padding, dilation)
    taps = weight.flatten(2)
    return Problem(
        x.permute(0, 2, 3, 1).contiguous(),
        source.permute((0, 3, 4, 1, 2) if points is None else (0, 2, 3, 1)).contiguous(),
        None if points is None else points.contiguous(),
        None if mask is None else mask.permute(0, 2, 3, 1).contiguous(),
        taps.permute(2, 0, 1).contiguous(),
        arguments.metric_groups,
        pixels,
        (height, width, out_height, out_width, stride[0], stride[1], float(origin[0]), float(origin[1])),
    )
