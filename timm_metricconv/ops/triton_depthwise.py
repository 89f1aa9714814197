"""Depthwise Triton kernels: every channel has a kernel of its own, so there is nothing for a matrix unit to do.

A program takes a tile of output pixels and channels of one ball (metric group). Channels are contiguous: a thread reads
16 bytes at once and sums in float32. The tile is `WIDE` pixels wide, so that its samples overlap in both directions.

The image's gradient is added with atomics. Neighbouring output pixels mostly read neighbouring input pixels with the
same tap: what a pixel and its neighbours to the left, above and left above add to one pixel of the gradient is summed
first, and costs one atomic instead of four. Where a neighbour's sample went elsewhere its share is added alone, so this
holds for any positions.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor

from .custom_op import Arguments
from .triton_common import (
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
# kernel is [K, C], BC the channels of a ball, `rows` the output rows of all images, one below the other.


@jit
def _tile(tile, rows, out_width, BLOCK_M: constexpr, WIDE: constexpr):
    """Numbers of a tile's output pixels, and which of them exist; the others repeat some that do."""
    strips, i = tl.cdiv(out_width, WIDE), tl.arange(0, BLOCK_M)
    row, column = tile // strips * (BLOCK_M // WIDE) + i // WIDE, tile % strips * WIDE + i % WIDE
    live = (row < rows) & (column < out_width)
    return tl.minimum(row, rows - 1) * out_width + tl.minimum(column, out_width - 1), live


