"""The GPU backend: Triton kernels that gather and multiply in one pass, so that columns never exist.

A program takes a tile of output pixels. For each tap it finds where the tile reads, gathers the four corners of all
channels and feeds their mean to the tensor cores; the backward pass reads again instead of keeping anything. Images are
channels-last, positions and accumulators float32. The samples come as positions or straight from affine maps, and then
live in registers only. Depthwise layers have kernels of their own, in `triton_depthwise.py`.

The image's gradient is added with float32 atomics, in an order that changes; nothing else is.
"""

from typing import Optional, Tuple, Union

import torch
from torch import Tensor

from . import triton_depthwise
from .custom_op import Arguments, Gradients, by_pixels, define
from .triton_common import (
    INTERPRETED,
    Launcher,
    centre,
    columns,
    constexpr,
    jit,
    locate,
    modulation,
    pose,
    sample_gradient,
    shares,
    store_fields,
    tl,
    triton,
)

# --- kernels ---------------------------------------------------------------------------------------------------------
# GC and GN are the channels of a group of the kernel, in and out, and BC those of a ball (a metric group). One of GC
# and BC divides the other, UC is the smaller: a unit of UC channels has one group and one ball. Rows beyond the last
# pixel repeat it and are masked in stores. DOT is the dtype of the product's operands: x's, but float32 in the
# interpreter, which cannot multiply bfloat16.


