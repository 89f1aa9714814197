"""The fastest CPU backend, compiled by Numba: from an affine map to its samples and their sum in one pass.

The kernels work in registers of sixteen numbers: sixteen output pixels while they find where the samples lie, sixteen
channels of one pixel while they read and add. A depthwise layer never has columns: every output pixel adds up its
samples in registers. In any other layer a thread makes the columns of some pixels and multiplies them with the kernel
while they are in its cache: that is faster than any matrix product that reads them from memory.

The kernels run in torch's own threads, those of its OpenMP: a second pool would fight with them for the cores, because
after a matrix product they wait busily for the next. Each thread owns what it writes, so nothing is added in a changing
order.
"""

import ctypes
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from math import floor
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Tuple

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numba.np.unsafe.ndarray import to_fixed_tuple
from torch import Tensor

from .custom_op import Arguments, Gradients, by_pixels, define, with_far_corners
from .reference import first_centre
from .registers import (
    LANES,
    ROWS,
    WIDEST,
    fetch_and_add,
    larger,
    load,
    pointer,
    smaller,
    spread,
    store,
    store_corner,
    tile_1,
    tile_2,
    tile_4,
    total,
    zeros,
)
from .samples import FIELDS

# Numbers to read of which a thread has enough to do.
THREAD_NUMBERS = 2**17
DEPTH = 64  # of a matrix product at a time: so much of the kernel is in the first cache
# Numbers of columns that stay in a core's own cache, and output pixels of which a kernel's reading is worth its time.
CACHED_NUMBERS, CACHED_PIXELS = 2**18, 64
# Numbers that the kernels' gradients of all units may have before they are added up.
GRADIENT_NUMBERS = 2**21
PROCESS = os.getpid()
# Of registers.py. Numba keeps machine code on disk for as long as this file alone stays what it is.
REGISTERS_DIGEST = "f06fb9039199a387"

_inlined = numba.njit(forceinline=True)


# --- where the samples lie: sixteen output pixels at a time ----------------------------------------------------------


class _Sizes(NamedTuple):
    """The integers that a kernel needs. Output pixels are numbered row by row, image by image."""

    height: int  # of an image, two at least
    width: int
    channels: int  # of a pixel in memory: a run of whole registers for each metric group
    out_pixels: int  # of an image
    out_width: int
    stride_y: int
    stride_x: int
    top: int  # the first centre, in halves of a pixel
    left: int
    taps: int
    metric_groups: int
    affine: int  # whether the source is a field of affine maps
    source_image: int  # strides in memory: of images, of a pixel's numbers, of pixels
    source_number: int
    source_pixel: int
    mask_image: int
    mask_number: int
    mask_pixel: int
    kernel_groups: int  # none in a depthwise layer
    out_channels: int
    shared: int  # channels in both a metric group and a kernel group
    strip_out: int  # registers that a tile has of a kernel group's output channels
    pixels: int  # whose columns are in the cache at a time
    # the backward pass alone
    strip_in: int = 1  # registers that a tile has of a metric group's channels
    blocks: int = 1  # of the channels of a metric group: a unit of work has one
    sets: int = 1  # of images: a unit has one too


class _Arrays(NamedTuple):
    """What kernels read and write, flat and in float32; of length 0 where there is none, or it is not wanted.

    Tensors outside the kernels, arrays inside.
    """

    x: Any  # [B, height, width, channels]
    source: Any
    mask: Any
    points: Any  # [K, 2] the pattern's points
    weight: Any  # [K, channels] of a depthwise layer; else `_strips_out` of it, or `_strips_in` to go back
    bias: Any  # [channels] of a depthwise layer, else [C_out]
    values: Any  # the output, or the gradient of it
    grad_x: Any  # as x, begins at 0
    grad_source: Any  # [blocks, B, H_out, W_out, ...]
    grad_mask: Any  # [blocks, B, H_out, W_out, G·K]
    grad_weight: Any  # [sets, ...] as weight; begins at 0


class _Plan(NamedTuple):
    """How the samples of sixteen output pixels read an image, flat and in float32.

    Corners are (0, 0), (0, 1), (1, 0) and (1, 1) as (down, right).
    """

    fields: np.ndarray  # [6, 16] the affine maps
    centres: np.ndarray  # [2, 16] (x, y)
    corners: np.ndarray  # [K, 16] int32, the pixel at the first corner
    shares: np.ndarray  # [K, 4, 16] the corners' bilinear weights
    slopes_x: np.ndarray  # [K, 4, 16] their derivative along x
    slopes_y: np.ndarray  # [K, 4, 16] and along y
    by_corner: np.ndarray  # [K, 4, 16] the gradients of `shares`, before the mask
    masks: np.ndarray  # [K, 16]


