"""The GPU backend: Triton kernels that gather and multiply in one pass, so that columns never exist.

A program takes a tile of output pixels. For each tap it finds where the tile reads, gathers the four corners of all
channels and feeds their mean to the tensor cores; the backward pass reads again instead of keeping anything. Images are
channels-last, positions and accumulators float32. The samples come as positions (`triton_conv2d`) or straight from a
field of metrics (`triton_metric_conv2d`), whose positions then live in registers only.

Gradients: the image's is added with float32 atomics, or, under `torch.use_deterministic_algorithms`, gathered back by
samples sorted by the pixel they read; nothing else is summed in a changing order.
"""

import functools
from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .custom_op import Arguments, define, kernel_format, with_far_corners
from .reference import ball_conv2d_reference, first_centre
from .samples import place

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except Exception:  # a broken installation of an optional package must not break the import of this one
    triton = tl = constexpr = None

# These change with the size of the image: a kernel compiled for each of their divisors would cost more than it saves.
_PLAIN = ("pixels", "taps", "height", "width", "out_height", "out_width", "stride_y", "stride_x", "slice_taps", "span")


def _jit(function):
    if triton is None:
        return function
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in _PLAIN if name in names])


# --- device code shared by the kernels -------------------------------------------------------------------------------


@_jit
def _centre(m, out_height, out_width, stride_y, stride_x, origin_y, origin_x):
    """Output pixel number → number of the image, and centre (x, y) of the receptive field."""
    row = m // out_width
    return row // out_height, (m % out_width) * stride_x + origin_x, (row % out_height) * stride_y + origin_y


@_jit
def _metric(source, points, m, tap):
    """The pattern's point p `tap` and its direction û; of the metrics at the pixels `m`, sqrt(ûᵀMû) and ωᵀû."""
    px, py = tl.load(points + 2 * tap), tl.load(points + 2 * tap + 1)
    radius = tl.sqrt(px * px + py * py)
    # any direction serves for a point at the origin
    away = radius > 0
    radius = tl.where(away, radius, 1.0)
    ux, uy = tl.where(away, px / radius, 1.0), py / radius
    field = source + m.to(tl.int64) * 5
    a, b, d = tl.load(field), tl.load(field + 1), tl.load(field + 2)
    square = a * (ux * ux) + b * (2 * ux * uy) + d * (uy * uy)
    # det / trace is below the smallest eigenvalue: idle, it catches cancellation
    square = tl.maximum(tl.maximum(square, (a * d - b * b) / (a + d)), 1e-30)
    return px, py, ux, uy, tl.sqrt(square), tl.load(field + 3) * ux + tl.load(field + 4) * uy


@_jit
def _finsler(riemannian, drift, EPS_OMEGA: constexpr):
    """F(û), guarded as in `geometry.randers`."""
    if EPS_OMEGA == 1.0:
        return riemannian
    else:
        return tl.maximum(riemannian + drift, riemannian * (0.5 * EPS_OMEGA))


@_jit
def _sample(source, points, m, tap, taps, EPS_OMEGA: constexpr, EPS: constexpr):
    """Sample `tap` of the output pixels `m`, (x, y) from their centres."""
    if points is None:
        at = source + (m.to(tl.int64) * taps + tap) * 2
        return tl.load(at), tl.load(at + 1)
    else:
        px, py, _, _, riemannian, drift = _metric(source, points, m, tap)
        stretch = 1 / (_finsler(riemannian, drift, EPS_OMEGA) + EPS)
        return px * stretch, py * stretch


@_jit
def _near(coordinate, last):
    """The near corner along an axis, clamped into the image; NaN compares false and gives 0, so no address is wild."""
    return tl.where(coordinate > 0, tl.minimum(coordinate, last), 0.0).to(tl.int32)


@_jit
def _hat(distance):
    """Linear interpolation weight; 0 a pixel or more away and for NaN."""
    distance = tl.abs(distance)
    return tl.where(distance < 1, 1 - distance, 0.0)


@_jit
def _slope(distance):
    """Derivative of the hat, from the right at the integers."""
    return tl.where((distance >= -1) & (distance < 0), 1.0, tl.where((distance >= 0) & (distance < 1), -1.0, 0.0))