@jit
def forward_kernel(
    out, x, source, points, mask, kernel, bias,
    pixels, taps, channels, out_channels, GC, GN, BC, UC,
    height, width, out_height, out_width, stride_y, stride_x, origin_y, origin_x,
    DOT: constexpr, PRECISION: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_C: constexpr,
):  # fmt: skip
    # neighbours in the grid share a tile of pixels, so its corners are in the cache
    blocks = tl.cdiv(GN, BLOCK_N)
    slots = out_channels // GN * blocks
    slot = tl.program_id(0) % slots
    group, n = slot // blocks, slot % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(0) // slots * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.minimum(rows, pixels - 1)
    image, centre_x, centre_y = centre(m, out_height, out_width, stride_y, stride_x, origin_y, origin_x)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for unit in range(0, GC, UC):
        ball = m.to(tl.int64) * (channels // BC) + (group * GC + unit) // BC
        for tap in range(taps):
            near, dx, dy = locate(source, points, ball, tap, taps, image, centre_x, centre_y, height, width)
            s00, s01, s10, s11 = shares(dx, dy, modulation(mask, ball, tap, taps))
            table = near.to(tl.int64)[:, None] * channels + group * GC
            taken = kernel + (tap * out_channels + group * GN + n).to(tl.int64)[None, :] * GC
            for start in range(unit, unit + UC, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                keep = c < unit + UC
                values = columns(x, table + c[None, :], keep[None, :], width * channels, channels, s00, s01, s10, s11)
                weights = tl.load(taken + c[:, None], mask=keep[:, None] & (n < GN)[None, :], other=0.0)
                values = values.to(x.dtype.element_ty).to(DOT)
                total = tl.dot(values, weights.to(DOT), total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + group * GN + n, mask=n < GN, other=0.0).to(tl.float32)[None, :]
    at = out + rows.to(tl.int64)[:, None] * out_channels + (group * GN + n)[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(rows < pixels)[:, None] & (n < GN)[None, :])


@jit
def input_gradient_kernel(
    grad_x, grad_source, grad_mask, grad, x, source, points, mask, kernel,
    pixels, taps, slice_taps, channels, out_channels, GC, GN, BC, UC,
    height, width, out_height, out_width, stride_y, stride_x, origin_y, origin_x,
    DOT: constexpr, PRECISION: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_C: constexpr,
):  # fmt: skip
    """Adds to grad_x [B, H, W, C], sets grad_source ([M·G, K, 2] or [slices, M·G, 6]) and grad_mask; each may be None.

    One program does all channels of its ball and taps, so a sample's address and its gradient are found once.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < pixels
    m = tl.minimum(rows, pixels - 1)
    image, centre_x, centre_y = centre(m, out_height, out_width, stride_y, stride_x, origin_y, origin_x)
    balls, first_channel = channels // BC, tl.program_id(2) * BC
    ball = m.to(tl.int64) * balls + tl.program_id(2)
    right, down = channels, width * channels
    grad_rows = grad + m.to(tl.int64)[:, None] * out_channels
    nothing = tl.zeros((BLOCK_M,), tl.float32)
    grad_fields = nothing, nothing, nothing, nothing, nothing, nothing

    first = tl.program_id(1) * slice_taps
    for tap in range(first, tl.minimum(first + slice_taps, taps)):
        near, dx, dy = locate(source, points, ball, tap, taps, image, centre_x, centre_y, height, width)
        factor = modulation(mask, ball, tap, taps)
        t00, t01, t10, t11 = shares(dx, dy, factor)
        g00 = tl.zeros((BLOCK_M,), tl.float32)
        g01, g10, g11 = g00, g00, g00
        for unit in range(first_channel, first_channel + BC, UC):
            group = unit // GC
            for start in range(unit, unit + UC, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                keep = (c < unit + UC)[None, :]
                values = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
                for begin in range(0, GN, BLOCK_N):
                    n = begin + tl.arange(0, BLOCK_N)
                    upstream = tl.load(grad_rows + (group * GN + n)[None, :], mask=(n < GN)[None, :], other=0.0)
                    taken = kernel + (tap * out_channels + group * GN + n).to(tl.int64)[:, None] * GC
                    taken += (c - group * GC)[None, :]
                    weights = tl.load(taken, mask=(n < GN)[:, None] & keep, other=0.0)
                    values = tl.dot(upstream.to(DOT), weights.to(DOT), values, input_precision=PRECISION)
                at = near.to(tl.int64)[:, None] * channels + c[None, :]
                if grad_source is not None:
                    g00 += tl.sum(values * tl.load(x + at, mask=keep, other=0.0).to(tl.float32), 1)
                    g01 += tl.sum(values * tl.load(x + at + right, mask=keep, other=0.0).to(tl.float32), 1)
                    g10 += tl.sum(values * tl.load(x + at + down, mask=keep, other=0.0).to(tl.float32), 1)
                    g11 += tl.sum(values * tl.load(x + at + down + right, mask=keep, other=0.0).to(tl.float32), 1)
                if grad_x is not None:
                    # a sample on a pixel, as all of an untrained metric's are, has one corner instead of four
                    keep &= live[:, None]
                    p00, p01, p10, p11 = t00[:, None], t01[:, None], t10[:, None], t11[:, None]
                    tl.atomic_add(grad_x + at, values * p00, mask=keep & (p00 != 0), sem="relaxed")
                    tl.atomic_add(grad_x + at + right, values * p01, mask=keep & (p01 != 0), sem="relaxed")
                    tl.atomic_add(grad_x + at + down, values * p10, mask=keep & (p10 != 0), sem="relaxed")
                    tl.atomic_add(grad_x + at + down + right, values * p11, mask=keep & (p11 != 0), sem="relaxed")

        if grad_source is not None:
            grad_fields = sample_gradient(
                grad_source, grad_mask, grad_fields, points, ball, tap, taps, live, dx, dy, factor, g00, g01, g10, g11
            )

    if grad_source is not None and points is not None:
        at_field = grad_source + (tl.program_id(1).to(tl.int64) * pixels * balls + ball) * 6
        store_fields(at_field, grad_fields, live)


@jit
def weight_gradient_kernel(
    partial, grad, x, source, points, mask,
    pixels, taps, span, channels, out_channels, GC, GN, BC, UC,
    height, width, out_height, out_width, stride_y, stride_x, origin_y, origin_x,
    DOT: constexpr, PRECISION: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_C: constexpr,
):  # fmt: skip
    """A tile of one tap's gradient, summed over `span` pixels, into partial [splits, K, C_out, C/groups]."""
    blocks_c, blocks_n, units = tl.cdiv(UC, BLOCK_C), tl.cdiv(GN, BLOCK_N), channels // UC
    pid = tl.program_id(0)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    n = pid // blocks_c % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // (blocks_c * blocks_n)
    unit, tap, split = pid % units * UC, pid // units % taps, pid // units // taps
    group = unit // GC
    keep = (c < UC)[None, :]

    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for begin in range(split * span, tl.minimum((split + 1) * span, pixels), BLOCK_M):
        rows = begin + tl.arange(0, BLOCK_M)
        m = tl.minimum(rows, pixels - 1)
        image, centre_x, centre_y = centre(m, out_height, out_width, stride_y, stride_x, origin_y, origin_x)
        ball = m.to(tl.int64) * (channels // BC) + unit // BC
        near, dx, dy = locate(source, points, ball, tap, taps, image, centre_x, centre_y, height, width)
        s00, s01, s10, s11 = shares(dx, dy, modulation(mask, ball, tap, taps))
        at = near.to(tl.int64)[:, None] * channels + (unit + c)[None, :]
        values = columns(x, at, keep, width * channels, channels, s00, s01, s10, s11).to(x.dtype.element_ty)
        upstream = tl.load(
            grad + m.to(tl.int64)[:, None] * out_channels + (group * GN + n)[None, :],
            mask=(rows < pixels)[:, None] & (n < GN)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(upstream.to(DOT)), values.to(DOT), total, input_precision=PRECISION)
    at = ((split * taps + tap).to(tl.int64) * out_channels + group * GN + n)[:, None] * GC
    tl.store(partial + at + (unit - group * GC + c)[None, :], total, mask=(n < GN)[:, None] & keep)


# --- launches --------------------------------------------------------------------------------------------------------


def why_not(x: Tensor, source: Tensor, weight: Tensor, groups: int) -> Optional[str]:
    """Why these kernels cannot compute a call, or None where they can; see `dispatch.Backend`."""
    if torch.float64 in (x.dtype, source.dtype):
        return "it computes in float32, and the call is in float64"
    if torch.are_deterministic_algorithms_enabled():
        return "torch is asked for deterministic algorithms, and its atomics add in a changing order"
    return _why_not_on(x.device.type)


@torch.compiler.assume_constant_result
def _why_not_on(device: str) -> Optional[str]:
    if triton is None:
        return "triton is not installed"
    if INTERPRETED:
        return None if device in ("cpu", "cuda") else "triton's interpreter takes tensors on the CPU and on CUDA only"
    if device != "cuda" or not torch.cuda.is_available():
        return "it is written for GPUs that torch calls cuda (elsewhere for triton's interpreter, TRITON_INTERPRET=1)"
    major, minor = torch.cuda.get_device_capability()
    if major >= 8 or torch.version.hip is not None:
        return None
    return f"it needs compute capability 8.0, the GPU has {major}.{minor}"


def _power(size: int, most: int) -> int:
    """Block for `size` channels: tl.dot takes powers of two from 16."""
    return min(max(triton.next_power_of_2(size), 16), most)


def _join(groups: int, channels: int) -> int:
    """How many groups to treat as one: a tile narrower than 32 channels leaves loads and tensor cores idle."""
    return next(n for n in range(1, groups + 1) if groups % n == 0 and (n * channels >= 32 or n == groups))


class _Dense:
    """A call, its groups joined where they are narrow, and how its kernels are launched."""

    def __init__(self, arguments: Arguments, launch: Launcher):
        call, groups = pose(arguments), arguments.groups
        taps, out_channels, group = call.kernel.shape
        # only groups that share their ball can be joined
        self.joined = joined = _join(max(groups // call.balls, 1), group)
        if joined > 1:
            # block-diagonal
            kernel = call.kernel.reshape(taps, groups // joined, joined, -1, 1, group)
            kernel = kernel * torch.eye(joined, dtype=kernel.dtype, device=kernel.device).view(joined, 1, joined, 1)
            call = call._replace(kernel=kernel.reshape(taps, out_channels, -1))
            groups, group = groups // joined, joined * group
        self.call, self.launch, self.taps = call, launch, taps
        self.channels, self.out_channels = group * groups, out_channels
        self.group, self.out_group, self.ball = group, out_channels // groups, self.channels // call.balls
        self.unit = min(self.group, self.ball)
        self.wide = 1 if call.x.element_size() == 2 else 2

    @property
    def sizes(self) -> Tuple[int, ...]:
        """The kernels' arguments `channels` to `UC`."""
        return self.channels, self.out_channels, self.group, self.out_group, self.ball, self.unit

    def settings(
        self, most_n: int, most_c: int, stages: int = 1, warps: Optional[int] = None, registers: Optional[int] = None
    ) -> dict:
        """Constants and compiler options, as `tests/compile_report.py` justifies them.

        64 pixels are the least that Hopper's matrix instruction takes. With tiles of 64×128 and 8 warps, forward and 32
        channels of the image at a time, or backward and 16, a thread there needs at most 128 registers: two programs
        then share a processor, and one multiplies while the other gathers. float32 operands take twice the space, and
        without tf32 they are multiplied by the plain cores.

        Args:
            most_n: The most output channels in a tile.
            most_c: The most channels of the image.
            stages: Of the software pipeline.
            warps: By default four for small tiles and eight for others.
            registers: The most a thread may have. It also keeps NVIDIA's assembler from aiming lower, and spilling.
        """
        dtype = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[self.call.x.dtype]
        matmul = torch.backends.cuda.matmul
        tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
        block_n, block_c = _power(self.out_group, most_n // self.wide), _power(self.unit, max(most_c // self.wide, 16))
        return {
            "DOT": tl.float32 if INTERPRETED else dtype,
            "PRECISION": "tf32" if tf32 and not self.launch.hip else "ieee",
            "BLOCK_M": 64 // self.wide,
            "BLOCK_N": block_n,
            "BLOCK_C": block_c,
            **self.launch.options(warps or (8 if block_n * block_c >= 2048 else 4), stages, registers),
        }

    def forward(self, bias: Optional[Tensor], out: Tensor) -> None:
        """Sets `out` `[B, H_out, W_out, C_out]`."""
        call, settings = self.call, self.settings(most_n=128, most_c=32, registers=128)
        tiles = triton.cdiv(call.pixels, settings["BLOCK_M"]) * triton.cdiv(self.out_group, settings["BLOCK_N"])
        grid = (tiles * (self.out_channels // self.out_group),)
        self.launch(
            forward_kernel, grid, out, call.x, call.source, call.points, call.mask, call.kernel, bias,
            call.pixels, self.taps, *self.sizes, *call.geometry, **settings,
        )  # fmt: skip

    def input_gradient(
        self, grad: Tensor, need_x: bool, need_source: bool
    ) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
        """Gradients of x (float32), source and mask in the kernels' layout."""
        call, taps = self.call, self.taps
        # Ampere adds its atomics one by one, and each has an address: with four warps there are too few registers
        settings = self.settings(most_n=128, most_c=16, warps=8, registers=None if self.wide == 1 else 168)
        tiles = triton.cdiv(call.pixels, settings["BLOCK_M"])
        # A small image has too few tiles to fill the GPU: then its taps are shared out.
        most = triton.cdiv(4 * self.launch.processors, tiles * call.balls)
        slice_taps = triton.cdiv(taps, min(taps, most))
        slices = triton.cdiv(taps, slice_taps)
        grad_x = torch.zeros_like(call.x, dtype=torch.float32) if need_x else None
        grad_source = grad_mask = None
        if need_source:
            shape = call.source.shape if call.points is None else (slices, *call.source.shape)
            grad_source = call.source.new_empty(shape)
            grad_mask = None if call.mask is None else torch.empty_like(call.mask)
        self.launch(
            input_gradient_kernel, (tiles, slices, call.balls), grad_x, grad_source, grad_mask,
            grad, call.x, call.source, call.points, call.mask, call.kernel,
            call.pixels, taps, slice_taps, *self.sizes, *call.geometry, **settings,
        )  # fmt: skip
        if grad_source is not None and call.points is not None:
            grad_source = grad_source.sum(0)
        return grad_x, grad_source, grad_mask

    def weight_gradient(self, grad: Tensor) -> Tensor:
        """`[K, C_out, C/groups]` in float32.

        Splits are summed in a fixed order: as cheap as atomics, and deterministic.
        """
        call, taps = self.call, self.taps
        # the one long loop: here loads in flight (asynchronous copies) pay
        settings = self.settings(most_n=128, most_c=64, stages=3)
        block_m = settings["BLOCK_M"]
        tiles = triton.cdiv(self.unit, settings["BLOCK_C"]) * triton.cdiv(self.out_group, settings["BLOCK_N"])
        tiles *= self.channels // self.unit * taps
        steps = triton.cdiv(call.pixels, block_m)
        # about four programs for each processor, and at least eight steps each
        span = max(triton.cdiv(steps * tiles, 4 * self.launch.processors), min(steps, 8)) * block_m
        splits = triton.cdiv(call.pixels, span)
        partial = torch.empty(splits, *call.kernel.shape, dtype=torch.float32, device=grad.device)
        self.launch(
            weight_gradient_kernel, (splits * tiles,),
            partial, grad, call.x, call.source, call.points, call.mask,
            call.pixels, taps, span, *self.sizes, *call.geometry, **settings,
        )  # fmt: skip
        kernel = partial.sum(0)
        if self.joined > 1:
            member = self.group // self.joined, self.out_group // self.joined
            blocks = kernel.view(taps, -1, self.joined, member[1], self.joined, member[0])
            kernel = blocks.diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3).flatten(1, 3)
        return kernel

    def gradients(
        self, grad: Tensor, need_x: bool, need_source: bool, need_weight: bool
    ) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
        """Of x, source, kernel and mask in the kernels' layout."""
        grad_x = grad_source = grad_mask = None
        if need_x or need_source:
            grad_x, grad_source, grad_mask = self.input_gradient(grad, need_x, need_source)
        return grad_x, grad_source, self.weight_gradient(grad) if need_weight else None, grad_mask


# --- the operator ----------------------------------------------------------------------------------------------------


def _method(arguments: Arguments, launch: Optional[Launcher]) -> Union[_Dense, triton_depthwise.Depthwise]:
    x, weight = arguments.x, arguments.weight
    depthwise = weight.shape[1] == 1 and weight.shape[0] == x.shape[1]
    return (triton_depthwise.Depthwise if depthwise else _Dense)(arguments, launch or Launcher(x.device))


def forward(arguments: Arguments, out: Tensor, launch: Optional[Launcher] = None) -> None:
    """See `custom_op.define`."""
    with torch.cuda.device_of(out):
        _method(arguments, launch).forward(arguments.bias, by_pixels(out))


def gradients(arguments: Arguments, grad: Tensor, into: Gradients, launch: Optional[Launcher] = None) -> None:
    """See `custom_op.define`."""
    x, weight = into.x, into.weight
    with torch.cuda.device_of(grad):
        method = _method(arguments, launch)
        needs = x is not None, into.source is not None, weight is not None
        grad_x, grad_source, grad_kernel, grad_mask = method.gradients(by_pixels(grad).contiguous(), *needs)
    if x is not None and grad_x is not None:
        by_pixels(x).copy_(grad_x[:, : x.shape[2], : x.shape[3]])
    if weight is not None and grad_kernel is not None:
        weight.copy_(grad_kernel.permute(1, 2, 0).reshape(weight.shape))
    for to, gradient in ((into.source, grad_source), (into.mask, grad_mask)):
        if to is not None and gradient is not None:
            by_pixels(to).copy_(gradient)


# `ball_conv2d_reference`, fast on GPUs
triton_conv2d = define("triton_conv2d", forward, gradients)