@jit
def forward_kernel(
    out, x, source, points, mask, kernel, bias,
    rows, taps, channels, BC,
    height, width, out_height, out_width, stride_y, stride_x, origin_y, origin_x,
    BLOCK_M: constexpr, BLOCK_C: constexpr, WIDE: constexpr,
):  # fmt: skip
    # neighbours in the grid share a tile of pixels
    blocks, balls = tl.cdiv(BC, BLOCK_C), channels // BC
    slot = tl.program_id(0) % (blocks * balls)
    m, live = _tile(tl.program_id(0) // (blocks * balls), rows, out_width, BLOCK_M, WIDE)
    ball = m.to(tl.int64) * balls + slot // blocks
    c = slot % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    keep = c < BC
    c += slot // blocks * BC
    image, centre_x, centre_y = centre(m, out_height, out_width, stride_y, stride_x, origin_y, origin_x)

    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for tap in range(taps):
        near, dx, dy = locate(source, points, ball, tap, taps, image, centre_x, centre_y, height, width)
        s00, s01, s10, s11 = shares(dx, dy, modulation(mask, ball, tap, taps))
        at = near.to(tl.int64)[:, None] * channels + c[None, :]
        values = columns(x, at, keep[None, :], width * channels, channels, s00, s01, s10, s11)
        total += values * tl.load(kernel + tap * channels + c, mask=keep, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        total += tl.load(bias + c, mask=keep, other=0.0).to(tl.float32)[None, :]
    at = out + m.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=live[:, None] & keep[None, :])


@jit
def _shift(value, by):
    """`value` of the pixel `by` places before in the tile; of some pixel where there is none."""
    size: constexpr = value.shape[0]
    return tl.gather(value, (tl.arange(0, size) - by + size) % size, 0)


@jit
def input_gradient_kernel(
    grad_x, grad, source, points, mask, kernel,
    rows, taps, slice_taps, channels, BC,
    height, width, out_height, out_width, stride_y, stride_x, origin_y, origin_x,
    BLOCK_M: constexpr, BLOCK_C: constexpr, WIDE: constexpr,
):  # fmt: skip
    """Adds to grad_x [B, H, W, C]."""
    balls = channels // BC
    number = tl.program_id(0) % balls
    m, live = _tile(tl.program_id(0) // balls, rows, out_width, BLOCK_M, WIDE)
    ball = m.to(tl.int64) * balls + number
    image, centre_x, centre_y = centre(m, out_height, out_width, stride_y, stride_x, origin_y, origin_x)
    right, down = channels, width * channels
    i = tl.arange(0, BLOCK_M)
    has_left, has_above = live & (i % WIDE > 0), live & (i >= WIDE)

    first = tl.program_id(1) * slice_taps
    for tap in range(first, tl.minimum(first + slice_taps, taps)):
        near, dx, dy = locate(source, points, ball, tap, taps, image, centre_x, centre_y, height, width)
        t00, t01, t10, t11 = shares(dx, dy, tl.where(live, modulation(mask, ball, tap, taps), 0.0))
        # where the neighbours' samples lie beside this one, their shares of this one's near corner
        from_left = has_left & (_shift(near, 1) + 1 == near)
        from_above = has_above & (_shift(near, WIDE) + width == near)
        from_both = has_left & has_above & (_shift(near, WIDE + 1) + width + 1 == near)
        left = tl.where(from_left, _shift(t01, 1), 0.0)
        above = tl.where(from_above, _shift(t10, WIDE), 0.0)
        both = tl.where(from_both, _shift(t11, WIDE + 1), 0.0)
        any_share = (t00 != 0) | (left != 0) | (above != 0) | (both != 0)
        # what the neighbours do not take
        t01 = tl.where(_shift(from_left.to(tl.int32), -1) != 0, 0.0, t01)
        t10 = tl.where(_shift(from_above.to(tl.int32), -WIDE) != 0, 0.0, t10)
        t11 = tl.where(_shift(from_both.to(tl.int32), -WIDE - 1) != 0, 0.0, t11)
        for start in range(0, BC, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            keep = (c < BC)[None, :]
            c += number * BC
            weights = tl.load(kernel + (tap * channels + c)[None, :], mask=keep, other=0.0).to(tl.float32)
            at = grad + m.to(tl.int64)[:, None] * channels + c[None, :]
            at_x = grad_x + near.to(tl.int64)[:, None] * channels + c[None, :]
            upstream = tl.load(at, mask=keep & live[:, None], other=0.0).to(tl.float32)
            value = upstream * t00[:, None]
            at -= channels
            value += tl.load(at, mask=keep & (left != 0)[:, None], other=0.0).to(tl.float32) * left[:, None]
            at -= out_width * channels
            value += tl.load(at, mask=keep & (both != 0)[:, None], other=0.0).to(tl.float32) * both[:, None]
            at += channels
            value += tl.load(at, mask=keep & (above != 0)[:, None], other=0.0).to(tl.float32) * above[:, None]
            upstream *= weights
            tl.atomic_add(at_x, value * weights, mask=keep & any_share[:, None], sem="relaxed")
            tl.atomic_add(at_x + right, upstream * t01[:, None], mask=keep & (t01 != 0)[:, None], sem="relaxed")
            tl.atomic_add(at_x + down, upstream * t10[:, None], mask=keep & (t10 != 0)[:, None], sem="relaxed")
            tl.atomic_add(at_x + down + right, upstream * t11[:, None], mask=keep & (t11 != 0)[:, None], sem="relaxed")


@jit
def sample_gradient_kernel(
    grad_source, grad_mask, partial, grad, x, source, points, mask, kernel,
    rows, taps, slice_taps, channels, BC,
    height, width, out_height, out_width, stride_y, stride_x, origin_y, origin_x,
    BLOCK_M: constexpr, BLOCK_C: constexpr, WIDE: constexpr,
):  # fmt: skip
    """Sets grad_source ([M·G, K, 2] or [slices, M·G, 6]), grad_mask, and each tile's part of the kernel's gradient.

    All need the same corners. That part is partial [tiles, K, C]; each of the three may be None.
    """
    balls = channels // BC
    number, tile = tl.program_id(0) % balls, tl.program_id(0) // balls
    m, live = _tile(tile, rows, out_width, BLOCK_M, WIDE)
    ball = m.to(tl.int64) * balls + number
    image, centre_x, centre_y = centre(m, out_height, out_width, stride_y, stride_x, origin_y, origin_x)
    right, down = channels, width * channels
    nothing = tl.zeros((BLOCK_M,), tl.float32)
    grad_fields = nothing, nothing, nothing, nothing, nothing, nothing

    first = tl.program_id(1) * slice_taps
    for tap in range(first, tl.minimum(first + slice_taps, taps)):
        near, dx, dy = locate(source, points, ball, tap, taps, image, centre_x, centre_y, height, width)
        factor = modulation(mask, ball, tap, taps)
        t00, t01, t10, t11 = shares(dx, dy, factor)
        g00 = tl.zeros((BLOCK_M,), tl.float32)
        g01, g10, g11 = g00, g00, g00
        for start in range(0, BC, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            keep = (c < BC)[None, :]
            c += number * BC
            at = x + near.to(tl.int64)[:, None] * channels + c[None, :]
            at_grad = grad + m.to(tl.int64)[:, None] * channels + c[None, :]
            upstream = tl.load(at_grad, mask=keep & live[:, None], other=0.0).to(tl.float32)
            x00 = tl.load(at, mask=keep, other=0.0).to(tl.float32) * upstream
            x01 = tl.load(at + right, mask=keep, other=0.0).to(tl.float32) * upstream
            x10 = tl.load(at + down, mask=keep, other=0.0).to(tl.float32) * upstream
            x11 = tl.load(at + down + right, mask=keep, other=0.0).to(tl.float32) * upstream
            if partial is not None:
                value = x00 * t00[:, None] + x01 * t01[:, None] + x10 * t10[:, None] + x11 * t11[:, None]
                at_partial = partial + (tile.to(tl.int64) * taps + tap) * channels + c[None, :]
                tl.store(at_partial, tl.sum(value, 0)[None, :], mask=keep)
            if grad_source is not None:
                weights = tl.load(kernel + (tap * channels + c)[None, :], mask=keep, other=0.0).to(tl.float32)
                g00 += tl.sum(x00 * weights, 1)
                g01 += tl.sum(x01 * weights, 1)
                g10 += tl.sum(x10 * weights, 1)
                g11 += tl.sum(x11 * weights, 1)

        if grad_source is not None:
            grad_fields = sample_gradient(
                grad_source, grad_mask, grad_fields, points, ball, tap, taps, live, dx, dy, factor, g00, g01, g10, g11
            )

    if grad_source is not None and points is not None:
        at_field = grad_source + (tl.program_id(1).to(tl.int64) * rows * out_width * balls + ball) * 6
        store_fields(at_field, grad_fields, live)


# --- launches --------------------------------------------------------------------------------------------------------

WIDE = 8


class Depthwise:
    """A depthwise call, and how its kernels are launched."""

    def __init__(self, arguments: Arguments, launch: Launcher):
        self.call, self.launch = pose(arguments), launch
        self.taps, self.channels, _ = self.call.kernel.shape
        self.ball = self.channels // self.call.balls
        self.rows = self.call.pixels // self.call.geometry[3]
        self.wide = 1 if self.call.x.element_size() == 2 else 2

    def settings(self, registers: int, warps: int = 4) -> dict:
        """Constants and compiler options, as `tests/compile_report.py` justifies them.

        Args:
            registers: The most a thread may have: what leaves most programs to a processor and spills nothing.
            warps: Four share a tile of eight values a thread.
        """
        # a block that divides the channels leaves no thread idle, and 8 of them are 16 bytes
        block_c = min(self.ball & -self.ball, 64)
        if block_c < 8:
            block_c = min(triton.next_power_of_2(self.ball), 64)
        return {
            "BLOCK_M": min(1024 // block_c, 128),
            "BLOCK_C": block_c,
            "WIDE": WIDE,
            **self.launch.options(warps, registers=registers),
        }

    def tiles(self, block_m: int) -> int:
        """How many tiles there are."""
        return triton.cdiv(self.rows, block_m // WIDE) * triton.cdiv(self.call.geometry[3], WIDE)

    def forward(self, bias: Optional[Tensor], out: Tensor) -> None:
        """Sets `out` `[B, H_out, W_out, C]`."""
        call, settings = self.call, self.settings(registers=64 * self.wide)
        blocks = triton.cdiv(self.ball, settings["BLOCK_C"]) * call.balls
        self.launch(
            forward_kernel, (self.tiles(settings["BLOCK_M"]) * blocks,),
            out, call.x, call.source, call.points, call.mask, call.kernel, bias,
            self.rows, self.taps, self.channels, self.ball, *call.geometry, **settings,
        )  # fmt: skip

    def gradients(
        self, grad: Tensor, need_x: bool, need_source: bool, need_weight: bool
    ) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
        """Of x (float32), source, kernel `[K, C, 1]` (float32) and mask in the kernels' layout."""
        call, settings = self.call, self.settings(registers=min(128 * self.wide, 255))
        tiles = self.tiles(settings["BLOCK_M"])
        # A small image has too few tiles to fill the GPU: then its taps are shared out.
        most = triton.cdiv(8 * self.launch.processors, tiles * call.balls)
        slice_taps = triton.cdiv(self.taps, min(self.taps, most))
        slices = triton.cdiv(self.taps, slice_taps)
        grid = tiles * call.balls, slices
        sizes = self.rows, self.taps, slice_taps, self.channels, self.ball
        grad_x = grad_source = grad_mask = partial = None
        if need_x:
            grad_x = torch.zeros_like(call.x, dtype=torch.float32)
            # Ampere adds its atomics one by one, and each has an address: twice the warps have half of them a thread
            self.launch(
                input_gradient_kernel, grid, grad_x, grad, call.source, call.points, call.mask, call.kernel,
                *sizes, *call.geometry, **self.settings(registers=168, warps=8),
            )  # fmt: skip
        if need_source:
            shape = call.source.shape if call.points is None else (slices, *call.source.shape)
            grad_source = call.source.new_empty(shape)
            grad_mask = None if call.mask is None else torch.empty_like(call.mask)
        if need_weight:
            partial = torch.empty(tiles, *call.kernel.shape, dtype=torch.float32, device=grad.device)
        if need_source or need_weight:
            self.launch(
                sample_gradient_kernel, grid, grad_source, grad_mask, partial,
                grad, call.x, call.source, call.points, call.mask, call.kernel,
                *sizes, *call.geometry, **settings,
            )  # fmt: skip
        if grad_source is not None and call.points is not None:
            grad_source = grad_source.sum(0)
        return grad_x, grad_source, None if partial is None else partial.sum(0), grad_mask