@_inlined
def _empty_plan(taps, for_gradients):
    more = taps * 4 * LANES * for_gradients
    return _Plan(
        np.empty(FIELDS * LANES, np.float32),
        np.empty(2 * LANES, np.float32),
        np.empty(taps * LANES, np.int32),
        np.empty(taps * 4 * LANES, np.float32),
        np.empty(more, np.float32),
        np.empty(more, np.float32),
        np.empty(more, np.float32),
        np.ones(taps * LANES, np.float32),
    )


@_inlined
def _hat(distance):
    """max(0, 1 − |distance|)."""
    return larger(1 - abs(distance), 0)


@_inlined
def _axis(coordinate, size):
    """The near corner along an axis of `size` pixels, and the distance from it.

    The corner stays in the image and the hat does the rest: a sample that is a pixel or more outside weighs nothing.
    NaN is outside.
    """
    coordinate = smaller(larger(coordinate, -2), size + 1)
    corner = smaller(larger(floor(coordinate), 0), size - 2)
    return corner, coordinate - corner


@_inlined
def _hat_slopes(distance):
    """The slopes of the near and of the far corner's hat: what they rise in the cell to the right, as torchvision's."""
    cell = floor(distance)
    here = _hat(cell)
    return _hat(cell + 1) - here, here - _hat(cell - 1)


@_inlined
def _store_four(array, at, a, b, c, d):
    store(array, at, a)
    store(array, at + LANES, b)
    store(array, at + 2 * LANES, c)
    store(array, at + 3 * LANES, d)


@numba.njit
def _fill_plan(plan, n, a, first, last, group, for_gradients):
    """Plans the output pixels from `first`; those from `last` on repeat the one before it.

    The mask goes into the shares, or, `for_gradients`, where the slopes are wanted too, stays beside them.
    """
    source_at, mask_at = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    image = first // n.out_pixels
    pixel = first - image * n.out_pixels
    row = pixel // n.out_width
    column = pixel - row * n.out_width
    for i in range(LANES):
        plan.centres[i] = 0.5 * n.left + n.stride_x * column
        plan.centres[LANES + i] = 0.5 * n.top + n.stride_y * row
        source_at[i] = image * n.source_image + pixel * n.source_pixel
        mask_at[i] = image * n.mask_image + pixel * n.mask_pixel
        if first + i + 1 < last:  # a division for each pixel would cost as much as some of its samples
            pixel, column = pixel + 1, column + 1
            if column == n.out_width:
                row, column = row + 1, 0
            if pixel == n.out_pixels:
                image, pixel, row = image + 1, 0, 0
    if n.affine:
        for field in range(FIELDS):
            number = (group * FIELDS + field) * n.source_number
            for i in range(LANES):
                plan.fields[field * LANES + i] = a.source[source_at[i] + number]

    centre_x, centre_y = load(plan.centres, 0), load(plan.centres, LANES)
    xx, xy, shift_x = load(plan.fields, 0), load(plan.fields, LANES), load(plan.fields, 4 * LANES) + centre_x
    yx, yy = load(plan.fields, 2 * LANES), load(plan.fields, 3 * LANES)
    shift_y = load(plan.fields, 5 * LANES) + centre_y
    offsets = np.empty(2 * LANES, np.float32)
    for tap in range(n.taps):
        if n.affine:
            px, py = a.points[2 * tap], a.points[2 * tap + 1]
            sample_x, sample_y = xx * px + xy * py + shift_x, yx * px + yy * py + shift_y
        else:
            number = 2 * (group * n.taps + tap) * n.source_number
            for i in range(LANES):
                offsets[i] = a.source[source_at[i] + number]
                offsets[LANES + i] = a.source[source_at[i] + number + n.source_number]
            sample_x, sample_y = load(offsets, 0) + centre_x, load(offsets, LANES) + centre_y
        column, right = _axis(sample_x, n.width)
        row, down = _axis(sample_y, n.height)
        store_corner(plan.corners, tap * LANES, row, column, zeros() + n.width)
        x0, x1, y0, y1 = _hat(right), _hat(right - 1), _hat(down), _hat(down - 1)
        if len(a.mask):
            number = (group * n.taps + tap) * n.mask_number
            for i in range(LANES):
                plan.masks[tap * LANES + i] = a.mask[mask_at[i] + number]
        at = tap * 4 * LANES
        if for_gradients:
            near_x, far_x = _hat_slopes(right)
            near_y, far_y = _hat_slopes(down)
            _store_four(plan.slopes_x, at, y0 * near_x, y0 * far_x, y1 * near_x, y1 * far_x)
            _store_four(plan.slopes_y, at, near_y * x0, near_y * x1, far_y * x0, far_y * x1)
        else:
            mask = load(plan.masks, tap * LANES)
            y0, y1 = mask * y0, mask * y1
        _store_four(plan.shares, at, y0 * x0, y0 * x1, y1 * x0, y1 * x1)