@_jit
def _locate(source, points, m, tap, taps, image, x, y, height, width, EPS_OMEGA: constexpr, EPS: constexpr):
    """Number of the pixel that is sample `tap`'s near corner, and the distance (x, y) of the sample from it."""
    dx, dy = _sample(source, points, m, tap, taps, EPS_OMEGA, EPS)
    x, y = x + dx, y + dy
    near_x, near_y = _near(x, width - 2), _near(y, height - 2)
    return (image * height + near_y) * width + near_x, x - near_x, y - near_y


@_jit
def _shares(dx, dy):
    """Bilinear weights of the corners (0, 0), (0, 1), (1, 0), (1, 1) as (down, right)."""
    left, right, top, bottom = _hat(dx), _hat(dx - 1), _hat(dy), _hat(dy - 1)
    return top * left, top * right, bottom * left, bottom * right


@_jit
def _modulation(mask, m, tap, taps):
    if mask is None:
        return 1.0
    else:
        return tl.load(mask + m.to(tl.int64) * taps + tap)


@_jit
def _columns(x, at, keep, down, right, s00, s01, s10, s11):
    """The four corners at element offsets `at` [M, C], weighted and summed in float32."""
    value = tl.load(x + at, mask=keep, other=0.0).to(tl.float32) * s00[:, None]
    value += tl.load(x + at + right, mask=keep, other=0.0).to(tl.float32) * s01[:, None]
    value += tl.load(x + at + down, mask=keep, other=0.0).to(tl.float32) * s10[:, None]
    return value + tl.load(x + at + down + right, mask=keep, other=0.0).to(tl.float32) * s11[:, None]


# --- kernels ---------------------------------------------------------------------------------------------------------
# x [B, H, W, C], source [M, K, 2] positions or [M, 5] fields (then `points` is [K, 2]), mask [M, K], kernel
# [K, C_out, C/groups], with M = B·H_out·W_out `pixels`. GC and GN are the channels of a group, in and out. A pixel's
# number fits int32, an offset in elements need not. Rows beyond the last pixel repeat it and are masked in stores.
# DOT is the dtype of the product's operands: x's, but float32 in the interpreter, which cannot multiply bfloat16.