@numba.njit
def _through_samples(plan, n, a, first, count, group, block):
    """Gradients of the corners' weights in `plan.by_corner` → of masks, and of positions or of affine maps."""
    xx = xy = yx = yy = shift_x = shift_y = zeros()
    # the number of a pixel's metric group, in all blocks
    place = (block * (len(a.x) // (n.height * n.width * n.channels)) * n.out_pixels + first) * n.metric_groups + group
    for tap in range(n.taps):
        at = tap * 4 * LANES
        by_x = by_y = by_mask = zeros()
        for corner in range(at, at + 4 * LANES, LANES):
            grad = load(plan.by_corner, corner)
            by_x = by_x + grad * load(plan.slopes_x, corner)
            by_y = by_y + grad * load(plan.slopes_y, corner)
            by_mask = by_mask + grad * load(plan.shares, corner)
        mask = load(plan.masks, tap * LANES)
        by_x, by_y = mask * by_x, mask * by_y
        if n.affine:
            px, py = a.points[2 * tap], a.points[2 * tap + 1]
            xx, xy, shift_x = xx + by_x * px, xy + by_x * py, shift_x + by_x
            yx, yy, shift_y = yx + by_y * px, yy + by_y * py, shift_y + by_y
        _store_four(plan.by_corner, at, by_x, by_y, by_mask, by_mask)
        for i in range(count):
            number = (place + i * n.metric_groups) * n.taps + tap
            if not n.affine:
                a.grad_source[2 * number] = plan.by_corner[at + i]
                a.grad_source[2 * number + 1] = plan.by_corner[at + LANES + i]
            if len(a.grad_mask):
                a.grad_mask[number] = plan.by_corner[at + 2 * LANES + i]
    if n.affine:
        _store_four(plan.fields, 0, xx, xy, yx, yy)
        store(plan.fields, 4 * LANES, shift_x)
        store(plan.fields, 5 * LANES, shift_y)
        for i in range(count):
            for field in range(FIELDS):
                number = (place + i * n.metric_groups) * FIELDS + field
                a.grad_source[number] = plan.fields[field * LANES + i]


# --- what they read: sixteen channels at a time ----------------------------------------------------------------------


@_inlined
def _corners(x, at, below, right):
    """A sample's four corners, for the channels from `at` on."""
    return load(x, at), load(x, at + right), load(x, below), load(x, below + right)


@_inlined
def _four(array, tap, pixel):
    """The numbers of a sample's four corners, each sixteen times."""
    at = tap * 4 * LANES + pixel
    return spread(array, at), spread(array, at + LANES), spread(array, at + 2 * LANES), spread(array, at + 3 * LANES)


@_inlined
def _weighed(corners, shares):
    return shares[0] * corners[0] + shares[1] * corners[1] + (shares[2] * corners[2] + shares[3] * corners[3])


@numba.njit
def _depthwise(first, last, n, a):
    """The output [B·H_out·W_out, channels] of a depthwise layer, from pixel `first` to `last`, into `values`."""
    plan = _empty_plan(n.taps, False)
    run, line = n.channels // n.metric_groups, n.width * n.channels
    for chunk in range(first, last, LANES):
        for group in range(n.metric_groups):
            _fill_plan(plan, n, a, chunk, last, group, False)
            for i in range(min(LANES, last - chunk)):
                image = (chunk + i) // n.out_pixels * n.height * line
                for c in range(group * run, group * run + run, LANES):
                    added = load(a.bias, c)
                    for tap in range(n.taps):
                        at = image + plan.corners[tap * LANES + i] * n.channels + c
                        shares = _four(plan.shares, tap, i)
                        value = _weighed(_corners(a.x, at, at + line, n.channels), shares)
                        added = added + value * load(a.weight, tap * n.channels + c)
                    store(a.values, (chunk + i) * n.channels + c, added)


@numba.njit
def _columns(first, last, n, a, columns):
    """The columns [..., G, K, channels / G] of the output pixels from `first` to `last`."""
    plan = _empty_plan(n.taps, False)
    run, line = n.channels // n.metric_groups, n.width * n.channels
    for chunk in range(first, last, LANES):
        for group in range(n.metric_groups):
            _fill_plan(plan, n, a, chunk, last, group, False)
            for i in range(min(LANES, last - chunk)):
                image = (chunk + i) // n.out_pixels * n.height * line
                for tap in range(n.taps):
                    corner = image + plan.corners[tap * LANES + i] * n.channels
                    column = (((chunk - first + i) * n.metric_groups + group) * n.taps + tap - group) * run
                    shares = _four(plan.shares, tap, i)
                    for c in range(group * run, group * run + run, LANES):
                        corners = _corners(a.x, corner + c, corner + line + c, n.channels)
                        store(columns, column + c, _weighed(corners, shares))


# --- what they are multiplied with: tiles of a matrix product ---------------------------------------------------------


@numba.njit
def _add_product(registers, rows, depth, width, to, of, by):
    """Adds a[rows, depth]·b[depth, width] to out, four rows at a time and always four.

    Args:
        registers: Of a tile: it reads that many, of b and of out.
        rows: Of a and out.
        depth: Columns of a, rows of b.
        width: Columns of b and out.
        to: out as an array, where it begins there, and the step from row to row.
        of: a likewise, and the step from column to column.
        by: b as out.
    """
    (out, at, out_row), (a, a_at, a_row, a_depth), (b, b_at, b_depth) = to, of, by
    for row in range(0, rows, ROWS):
        to_row, of_row = at + row * out_row, a_at + row * a_row
        if registers == 1:
            tile_1(out, to_row, out_row, a, of_row, a_row, a_depth, b, b_at, b_depth, depth, width)
        elif registers == 2:
            tile_2(out, to_row, out_row, a, of_row, a_row, a_depth, b, b_at, b_depth, depth, width)
        else:
            tile_4(out, to_row, out_row, a, of_row, a_row, a_depth, b, b_at, b_depth, depth, width)


@_inlined
def _group_sizes(n):
    """Metric groups of a kernel group, kernel groups of a metric group; an output strip's width, strips of a group."""
    strip = n.strip_out * LANES
    metric_groups = max(1, n.metric_groups // n.kernel_groups)
    kernel_groups = max(1, n.kernel_groups // n.metric_groups)
    return metric_groups, kernel_groups, strip, -(-(n.out_channels // n.kernel_groups) // strip)


@_inlined
def _whole(number):
    return -(-number // LANES) * LANES


@numba.njit
def _dense(first, last, n, a, columns, strips):
    """The output [B·H_out·W_out, C_out] of any other layer, by `strips` [..., pixels, 16·strip_out] of it."""
    _columns(first, last, n, a, columns)
    metric_groups, kernel_groups, strip, count = _group_sizes(n)
    run, per_group, weight_at = n.channels // n.metric_groups, n.out_channels // n.kernel_groups, 0
    rows, row = last - first, n.taps * n.channels
    for group in range(n.kernel_groups):
        strips[:] = 0
        for number in range(count):
            to = strips, number * n.pixels * strip, strip
            for tap in range(metric_groups * n.taps):
                of = (group * metric_groups // kernel_groups * n.taps + tap) * run + group % kernel_groups * n.shared
                for c in range(0, n.shared, DEPTH):
                    depth = min(DEPTH, n.shared - c)
                    by = a.weight, weight_at + c * strip, strip
                    _add_product(n.strip_out, rows, depth, strip, to, (columns, of + c, row, 1), by)
                weight_at += _whole(n.shared) * strip
        for i in range(rows):
            for number in range(count):
                channel = group * per_group + number * strip
                at, to = (number * n.pixels + i) * strip, (first + i) * n.out_channels + channel
                for c in range(min(strip, per_group - number * strip)):
                    a.values[to + c] = strips[at + c] + a.bias[channel + c]


@numba.njit
def _read_strips(first, last, n, a, group, strips):
    """The gradient of a metric group's outputs from pixel `first` to `last`, in strips and filled up with zeros."""
    metric_groups, kernel_groups, strip, count = _group_sizes(n)
    per_group, first_group = n.out_channels // n.kernel_groups, group * kernel_groups // metric_groups
    strips[:] = 0
    for i in range(last - first):
        for number in range(kernel_groups * count):
            channel = (first_group + number // count) * per_group + number % count * strip
            at, of = (number * n.pixels + i) * strip, (first + i) * n.out_channels + channel
            for c in range(min(strip, per_group - number % count * strip)):
                strips[at + c] = a.values[of + c]


@numba.njit
def _products_back(pixels, n, a, group, image_set, c_0, c_1, strips, samples, need_weight):
    """Adds a matrix product to the gradients of the samples [pixels, K, c_1 − c_0] of a metric group's channels.

    Or, where `samples` are the samples themselves, to the kernel's. The other factor is the gradient of the output.
    """
    metric_groups, kernel_groups, strip, count = _group_sizes(n)
    filled, wide, row = _whole(n.shared), n.strip_in * LANES, n.taps * (c_1 - c_0)
    for part in range(kernel_groups):
        kernel_group = group * kernel_groups // metric_groups + part
        block = (kernel_group * metric_groups + group % metric_groups) * n.taps
        for tap in range(n.taps):
            for c in range(c_0, c_1 if kernel_groups == 1 else filled, wide):
                place = tap * (c_1 - c_0) + c - c_0 + part * n.shared
                for number in range(count):
                    at = (((block + tap) * filled + c) * count + number * wide) * strip
                    of = (part * count + number) * n.pixels * strip
                    if need_weight:
                        to, by = (a.grad_weight, image_set * len(a.weight) + at, wide), (samples, place, row)
                        _add_product(n.strip_in, strip, pixels, wide, to, (strips, of, 1, strip), by)
                    else:
                        to, by = (samples, place, row), (a.weight, at, wide)
                        _add_product(n.strip_in, pixels, strip, n.shared - c, to, (strips, of, strip, 1), by)


@_inlined
def _add(array, at, value):
    store(array, at, load(array, at) + value)


@numba.njit
def _backward(first, last, n, a, samples, strips):
    """All gradients of the samples of some output pixels, unit by unit.

    A unit is a block of channels of a metric group in a set of images: it owns what it adds to, and adds pixel by
    pixel. In a dense layer `samples` are first the gradients of some pixels' samples, and then these samples.
    """
    plan, line, groups, dense = _empty_plan(n.taps, True), n.width * n.channels, n.metric_groups, n.kernel_groups > 0
    run = n.channels // groups
    batch, registers = len(a.x) // (n.height * line), run // (LANES * n.strip_in)
    need_x, need_source, need_weight = len(a.grad_x) > 0, len(a.grad_source) > 0, len(a.grad_weight) > 0
    for unit in range(first, last):
        block, image_set, group = unit // (n.sets * groups), unit // groups % n.sets, unit % groups
        c_0 = registers * block // n.blocks * n.strip_in * LANES
        c_1 = registers * (block + 1) // n.blocks * n.strip_in * LANES if block + 1 < n.blocks else run
        begin, end = batch * image_set // n.sets * n.out_pixels, batch * (image_set + 1) // n.sets * n.out_pixels
        for piece in range(begin, end, n.pixels):
            piece_end = min(piece + n.pixels, end)
            if dense:
                _read_strips(piece, piece_end, n, a, group, strips)
                samples[: _whole(piece_end - piece) * n.taps * (c_1 - c_0) + LANES] = 0
                if need_x or need_source:
                    _products_back(piece_end - piece, n, a, group, image_set, c_0, c_1, strips, samples, False)
            for chunk in range(piece, piece_end, LANES):
                _fill_plan(plan, n, a, chunk, piece_end, group, True)
                count = min(LANES, piece_end - chunk)
                for i in range(count):
                    image = (chunk + i) // n.out_pixels
                    for tap in range(n.taps):
                        sample = tap * LANES + i
                        mask, shares = spread(plan.masks, sample), _four(plan.shares, tap, i)
                        corner = image * n.height * line + plan.corners[sample] * n.channels + group * run
                        by_00 = by_01 = by_10 = by_11 = zeros()
                        for c in range(c_0, c_1, LANES):
                            at, below = corner + c, corner + line + c
                            corners = _corners(a.x, at, below, n.channels)
                            if dense:
                                place = ((chunk - piece + i) * n.taps + tap) * (c_1 - c_0) + c - c_0
                                grad = load(samples, place)
                                store(samples, place, mask * _weighed(corners, shares))
                            else:
                                channel = group * run + c
                                grad = load(a.values, (chunk + i) * n.channels + channel)
                                if need_weight:
                                    value = mask * _weighed(corners, shares)
                                    _add(a.grad_weight, (image_set * n.taps + tap) * n.channels + channel, grad * value)
                                grad = grad * load(a.weight, tap * n.channels + channel)
                            if need_source:
                                by_00, by_01 = by_00 + grad * corners[0], by_01 + grad * corners[1]
                                by_10, by_11 = by_10 + grad * corners[2], by_11 + grad * corners[3]
                            if need_x:
                                grad = mask * grad
                                _add(a.grad_x, at, shares[0] * grad)
                                _add(a.grad_x, at + n.channels, shares[1] * grad)
                                _add(a.grad_x, below, shares[2] * grad)
                                _add(a.grad_x, below + n.channels, shares[3] * grad)
                        if need_source:
                            four = tap * 4 * LANES + i
                            plan.by_corner[four], plan.by_corner[four + LANES] = total(by_00), total(by_01)
                            plan.by_corner[four + 2 * LANES] = total(by_10)
                            plan.by_corner[four + 3 * LANES] = total(by_11)
                if need_source:
                    _through_samples(plan, n, a, chunk, count, group, block)
            if dense and need_weight:
                _products_back(piece_end - piece, n, a, group, image_set, c_0, c_1, strips, samples, True)


# --- many threads: each takes the next piece of work until none is left ----------------------------------------------

# A call in memory: the work taken so far, all of it, a piece of it; sizes; address and length of each array.
_HEADER, _SIZES = 3, len(_Sizes._fields)
_NUMBERS = _HEADER + _SIZES + 2 * len(_Arrays._fields)


@_inlined
def _array_of(call, number):
    at = _HEADER + _SIZES + 2 * number
    return numba.carray(pointer(call[at]), (call[at + 1],), np.float32)


@_inlined
def _opened(data):
    """The integers of a call, and what they stand for."""
    call = numba.carray(data, (_NUMBERS,), np.int64)
    sizes = _Sizes(*to_fixed_tuple(call[_HEADER : _HEADER + _SIZES], _SIZES))
    arrays = _Arrays(
        _array_of(call, 0),
        _array_of(call, 1),
        _array_of(call, 2),
        _array_of(call, 3),
        _array_of(call, 4),
        _array_of(call, 5),
        _array_of(call, 6),
        _array_of(call, 7),
        _array_of(call, 8),
        _array_of(call, 9),
        _array_of(call, 10),
    )
    return call, sizes, arrays


@_inlined
def _next_piece(call):
    first = fetch_and_add(call, call[2])
    return first, min(first + call[2], call[1])


def _run_depthwise(data):
    call, sizes, arrays = _opened(data)
    first, last = _next_piece(call)
    while first < last:
        _depthwise(first, last, sizes, arrays)
        first, last = _next_piece(call)


@_inlined
def _room(n):
    """A thread's columns, or samples, of some pixels, and strips of their output; the last tile reads beyond."""
    if not n.kernel_groups:
        return np.empty(0, np.float32), np.empty(0, np.float32)
    _, kernel_groups, strip, count = _group_sizes(n)
    columns = np.empty(n.pixels * n.taps * n.channels + LANES, np.float32)
    return columns, np.empty(kernel_groups * count * n.pixels * strip, np.float32)


def _run_dense(data):
    call, sizes, arrays = _opened(data)
    columns, strips = _room(sizes)
    first, last = _next_piece(call)
    while first < last:
        _dense(first, last, sizes, arrays, columns, strips)
        first, last = _next_piece(call)


def _run_backward(data):
    call, sizes, arrays = _opened(data)
    samples, strips = _room(sizes)
    first, last = _next_piece(call)
    while first < last:
        _backward(first, last, sizes, arrays, samples, strips)
        first, last = _next_piece(call)


@functools.cache
def _machine_code(function: Callable) -> Any:
    """Compiles at the first call, and keeps the machine code on disk where there is a place for it."""
    signature = numba.types.void(numba.types.voidptr)
    try:
        return numba.cfunc(signature, cache=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache
        return numba.cfunc(signature)(function)


@functools.cache
def _torch_threads() -> Optional[Callable]:
    """`GOMP_parallel` of the OpenMP that torch has, which calls a function in as many of its threads as asked for."""
    for library in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:
            parallel = ctypes.CDLL(str(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes, parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
        return parallel
    return None


def _work(function: Callable, total: int, step: int, sizes: _Sizes, arrays: _Arrays) -> None:
    """Has `range(total)` worked off in pieces of `step`, by as many threads as torch has where there is enough."""
    numbers = [0, total, step, *sizes]
    for array in arrays:
        numbers += [array.data_ptr(), array.numel()]
    call, code = np.array(numbers, np.int64), _machine_code(function)
    threads, parallel = min(torch.get_num_threads(), -(-total // step)), _torch_threads()
    if threads <= 1:
        code.ctypes(call.ctypes.data)
    elif parallel is not None and os.getpid() == PROCESS:
        parallel(code.address, call.ctypes.data, threads, 0)
    else:  # and OpenMP's threads do not survive a fork
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(code.ctypes, [call.ctypes.data] * threads))


# --- between torch and the kernels -----------------------------------------------------------------------------------

NOTHING = torch.empty(0)


def _flat(t: Tensor) -> Tensor:
    # no `numpy()`: it would pin a parameter's storage, which FSDP resizes
    return t.detach().contiguous().view(-1)


def _planes(t: Tensor) -> Tuple[Tensor, Tuple[int, int, int]]:
    """`[B, ..., H, W]` as it lies in memory, and the strides of images, of a pixel's numbers and of pixels."""
    t = t.detach().float().flatten(1, -3).flatten(2)
    reach = 1 + sum((length - 1) * stride for length, stride in zip(t.shape, t.stride(), strict=True))
    images, numbers, pixels = t.stride()
    return t.as_strided((reach,), (1,)), (images, numbers, pixels)


def _filled_up(t: Tensor) -> Tensor:
    """`[..., c]` → c is filled up with zeros to whole registers."""
    return F.pad(t, (0, -t.shape[-1] % LANES)) if t.shape[-1] % LANES else t


def _in_registers(t: Tensor, groups: int) -> Tensor:
    """`[..., C]` → `[..., channels]`, every metric group's channels filled up to whole registers."""
    return _filled_up(t.unflatten(-1, (groups, -1))).flatten(-2)


def _out_of_registers(t: Tensor, groups: int, channels: int) -> Tensor:
    """`[..., C]` from what `_in_registers` gave."""
    return t.unflatten(-1, (groups, -1))[..., : channels // groups].flatten(-2)


def _inputs(arguments: Arguments) -> Tuple[_Sizes, _Arrays]:
    x, source, weight, _, mask = arguments[:5]
    x = _in_registers(by_pixels(with_far_corners(x.detach())).float(), arguments.metric_groups)
    source_values, source_strides = _planes(source)
    mask_values, mask_strides = (NOTHING, (0, 0, 0)) if mask is None else _planes(mask)
    points = NOTHING if arguments.points is None else _flat(arguments.points.float())
    top, left = first_centre(weight, arguments.padding, arguments.dilation)
    sizes = _Sizes(
        height=x.shape[1],
        width=x.shape[2],
        channels=x.shape[3],
        out_pixels=source.shape[-2] * source.shape[-1],
        out_width=source.shape[-1],
        stride_y=arguments.stride[0],
        stride_x=arguments.stride[1],
        top=round(2 * top),
        left=round(2 * left),
        taps=arguments.taps,
        metric_groups=arguments.metric_groups,
        affine=arguments.points is not None,
        source_image=source_strides[0],
        source_number=source_strides[1],
        source_pixel=source_strides[2],
        mask_image=mask_strides[0],
        mask_number=mask_strides[1],
        mask_pixel=mask_strides[2],
        kernel_groups=0 if _is_depthwise(arguments) else arguments.groups,
        out_channels=weight.shape[0],
        shared=min(weight.shape[1], arguments.x.shape[1] // arguments.metric_groups),
        strip_out=_widest(-(-weight.shape[0] // (arguments.groups * LANES))),
        pixels=_pixels(x.shape[3] * arguments.taps, source.shape[0] * source.shape[-2] * source.shape[-1]),
    )
    return sizes, _Arrays(_flat(x), source_values, mask_values, points, *[NOTHING] * 7)


def _is_depthwise(arguments: Arguments) -> bool:
    return arguments.weight.shape[:2] == (arguments.groups, 1)


def _depthwise_kernel(arguments: Arguments) -> Tensor:
    """[K, channels]."""
    return _flat(_in_registers(arguments.weight.flatten(1).t().float(), arguments.metric_groups))


def _widest(registers: int, limit: int = WIDEST) -> int:
    """How many registers a tile takes of so many: some that divide them."""
    return next(width for width in (4, 2, 1) if width <= limit and registers % width == 0)


def _pixels(numbers: int, total: int) -> int:
    """Of how many output pixels the columns, of so many numbers each, are in the cache; every thread gets some."""
    share = min(CACHED_NUMBERS // numbers, CACHED_PIXELS, -(-total // torch.get_num_threads()))
    return LANES * -(-max(share, 1) // LANES)


def _unfolded(weight: Tensor, arguments: Arguments) -> Tensor:
    """The kernel as a view `[groups, o, q, c, K]`: q metric groups in a kernel group, c channels in both."""
    q = max(1, arguments.metric_groups // arguments.groups)
    return weight.detach().flatten(2).unflatten(1, (q, -1)).unflatten(0, (arguments.groups, -1))


def _by_groups(arguments: Arguments) -> Tensor:
    """The kernel `[groups, q, K, c, o]`, c and o filled up."""
    weight = _unfolded(arguments.weight, arguments).float()
    return _filled_up(_filled_up(weight.permute(0, 2, 4, 1, 3)).transpose(3, 4))


def _strips_out(kernel: Tensor, sizes: _Sizes) -> Tensor:
    """`[groups, strips, q, K, c, 16·strip_out]`."""
    return kernel.unflatten(4, (-1, sizes.strip_out * LANES)).permute(0, 4, 1, 2, 3, 5)


def _strips_in(kernel: Tensor, sizes: _Sizes) -> Tensor:
    """`[groups, q, K, strips, o, 16·strip_in]`."""
    return kernel.unflatten(3, (-1, sizes.strip_in * LANES)).transpose(4, 5)


# --- forward ---------------------------------------------------------------------------------------------------------


def _forward(arguments: Arguments, out: Tensor) -> None:
    sizes, arrays = _inputs(arguments)
    out = by_pixels(out).flatten(0, 2)
    if _is_depthwise(arguments):
        run, runs, kernel = _run_depthwise, arguments.metric_groups, _depthwise_kernel(arguments)
        channels, step = sizes.channels, LANES * -(-THREAD_NUMBERS // (LANES * sizes.taps * sizes.channels))
    else:
        run, runs, kernel = _run_dense, 1, _flat(_strips_out(_by_groups(arguments), sizes))
        channels, step = out.shape[1], sizes.pixels
    bias = out.new_zeros(out.shape[1]) if arguments.bias is None else arguments.bias.view(out.shape[1])
    values = out if out.dtype == torch.float32 and channels == out.shape[1] else torch.empty(len(out), channels)
    arrays = arrays._replace(weight=kernel, bias=_flat(_in_registers(bias.float(), runs)), values=_flat(values))
    _work(run, len(out), step, sizes, arrays)
    if values is not out:
        out.copy_(_out_of_registers(values, runs, out.shape[1]))


# --- backward --------------------------------------------------------------------------------------------------------


def _gradients(arguments: Arguments, grad: Tensor, into: Gradients) -> None:
    groups, depthwise, (sizes, arrays) = arguments.metric_groups, _is_depthwise(arguments), _inputs(arguments)
    grad, batch = by_pixels(grad.detach()), len(grad)
    filled = None if depthwise else _by_groups(arguments)
    sizes = _shared_out(sizes, batch, 0 if filled is None or into.weight is None else filled.numel())

    def room(t: Optional[Tensor]) -> Tensor:
        if t is None:
            return torch.empty(0)
        return by_pixels(t)[None] if sizes.blocks == 1 else torch.empty(sizes.blocks, *by_pixels(t).shape)

    # an image that is laid out as the kernels work takes its gradient without a copy
    direct = into.x is not None and into.x.dtype == torch.float32 and into.x.numel() == len(arrays.x)
    grad_x = torch.zeros(0 if into.x is None or direct else len(arrays.x))
    if into.x is not None and direct:
        grad_x = by_pixels(into.x).flatten().zero_()
    grad_source, grad_mask, sets = room(into.source), room(into.mask), 0 if into.weight is None else sizes.sets
    if filled is None:
        kernel, upstream = _depthwise_kernel(arguments), _in_registers(grad.float(), groups)
        grad_weight = torch.zeros(sets, sizes.taps, sizes.channels)
    else:
        strips, upstream = _strips_in(filled, sizes), grad.float()
        kernel, grad_weight = _flat(strips), torch.zeros(sets, *strips.shape)
    results = grad_x, grad_source, grad_mask, grad_weight
    arrays = arrays._replace(weight=kernel, values=_flat(upstream))
    arrays = _Arrays(*arrays[:7], *map(_flat, results))
    _work(_run_backward, sizes.blocks * sizes.sets * groups, 1, sizes, arrays)

    if into.x is not None and not direct:
        grad_x = _out_of_registers(grad_x.view(batch, sizes.height, sizes.width, -1), groups, into.x.shape[1])
        by_pixels(into.x).copy_(grad_x[:, : into.x.shape[2], : into.x.shape[3]])
    for result, to in ((grad_source, into.source), (grad_mask, into.mask)):
        if to is not None and sizes.blocks > 1:
            by_pixels(to).copy_(result.sum(0))
    if into.weight is not None:
        grad_weight = grad_weight.sum(0)
        if depthwise:
            grad_weight = _out_of_registers(grad_weight, groups, len(into.weight)).t()
            into.weight.copy_(grad_weight.reshape(into.weight.shape))
        else:  # strips of [groups, q, K, o, 16·strip_in] → [groups, o, q, c, K]
            to = _unfolded(into.weight, arguments)
            for place, strip in zip(to.split(sizes.strip_in * LANES, 3), grad_weight.unbind(3), strict=True):
                place.copy_(strip.permute(0, 3, 1, 4, 2)[:, : place.shape[1], :, : place.shape[3]])


def _shared_out(sizes: _Sizes, batch: int, gradient: int) -> _Sizes:
    """The units of a backward pass, two for each thread: sets of images first, then blocks of channels.

    Every set has a gradient of the kernel, of so many numbers as it is filled up.
    """
    registers, wanted = sizes.channels // (sizes.metric_groups * LANES), 2 * torch.get_num_threads()
    sets = max(1, min(batch, wanted, GRADIENT_NUMBERS // max(1, gradient)))
    blocks = -(-wanted // (sets * sizes.metric_groups))
    if sizes.kernel_groups > sizes.metric_groups:  # their channels may begin within a register
        blocks, registers = 1, -(-sizes.shared // LANES)
    blocks = min(blocks, registers)
    strip_in = _widest(registers, min(WIDEST, registers // blocks)) if sizes.kernel_groups else 1
    return sizes._replace(sets=sets, blocks=blocks, strip_in=strip_in)


# `ball_conv2d_reference`, fastest on CPUs and straight from affine maps
compiled_conv2d = define("compiled_conv2d", _forward, _gradients, device_types="cpu")