@_jit
def _forward_kernel(
    out, x, source, points, mask, kernel, bias,
    pixels, taps, channels, out_channels, GC, GN,
    height, width, out_height, out_width, stride_y, stride_x, origin_y, origin_x,
    EPS_OMEGA: constexpr, EPS: constexpr, DOT: constexpr, PRECISION: constexpr,
    BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_C: constexpr,
):  # fmt: skip
    # neighbours in the grid share a tile of pixels, so its corners are in the cache
    blocks = tl.cdiv(GN, BLOCK_N)
    slots = out_channels // GN * blocks
    slot = tl.program_id(0) % slots
    group, n = slot // blocks, slot % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(0) // slots * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.minimum(rows, pixels - 1)
    image, centre_x, centre_y = _centre(m, out_height, out_width, stride_y, stride_x, origin_y, origin_x)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in range(taps):
        near, dx, dy = _locate(source, points, m, tap, taps, image, centre_x, centre_y, height, width, EPS_OMEGA, EPS)
        modulation = _modulation(mask, m, tap, taps)
        s00, s01, s10, s11 = _shares(dx, dy)
        s00, s01, s10, s11 = s00 * modulation, s01 * modulation, s10 * modulation, s11 * modulation
        table = near.to(tl.int64)[:, None] * channels + group * GC
        taken = kernel + (tap * out_channels + group * GN + n).to(tl.int64)[None, :] * GC
        for start in range(0, GC, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            columns = _columns(x, table + c[None, :], (c < GC)[None, :], width * channels, channels, s00, s01, s10, s11)
            weights = tl.load(taken + c[:, None], mask=(c < GC)[:, None] & (n < GN)[None, :], other=0.0)
            columns = columns.to(x.dtype.element_ty).to(DOT)
            total = tl.dot(columns, weights.to(DOT), total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + group * GN + n, mask=n < GN, other=0.0).to(tl.float32)[None, :]
    at = out + rows.to(tl.int64)[:, None] * out_channels + (group * GN + n)[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(rows < pixels)[:, None] & (n < GN)[None, :])


@_jit
def _input_gradient_kernel(
    grad_x, grad_source, grad_mask, grad, x, source, points, mask, kernel,
    pixels, taps, slice_taps, channels, out_channels, GC, GN,
    height, width, out_height, out_width, stride_y, stride_x, origin_y, origin_x,
    EPS_OMEGA: constexpr, EPS: constexpr, DOT: constexpr, PRECISION: constexpr,
    BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_C: constexpr,
):  # fmt: skip
    """Adds to grad_x [B, H, W, C], sets grad_source ([M, K, 2] or [slices, M, 5]) and grad_mask; each may be None.

    One program does all channels of its taps, so a sample's address and its gradient are found once.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < pixels
    m = tl.minimum(rows, pixels - 1)
    image, centre_x, centre_y = _centre(m, out_height, out_width, stride_y, stride_x, origin_y, origin_x)
    right, down = channels, width * channels
    grad_rows = grad + m.to(tl.int64)[:, None] * out_channels
    grad_a = tl.zeros((BLOCK_M,), tl.float32)
    grad_b, grad_d, grad_wx, grad_wy = grad_a, grad_a, grad_a, grad_a

    first = tl.program_id(1) * slice_taps
    for tap in range(first, tl.minimum(first + slice_taps, taps)):
        near, dx, dy = _locate(source, points, m, tap, taps, image, centre_x, centre_y, height, width, EPS_OMEGA, EPS)
        modulation = _modulation(mask, m, tap, taps)
        s00, s01, s10, s11 = _shares(dx, dy)
        t00, t01, t10, t11 = s00 * modulation, s01 * modulation, s10 * modulation, s11 * modulation
        g00 = tl.zeros((BLOCK_M,), tl.float32)
        g01, g10, g11 = g00, g00, g00
        for group in range(out_channels // GN):
            for start in range(0, GC, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                keep = (c < GC)[None, :]
                columns = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
                for begin in range(0, GN, BLOCK_N):
                    n = begin + tl.arange(0, BLOCK_N)
                    upstream = tl.load(grad_rows + (group * GN + n)[None, :], mask=(n < GN)[None, :], other=0.0)
                    taken = kernel + (tap * out_channels + group * GN + n).to(tl.int64)[:, None] * GC + c[None, :]
                    weights = tl.load(taken, mask=(n < GN)[:, None] & keep, other=0.0)
                    columns = tl.dot(upstream.to(DOT), weights.to(DOT), columns, input_precision=PRECISION)
                at = near.to(tl.int64)[:, None] * channels + (group * GC + c)[None, :]
                if grad_source is not None:
                    g00 += tl.sum(columns * tl.load(x + at, mask=keep, other=0.0).to(tl.float32), 1)
                    g01 += tl.sum(columns * tl.load(x + at + right, mask=keep, other=0.0).to(tl.float32), 1)
                    g10 += tl.sum(columns * tl.load(x + at + down, mask=keep, other=0.0).to(tl.float32), 1)
                    g11 += tl.sum(columns * tl.load(x + at + down + right, mask=keep, other=0.0).to(tl.float32), 1)
                if grad_x is not None:
                    # a sample on a pixel, as all of an untrained metric's are, has one corner instead of four
                    keep &= live[:, None]
                    p00, p01, p10, p11 = t00[:, None], t01[:, None], t10[:, None], t11[:, None]
                    tl.atomic_add(grad_x + at, columns * p00, mask=keep & (p00 != 0), sem="relaxed")
                    tl.atomic_add(grad_x + at + right, columns * p01, mask=keep & (p01 != 0), sem="relaxed")
                    tl.atomic_add(grad_x + at + down, columns * p10, mask=keep & (p10 != 0), sem="relaxed")
                    tl.atomic_add(grad_x + at + down + right, columns * p11, mask=keep & (p11 != 0), sem="relaxed")

        if grad_source is not None:
            if grad_mask is not None:
                at_mask = grad_mask + rows.to(tl.int64) * taps + tap
                tl.store(at_mask, g00 * s00 + g01 * s01 + g10 * s10 + g11 * s11, mask=live)
            left_sum, right_sum = g00 * _hat(dy) + g10 * _hat(dy - 1), g01 * _hat(dy) + g11 * _hat(dy - 1)
            top_sum, bottom_sum = g00 * _hat(dx) + g01 * _hat(dx - 1), g10 * _hat(dx) + g11 * _hat(dx - 1)
            grad_dx = (left_sum * _slope(dx) + right_sum * _slope(dx - 1)) * modulation
            grad_dy = (top_sum * _slope(dy) + bottom_sum * _slope(dy - 1)) * modulation
            if points is None:
                at_source = grad_source + (rows.to(tl.int64) * taps + tap) * 2
                tl.store(at_source, grad_dx, mask=live)
                tl.store(at_source + 1, grad_dy, mask=live)
            else:
                # y = p / (F + ε), F = sqrt(ûᵀMû) + ωᵀû
                px, py, ux, uy, riemannian, drift = _metric(source, points, m, tap)
                stretch = 1 / (_finsler(riemannian, drift, EPS_OMEGA) + EPS)
                grad_finsler = -(grad_dx * px + grad_dy * py) * stretch * stretch
                grad_square = grad_finsler / (2 * riemannian)
                if EPS_OMEGA != 1.0:
                    free = riemannian + drift >= riemannian * (0.5 * EPS_OMEGA)
                    grad_square = tl.where(free, grad_square, grad_square * (0.5 * EPS_OMEGA))
                    grad_drift = tl.where(free, grad_finsler, 0.0)
                    grad_wx += grad_drift * ux
                    grad_wy += grad_drift * uy
                grad_a += grad_square * (ux * ux)
                grad_b += grad_square * (2 * ux * uy)
                grad_d += grad_square * (uy * uy)

    if grad_source is not None and points is not None:
        at_field = grad_source + (tl.program_id(1).to(tl.int64) * pixels + rows) * 5
        tl.store(at_field, grad_a, mask=live)
        tl.store(at_field + 1, grad_b, mask=live)
        tl.store(at_field + 2, grad_d, mask=live)
        tl.store(at_field + 3, grad_wx, mask=live)
        tl.store(at_field + 4, grad_wy, mask=live)


@_jit
def _weight_gradient_kernel(
    partial, grad, x, source, points, mask,
    pixels, taps, span, channels, out_channels, GC, GN,
    height, width, out_height, out_width, stride_y, stride_x, origin_y, origin_x,
    EPS_OMEGA: constexpr, EPS: constexpr, DOT: constexpr, PRECISION: constexpr,
    BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_C: constexpr,
):  # fmt: skip
    """A tile of one tap's gradient, summed over `span` pixels, into partial [splits, K, C_out, C/groups]."""
    blocks_c, blocks_n = tl.cdiv(GC, BLOCK_C), tl.cdiv(GN, BLOCK_N)
    pid = tl.program_id(0)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    n = pid // blocks_c % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // (blocks_c * blocks_n)
    groups = out_channels // GN
    group, tap, split = pid % groups, pid // groups % taps, pid // groups // taps
    keep = (c < GC)[None, :]

    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for begin in range(split * span, tl.minimum((split + 1) * span, pixels), BLOCK_M):
        rows = begin + tl.arange(0, BLOCK_M)
        m = tl.minimum(rows, pixels - 1)
        image, centre_x, centre_y = _centre(m, out_height, out_width, stride_y, stride_x, origin_y, origin_x)
        near, dx, dy = _locate(source, points, m, tap, taps, image, centre_x, centre_y, height, width, EPS_OMEGA, EPS)
        modulation = _modulation(mask, m, tap, taps)
        s00, s01, s10, s11 = _shares(dx, dy)
        s00, s01, s10, s11 = s00 * modulation, s01 * modulation, s10 * modulation, s11 * modulation
        at = near.to(tl.int64)[:, None] * channels + (group * GC + c)[None, :]
        columns = _columns(x, at, keep, width * channels, channels, s00, s01, s10, s11).to(x.dtype.element_ty)
        upstream = tl.load(
            grad + m.to(tl.int64)[:, None] * out_channels + (group * GN + n)[None, :],
            mask=(rows < pixels)[:, None] & (n < GN)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(upstream.to(DOT)), columns.to(DOT), total, input_precision=PRECISION)
    at = ((split * taps + tap).to(tl.int64) * out_channels + group * GN + n)[:, None] * GC + c[None, :]
    tl.store(partial + at, total, mask=(n < GN)[:, None] & keep)


@_jit
def _key_kernel(
    keys, source, points,
    pixels, taps, height, width, out_height, out_width, stride_y, stride_x, origin_y, origin_x,
    EPS_OMEGA: constexpr, EPS: constexpr, BLOCK_M: constexpr,
):  # fmt: skip
    """(near corner, tap) of every sample as one number, keys [M, K]; of a sample that weighs nothing, a huge one."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.minimum(rows, pixels - 1)
    image, centre_x, centre_y = _centre(m, out_height, out_width, stride_y, stride_x, origin_y, origin_x)
    for tap in range(taps):
        near, dx, dy = _locate(source, points, m, tap, taps, image, centre_x, centre_y, height, width, EPS_OMEGA, EPS)
        weighs = (dx > -1) & (dx < 2) & (dy > -1) & (dy < 2)
        key = tl.where(weighs, near.to(tl.int64) * taps + tap, 1 << 62)
        tl.store(keys + rows.to(tl.int64) * taps + tap, key, mask=rows < pixels)


@_jit
def _transposed_kernel(
    grad_x, order, starts, grad, source, points, mask, kernel,
    pixels, taps, channels, out_channels, GC, GN,
    height, width, out_height, out_width, stride_y, stride_x, origin_y, origin_x,
    EPS_OMEGA: constexpr, EPS: constexpr, DOT: constexpr, PRECISION: constexpr,
    BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_C: constexpr,
):  # fmt: skip
    """grad_x without atomics: a convolution of `grad` whose taps read back the samples that read a pixel.

    Here `pixels` are the input's. `order` lists the samples by (near corner p, tap j), from `starts[p·K + j]` on.
    """
    blocks = tl.cdiv(GC, BLOCK_C)
    slots = channels // GC * blocks
    slot = tl.program_id(0) % slots
    group, c = slot // blocks, slot % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.program_id(0) // slots * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < pixels
    x, y = rows % width, rows // width % height

    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for tap in range(taps):
        for begin in range(0, GN, BLOCK_N):
            n = begin + tl.arange(0, BLOCK_N)
            columns = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for corner in range(4):
                right, down = corner % 2, corner // 2
                inside = live & (x >= right) & (y >= down)
                segment = starts + (rows - down * width - right).to(tl.int64) * taps + tap
                start, stop = tl.load(segment, mask=inside, other=0), tl.load(segment + 1, mask=inside, other=0)
                for i in range(tl.max(stop - start, 0).to(tl.int32)):
                    hit = start + i < stop
                    m = (tl.load(order + start + i, mask=hit, other=0) // taps).to(tl.int32)
                    _, centre_x, centre_y = _centre(m, out_height, out_width, stride_y, stride_x, origin_y, origin_x)
                    dx, dy = _sample(source, points, m, tap, taps, EPS_OMEGA, EPS)
                    share = _hat(centre_x + dx - x) * _hat(centre_y + dy - y) * _modulation(mask, m, tap, taps)
                    upstream = tl.load(
                        grad + m.to(tl.int64)[:, None] * out_channels + (group * GN + n)[None, :],
                        mask=hit[:, None] & (n < GN)[None, :],
                        other=0.0,
                    )
                    columns += upstream.to(tl.float32) * share[:, None]
            taken = kernel + (tap * out_channels + group * GN + n).to(tl.int64)[:, None] * GC + c[None, :]
            weights = tl.load(taken, mask=(n < GN)[:, None] & (c < GC)[None, :], other=0.0)
            columns = columns.to(grad.dtype.element_ty).to(DOT)
            total = tl.dot(columns, weights.to(DOT), total, input_precision=PRECISION)
    at = grad_x + rows.to(tl.int64)[:, None] * channels + (group * GC + c)[None, :]
    tl.store(at, total.to(grad_x.dtype.element_ty), mask=live[:, None] & (c < GC)[None, :])


# --- launches --------------------------------------------------------------------------------------------------------

INTERPRETED = triton is not None and not isinstance(_forward_kernel, triton.runtime.JITFunction)


@torch.compiler.assume_constant_result
def why_not(device: str, weight_dim: int) -> Optional[str]:
    """Why this backend cannot run on a type of device, or None where it can.

    Args:
        device: `torch.device.type`.
        weight_dim: Number of dimensions of the kernel; any will do.
    """
    if triton is None:
        return "triton is not installed"
    if INTERPRETED:
        return None if device in ("cpu", "cuda") else "triton's interpreter takes tensors on the CPU and on CUDA only"
    if device != "cuda" or not torch.cuda.is_available():
        return "it is written for CUDA GPUs (elsewhere only in triton's interpreter, TRITON_INTERPRET=1)"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"it needs compute capability 8.0, the GPU has {major}.{minor}"


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _power(size: int, most: int) -> int:
    """Block for `size` channels: tl.dot takes powers of two from 16."""
    return min(max(triton.next_power_of_2(size), 16), most)


class _Problem(NamedTuple):
    """A call in the kernels' layout: see the note above them."""

    x: Tensor
    source: Tensor
    points: Optional[Tensor]
    mask: Optional[Tensor]
    kernel: Tensor
    joined: int  # groups of the layer in one group here
    pixels: int
    geometry: Tuple[Any, ...]
    settings: dict

    @property
    def channels(self) -> Tuple[int, int, int, int]:
        """(C, C_out, C of a group, C_out of a group)."""
        channels, (_, out_channels, group) = self.x.shape[3], self.kernel.shape
        return channels, out_channels, group, out_channels // (channels // group)


def _join(groups: int, channels: int) -> int:
    """How many groups to treat as one: a tile narrower than 32 channels leaves loads and tensor cores idle."""
    return next(n for n in range(1, groups + 1) if groups % n == 0 and (n * channels >= 32 or n == groups))


def _problem(arguments: Arguments) -> _Problem:
    x, source, weight, mask, stride, padding, dilation, groups, points, eps = arguments
    eps_omega = 1.0
    x = with_far_corners(x)
    batch, _, height, width = x.shape
    out_height, out_width = source.shape[-2:]
    pixels = batch * out_height * out_width
    if max(pixels, batch * height * width) >= 2**31:
        raise ValueError(f"x: {tuple(x.shape)} has more pixels than int32 can number.")
    origin = first_centre(weight, padding, dilation)

    taps = weight.flatten(2)
    joined = _join(groups, taps.shape[1])
    kernel = taps.permute(2, 0, 1)
    if joined > 1:
        # block-diagonal
        kernel = kernel.reshape(taps.shape[2], groups // joined, joined, -1, 1, taps.shape[1])
        kernel = kernel * torch.eye(joined, dtype=kernel.dtype, device=kernel.device).view(joined, 1, joined, 1)
        kernel = kernel.reshape(taps.shape[2], taps.shape[0], -1)

    last = (0, 3, 4, 1, 2) if points is None else (0, 2, 3, 1)
    dtype = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[x.dtype]
    matmul = torch.backends.cuda.matmul
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return _Problem(
        x.permute(0, 2, 3, 1).contiguous(),
        source.permute(last).contiguous(),
        None if points is None else points.contiguous(),
        None if mask is None else mask.permute(0, 2, 3, 1).contiguous(),
        kernel.contiguous(),
        joined,
        pixels,
        (height, width, out_height, out_width, stride[0], stride[1], float(origin[0]), float(origin[1])),
        {
            "EPS_OMEGA": eps_omega,
            "EPS": eps,
            "DOT": tl.float32 if INTERPRETED else dtype,
            "PRECISION": "tf32" if tf32 else "ieee",
        },
    )


def _blocks(call: _Problem, most_n: int, most_c: int, stages: int = 1) -> dict:
    """Tile sizes and compiler settings.

    64 pixels are the least that Hopper's matrix instruction takes, and 8 warps on 64×128 need 128 registers a thread:
    two programs then share a processor, and one multiplies while the other gathers. float32 operands take twice the
    space, and without tf32 they are multiplied by the plain cores.
    """
    half = 1 if call.x.element_size() == 2 else 2
    _, _, group, out_group = call.channels
    block_n, block_c = _power(out_group, most_n // half), _power(group, most_c // half)
    return {
        "BLOCK_M": 64 // half,
        "BLOCK_N": block_n,
        "BLOCK_C": block_c,
        "num_warps": 8 if block_n * block_c >= 2048 else 4,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }


def _forward(arguments: Arguments, bias: Optional[Tensor]) -> Tensor:
    call = _problem(arguments)
    channels, out_channels, group, out_group = call.channels
    taps, out_size = len(call.kernel), call.geometry[2:4]
    out = call.x.new_empty(call.x.shape[0], *out_size, out_channels)
    if out.numel():
        blocks = _blocks(call, most_n=128, most_c=64)
        tiles = triton.cdiv(call.pixels, blocks["BLOCK_M"]) * triton.cdiv(out_group, blocks["BLOCK_N"])
        with torch.cuda.device_of(call.x):
            _forward_kernel[(tiles * (channels // group),)](
                out, call.x, call.source, call.points, call.mask, call.kernel, bias,
                call.pixels, taps, channels, out_channels, group, out_group,
                *call.geometry, **call.settings, **blocks,
            )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def _input_gradient(
    call: _Problem, grad: Tensor, need_x: bool, need_source: bool
) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """Gradients of x (float32), source and mask in the kernels' layout."""
    channels, out_channels, group, out_group = call.channels
    taps = len(call.kernel)
    # addresses and products of four corners fill the registers: half the channels at a time
    blocks = _blocks(call, most_n=128, most_c=32)
    tiles = triton.cdiv(call.pixels, blocks["BLOCK_M"])
    # A small image has too few tiles to fill the GPU: then its taps are shared out.
    slice_taps = triton.cdiv(taps, min(taps, triton.cdiv(4 * _processors(grad.device), tiles)))
    slices = triton.cdiv(taps, slice_taps)
    grad_x = torch.zeros_like(call.x, dtype=torch.float32) if need_x else None
    grad_source = grad_mask = None
    if need_source:
        shape = call.source.shape if call.points is None else (slices, *call.source.shape)
        grad_source = call.source.new_empty(shape)
        grad_mask = None if call.mask is None else torch.empty_like(call.mask)
    _input_gradient_kernel[(tiles, slices)](
        grad_x, grad_source, grad_mask, grad, call.x, call.source, call.points, call.mask, call.kernel,
        call.pixels, taps, slice_taps, channels, out_channels, group, out_group,
        *call.geometry, **call.settings, **blocks,
    )  # fmt: skip
    if grad_source is not None and call.points is not None:
        grad_source = grad_source.sum(0)
    return grad_x, grad_source, grad_mask


def _transposed(call: _Problem, grad: Tensor) -> Tensor:
    """The gradient of x, always the same to the last bit."""
    channels, out_channels, group, out_group = call.channels
    taps = len(call.kernel)
    rows = call.x.numel() // channels
    blocks = _blocks(call, most_n=64, most_c=128)
    keys = torch.empty(call.pixels, taps, dtype=torch.int64, device=grad.device)
    eps = {name: call.settings[name] for name in ("EPS_OMEGA", "EPS")}
    _key_kernel[(triton.cdiv(call.pixels, 128),)](
        keys, call.source, call.points, call.pixels, taps, *call.geometry, **eps, BLOCK_M=128
    )
    keys, order = torch.sort(keys.flatten(), stable=True)
    starts = torch.searchsorted(keys, torch.arange(rows * taps + 1, device=grad.device))
    grad_x = torch.empty_like(call.x)
    tiles = triton.cdiv(rows, blocks["BLOCK_M"]) * triton.cdiv(group, blocks["BLOCK_C"])
    _transposed_kernel[(tiles * (channels // group),)](
        grad_x, order, starts, grad, call.source, call.points, call.mask, call.kernel,
        rows, taps, channels, out_channels, group, out_group,
        *call.geometry, **call.settings, **blocks,
    )  # fmt: skip
    return grad_x


def _weight_gradient(call: _Problem, grad: Tensor) -> Tensor:
    """`[K, C_out, C/groups]` in float32. Splits are summed in a fixed order: as cheap as atomics, and deterministic."""
    channels, out_channels, group, out_group = call.channels
    taps = len(call.kernel)
    # the one long loop: here loads in flight (asynchronous copies) pay
    blocks = _blocks(call, most_n=128, most_c=64, stages=3)
    tiles = triton.cdiv(group, blocks["BLOCK_C"]) * triton.cdiv(out_group, blocks["BLOCK_N"])
    tiles *= channels // group * taps
    steps = triton.cdiv(call.pixels, blocks["BLOCK_M"])
    # about four programs for each processor, and at least eight steps each
    span = max(triton.cdiv(steps * tiles, 4 * _processors(grad.device)), min(steps, 8)) * blocks["BLOCK_M"]
    splits = triton.cdiv(call.pixels, span)
    partial = torch.empty(splits, *call.kernel.shape, dtype=torch.float32, device=grad.device)
    _weight_gradient_kernel[(splits * tiles,)](
        partial, grad, call.x, call.source, call.points, call.mask,
        call.pixels, taps, span, channels, out_channels, group, out_group,
        *call.geometry, **call.settings, **blocks,
    )  # fmt: skip
    return partial.sum(0)


def _gradients(
    arguments: Arguments, grad: Tensor, need_x: bool, need_source: bool, need_weight: bool
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, positions or fields, weight and mask; an empty tensor for what is not needed."""
    x, _, weight, _ = arguments[:4]
    call, grad = _problem(arguments), grad.permute(0, 2, 3, 1).contiguous()
    grad_x = grad_source = grad_kernel = grad_mask = None
    with torch.cuda.device_of(x):
        transposed = need_x and torch.are_deterministic_algorithms_enabled()
        if need_source or (need_x and not transposed):
            grad_x, grad_source, grad_mask = _input_gradient(call, grad, need_x and not transposed, need_source)
        if transposed:
            grad_x = _transposed(call, grad)
        if need_weight:
            grad_kernel = _weight_gradient(call, grad)

    if grad_x is not None:
        grad_x = grad_x[:, : x.shape[2], : x.shape[3]].to(x.dtype).contiguous().permute(0, 3, 1, 2)
    if grad_source is not None:
        grad_source = grad_source.permute((0, 3, 4, 1, 2) if call.points is None else (0, 3, 1, 2))
    if grad_mask is not None:
        grad_mask = grad_mask.permute(0, 3, 1, 2)
    if grad_kernel is not None:
        if call.joined > 1:
            out_group = weight.shape[0] * weight.shape[1] // x.shape[1]
            blocks = grad_kernel.view(len(grad_kernel), -1, call.joined, out_group, call.joined, weight.shape[1])
            grad_kernel = blocks.diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3).flatten(1, 3)
        grad_kernel = grad_kernel.permute(1, 2, 0).reshape(weight.shape).to(weight.dtype)
        grad_kernel = grad_kernel.contiguous(memory_format=kernel_format(weight))

    def kept(gradient: Optional[Tensor]) -> Tensor:
        return x.new_empty(0) if gradient is None else gradient

    return kept(grad_x), kept(grad_source), kept(grad_kernel), kept(grad_mask)


# --- ops -------------------------------------------------------------------------------------------------------------


_conv2d = define("triton_conv2d", _forward, _gradients)


def triton_conv2d(x, samples, *arguments):
    samples = place(samples)
    function = ball_conv2d_reference if torch.float64 in (x.dtype, samples.dtype) else _conv2d
    return function(x, samples, *arguments)
