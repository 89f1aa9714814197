"""The fastest CPU backend, compiled by Numba: from an affine map to its samples and their sum in one pass.

The kernels work in registers of sixteen numbers: sixteen output pixels while they find where the samples lie, sixteen
channels of one pixel while they read and add. A depthwise layer never has columns: every output pixel adds up its
samples in registers. Any other layer has its columns made slab by slab for oneDNN's matrix product, as in `gather`.

The kernels run in torch's own threads, those of its OpenMP: a second pool would fight with them for the cores, because
after a matrix product they wait busily for the next. Each thread owns what it writes, so nothing is added in a changing
order.
"""

import ctypes
import functools
import math
import operator
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Tuple

import numba
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba.core import cgutils, config
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model
from numba.np.unsafe.ndarray import to_fixed_tuple
from torch import Tensor

from . import gather
from .custom_op import Arguments, Gradients, by_pixels, define, with_far_corners
from .reference import first_centre
from .samples import FIELDS

# Numbers to read of which a thread has enough to do.
THREAD_NUMBERS = 2**17
PROCESS = os.getpid()

if config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("Numba's compiler is switched off, see NUMBA_DISABLE_JIT.")


# --- a register as a type of Numba -----------------------------------------------------------------------------------

LANES = 16
_floats, _ints = (ir.VectorType(t, LANES) for t in (ir.FloatType(), ir.IntType(32)))


class _Register(numba.types.Type):
    """Sixteen float32 numbers. LLVM gives them a register of AVX-512, two of AVX2, or four of NEON."""


@register_model(_Register)
class _RegisterModel(models.PrimitiveModel):
    def __init__(self, manager, register):
        super().__init__(manager, register, _floats)


_register = _Register("float32x16")
_numbers = (numba.float32, numba.float64, numba.int64)
_pairs = [(_register, _register), *((_register, t) for t in _numbers), *((t, _register) for t in _numbers)]
_array, _indices = (numba.types.Array(t, 1, "C") for t in (numba.float32, numba.int32))


def _operation(function: Callable, emit: Callable, result, *cases: tuple) -> None:
    """Teaches Numba a function of registers.

    Args:
        function: What the kernels call.
        emit: (LLVM builder, values) → LLVM value.
        result: Its type.
        cases: The types of its arguments, each way to call it. A number among registers fills one.
    """
    signatures = [signature(result, *case) for case in cases]
    infer_global(function)(type("Template", (ConcreteTemplate,), {"cases": signatures}))

    def lower(context, builder, signature, values):
        operands = []
        for value, given in zip(values, signature.args, strict=True):
            if isinstance(given, numba.types.Array):
                value = context.make_array(given)(context, builder, value).data
            elif signature.args in _pairs and given is not _register:
                value = _filled(builder, context.cast(builder, value, given, numba.float32))
            operands.append(value)
        returned = emit(builder, *operands)
        return context.get_dummy_value() if result is numba.types.none else returned

    for case in cases:
        lower_builtin(function, *case)(lower)


def _filled(builder, number):
    first = builder.insert_element(ir.Constant(_floats, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, first, ir.Constant(_ints, [0] * LANES))


def _llvm(name: str, *types) -> Callable:
    """Emits a call of LLVM's own function; the first of `types` is the result's."""

    def emit(builder, *values):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(types[0], types[1:]), name)
        return builder.call(function, values, fastmath=("reassoc",))

    return emit


def _choice(relation: str) -> Callable:
    # of NaN and a number the number, if it comes second: what the processor's instruction does
    return lambda builder, a, b: builder.select(builder.fcmp_ordered(relation, a, b), a, b)


def _at(builder, array, index, vector):
    return builder.bitcast(builder.gep(array, [index]), vector.as_pointer())


def _load(builder, array, index):
    return builder.load(_at(builder, array, index, _floats), align=4)


def _spread(builder, array, index):
    return _filled(builder, builder.load(builder.gep(array, [index])))


def _store(builder, array, index, register):
    builder.store(register, _at(builder, array, index, _floats), align=4)


def _store_corner(builder, array, index, row, column, width):
    row, column, width = (builder.fptosi(register, _ints) for register in (row, column, width))
    builder.store(builder.add(builder.mul(row, width), column), _at(builder, array, index, _ints), align=4)


def _total(builder, register):
    add = _llvm(f"llvm.vector.reduce.fadd.v{LANES}f32", ir.FloatType(), ir.FloatType(), _floats)
    return add(builder, ir.Constant(ir.FloatType(), 0.0), register)


def load(array, index):
    """Sixteen numbers of an array."""


def store(array, index, register):
    """Writes them."""


def store_corner(array, index, row, column, width):
    """Writes row · width + column, which float32 may not hold, to an array of integers."""


def spread(array, index):
    """Sixteen times one number of an array."""


def larger(a, b):
    """The larger of two; b where a is NaN."""


def smaller(a, b):
    """The smaller of two; b where a is NaN."""


def total(register):
    """The sum of its numbers."""


def _arithmetic(name: str) -> Callable:
    # `contract`: a product and a sum become one instruction where the processor has it
    return lambda builder, a, b: getattr(builder, name)(a, b, flags=("contract",))


_operation(operator.add, _arithmetic("fadd"), _register, *_pairs)
_operation(operator.sub, _arithmetic("fsub"), _register, *_pairs)
_operation(operator.mul, _arithmetic("fmul"), _register, *_pairs)
_operation(math.floor, _llvm(f"llvm.floor.v{LANES}f32", _floats, _floats), _register, (_register,))
_operation(abs, _llvm(f"llvm.fabs.v{LANES}f32", _floats, _floats), _register, (_register,))
_operation(spread, _spread, _register, (_array, numba.intp))
_operation(larger, _choice(">"), _register, *_pairs)
_operation(smaller, _choice("<"), _register, *_pairs)
_operation(load, _load, _register, (_array, numba.intp))
_operation(store, _store, numba.types.none, (_array, numba.intp, _register))
_operation(store_corner, _store_corner, numba.types.none, (_indices, numba.intp, *[_register] * 3))
_operation(total, _total, numba.float32, (_register,))


def _fetch_and_add(builder, array, step):
    return builder.atomic_rmw("add", array, step, "monotonic")


def _pointer(builder, address):
    return builder.inttoptr(address, ir.IntType(8).as_pointer())


def fetch_and_add(array, step):
    """Adds to the first of some integers, which other threads do too; what it was before."""


def pointer(address):
    """An integer as a pointer."""


_operation(fetch_and_add, _fetch_and_add, numba.int64, (numba.types.Array(numba.int64, 1, "C"), numba.int64))
_operation(pointer, _pointer, numba.types.voidptr, (numba.int64,))

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
    blocks: int  # of the channels of a metric group: a unit of work in the backward pass has one
    images: int  # the images of this call: how many, and from which on
    image_0: int
    pixel_0: int  # the output pixels of every image: the first, and the one after the last
    pixel_1: int


class _Arrays(NamedTuple):
    """What kernels read and write, flat and in float32; of length 0 where there is none, or it is not wanted."""

    x: np.ndarray  # [B, height, width, channels]
    source: np.ndarray
    mask: np.ndarray
    points: np.ndarray  # [K, 2] the pattern's points
    weight: np.ndarray  # [K, channels] of a depthwise layer
    bias: np.ndarray  # [channels] of a depthwise layer
    values: np.ndarray  # what else goes in or comes out, see the kernels
    grad_x: np.ndarray  # as x, begins at 0
    grad_source: np.ndarray  # [blocks, B, H_out, W_out, ...]
    grad_mask: np.ndarray  # [blocks, B, H_out, W_out, G·K]
    grad_weight: np.ndarray  # [B, K, channels] of a depthwise layer, image by image; begins at 0


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
    corner = smaller(larger(math.floor(coordinate), 0), size - 2)
    return corner, coordinate - corner


@_inlined
def _hat_slopes(distance):
    """The slopes of the near and of the far corner's hat: what they rise in the cell to the right, as torchvision's."""
    cell = math.floor(distance)
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
        store_corner(plan.corners, tap * LANES, row, column, row - row + n.width)
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
    nothing = load(plan.by_corner, 0) * 0
    xx = xy = yx = yy = shift_x = shift_y = nothing
    # the number of a pixel's metric group, in all blocks
    place = (block * (len(a.x) // (n.height * n.width * n.channels)) * n.out_pixels + first) * n.metric_groups + group
    for tap in range(n.taps):
        at = tap * 4 * LANES
        by_x = by_y = by_mask = nothing
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
def _columns(first, last, n, a):
    """The columns [..., G, K, channels / G] of the output pixels from `first` to `last`, counted from `pixel_0` on."""
    plan = _empty_plan(n.taps, False)
    run, line = n.channels // n.metric_groups, n.width * n.channels
    for chunk in range(first, last, LANES):
        for group in range(n.metric_groups):
            _fill_plan(plan, n, a, n.pixel_0 + chunk, n.pixel_0 + last, group, False)
            for i in range(min(LANES, last - chunk)):
                image = (n.pixel_0 + chunk + i) // n.out_pixels * n.height * line
                for tap in range(n.taps):
                    corner = image + plan.corners[tap * LANES + i] * n.channels
                    column = (((chunk + i) * n.metric_groups + group) * n.taps + tap - group) * run
                    shares = _four(plan.shares, tap, i)
                    for c in range(group * run, group * run + run, LANES):
                        corners = _corners(a.x, corner + c, corner + line + c, n.channels)
                        store(a.values, column + c, _weighed(corners, shares))


@_inlined
def _add(array, at, value):
    store(array, at, load(array, at) + value)


@numba.njit
def _backward(first, last, n, a):
    """All gradients of the samples of some output pixels, unit by unit.

    A unit is a block of channels of a metric group of an image: it owns what it adds to, and adds pixel by pixel.
    `values` are, of a depthwise layer, the gradient of its output, [B, H_out, W_out, channels]. Else they are that of
    the samples, [images, pixels, G, K, channels / G], and the samples themselves come into their place.
    """
    plan, line, groups = _empty_plan(n.taps, True), n.width * n.channels, n.metric_groups
    run = n.channels // groups
    need_x, need_source, need_weight = len(a.grad_x) > 0, len(a.grad_source) > 0, len(a.grad_weight) > 0
    for unit in range(first, last):
        block, group = unit // (n.images * groups), unit % groups
        image = n.image_0 + unit // groups % n.images
        registers = run // LANES
        c_0 = group * run + registers * block // n.blocks * LANES
        c_1 = group * run + registers * (block + 1) // n.blocks * LANES
        begin, end = image * n.out_pixels + n.pixel_0, image * n.out_pixels + n.pixel_1
        for chunk in range(begin, end, LANES):
            _fill_plan(plan, n, a, chunk, end, group, True)
            count = min(LANES, end - chunk)
            for i in range(count):
                column = (image - n.image_0) * (n.pixel_1 - n.pixel_0) + chunk + i - begin
                column = ((column * groups + group) * n.taps - group) * run
                for tap in range(n.taps):
                    sample = tap * LANES + i
                    mask, shares = spread(plan.masks, sample), _four(plan.shares, tap, i)
                    corner = image * n.height * line + plan.corners[sample] * n.channels
                    by_00 = by_01 = by_10 = by_11 = mask - mask
                    for c in range(c_0, c_1, LANES):
                        at, below = corner + c, corner + line + c
                        corners = _corners(a.x, at, below, n.channels)
                        if len(a.weight):
                            grad = load(a.values, (chunk + i) * n.channels + c)
                            if need_weight:
                                value = mask * _weighed(corners, shares)
                                _add(a.grad_weight, (image * n.taps + tap) * n.channels + c, grad * value)
                            grad = grad * load(a.weight, tap * n.channels + c)
                        else:
                            grad = load(a.values, column + tap * run + c)
                            store(a.values, column + tap * run + c, mask * _weighed(corners, shares))
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
                        plan.by_corner[four + 2 * LANES], plan.by_corner[four + 3 * LANES] = total(by_10), total(by_11)
            if need_source:
                _through_samples(plan, n, a, chunk, count, group, block)


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


def _run_columns(data):
    call, sizes, arrays = _opened(data)
    first, last = _next_piece(call)
    while first < last:
        _columns(first, last, sizes, arrays)
        first, last = _next_piece(call)


def _run_backward(data):
    call, sizes, arrays = _opened(data)
    first, last = _next_piece(call)
    while first < last:
        _backward(first, last, sizes, arrays)
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
        numbers += [array.ctypes.data, array.size]
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

NOTHING = np.empty(0, np.float32)


def _flat(t: Tensor) -> np.ndarray:
    return t.detach().contiguous().view(-1).numpy()


def _planes(t: Tensor) -> Tuple[np.ndarray, Tuple[int, int, int]]:
    """`[B, ..., H, W]` as it lies in memory, and the strides of images, of a pixel's numbers and of pixels."""
    t = t.detach().float().flatten(1, -3).flatten(2)
    reach = 1 + sum((length - 1) * stride for length, stride in zip(t.shape, t.stride(), strict=True))
    images, numbers, pixels = t.stride()
    return t.as_strided((reach,), (1,)).numpy(), (images, numbers, pixels)


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
    x, source, weight, mask = arguments[:4]
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
        blocks=1,
        images=x.shape[0],
        image_0=0,
        pixel_0=0,
        pixel_1=source.shape[-2] * source.shape[-1],
    )
    return sizes, _Arrays(_flat(x), source_values, mask_values, points, *[NOTHING] * 7)


def _is_depthwise(arguments: Arguments) -> bool:
    return arguments.weight.shape[:2] == (arguments.groups, 1)


def _depthwise_kernel(arguments: Arguments) -> np.ndarray:
    """[K, channels]."""
    return _flat(_in_registers(arguments.weight.flatten(1).t().float(), arguments.metric_groups))


# --- forward ---------------------------------------------------------------------------------------------------------


def _forward(arguments: Arguments, bias: Optional[Tensor], out: Tensor) -> None:
    sizes, arrays = _inputs(arguments)
    step = LANES * -(-THREAD_NUMBERS // (LANES * sizes.taps * sizes.channels))
    way = _forward_depthwise if _is_depthwise(arguments) else _forward_by_columns
    way(arguments, bias, by_pixels(out).flatten(0, 2), sizes, arrays, step)


def _forward_depthwise(
    arguments: Arguments, bias: Optional[Tensor], out: Tensor, sizes: _Sizes, arrays: _Arrays, step: int
) -> None:
    groups = arguments.metric_groups
    bias = out.new_zeros(out.shape[1]) if bias is None else bias.view(out.shape[1])
    direct = out.dtype == torch.float32 and sizes.channels == out.shape[1]
    values = out if direct else torch.empty(len(out), sizes.channels)
    bias_values = _flat(_in_registers(bias.float(), groups))
    arrays = arrays._replace(weight=_depthwise_kernel(arguments), bias=bias_values, values=_flat(values))
    _work(_run_depthwise, len(out), step, sizes, arrays)
    if not direct:
        out.copy_(_out_of_registers(values, groups, out.shape[1]))


def _forward_by_columns(
    arguments: Arguments, bias: Optional[Tensor], out: Tensor, sizes: _Sizes, arrays: _Arrays, step: int
) -> None:
    x, groups = arguments.x, arguments.metric_groups
    kernel, pieces = gather._kernel(arguments), gather._pieces(len(out), gather._slab_pixels(arguments))
    slab = torch.empty(pieces[0].stop, groups * sizes.taps, sizes.channels // groups)
    for piece in pieces:
        columns = slab[: piece.stop - piece.start]
        here = sizes._replace(pixel_0=piece.start), arrays._replace(values=_flat(columns))
        _work(_run_columns, len(columns), step, *here)
        columns = columns[..., : x.shape[1] // groups].to(x.dtype).flatten(1)
        out[piece] = gather._product(columns, kernel, bias)


# --- backward --------------------------------------------------------------------------------------------------------


def _gradients(arguments: Arguments, grad: Tensor, into: Gradients) -> None:
    groups, depthwise, (sizes, arrays) = arguments.metric_groups, _is_depthwise(arguments), _inputs(arguments)
    grad, batch = by_pixels(grad.detach()), len(grad)
    # where there are fewer images than threads, these share out the channels
    threads, registers = torch.get_num_threads(), sizes.channels // groups // LANES
    together = max(gather._slab_pixels(arguments) // sizes.out_pixels, -(-threads // (groups * registers)), 1)
    together = batch if depthwise else min(batch, together)
    blocks = min(-(-threads // (together * groups)), registers)
    sizes = sizes._replace(blocks=blocks, images=together)

    def room(t: Optional[Tensor]) -> Tensor:
        if t is None:
            return torch.empty(0)
        return by_pixels(t)[None] if blocks == 1 else torch.empty(blocks, *by_pixels(t).shape)

    # an image that is laid out as the kernels work takes its gradient without a copy
    direct = into.x is not None and into.x.dtype == torch.float32 and into.x.numel() == len(arrays.x)
    grad_x = torch.zeros(0 if into.x is None or direct else len(arrays.x))
    if into.x is not None and direct:
        grad_x = by_pixels(into.x).flatten().zero_()
    grad_source, grad_mask = room(into.source), room(into.mask)
    need_taps = depthwise and into.weight is not None
    grad_taps = torch.zeros((batch, sizes.taps, sizes.channels) if need_taps else 0)
    results = [_flat(t) for t in (grad_x, grad_source, grad_mask, grad_taps)]
    arrays = _Arrays(*arrays[:7], *results)

    if depthwise:
        upstream = _flat(_in_registers(grad.float(), groups))
        arrays = arrays._replace(weight=_depthwise_kernel(arguments), values=upstream)
        _work(_run_backward, blocks * batch * groups, 1, sizes, arrays)
        grad_weight = _out_of_registers(grad_taps.sum(0), groups, grad.shape[-1]).t() if need_taps else None
    else:
        wanted = into.x is not None or into.source is not None, into.weight is not None
        grad_weight = _backward_by_columns(arguments, grad.flatten(1, 2), *wanted, sizes, arrays)

    if into.x is not None and not direct:
        grad_x = _out_of_registers(grad_x.view(batch, sizes.height, sizes.width, -1), groups, into.x.shape[1])
        by_pixels(into.x).copy_(grad_x[:, : into.x.shape[2], : into.x.shape[3]])
    for result, to in ((grad_source, into.source), (grad_mask, into.mask)):
        if to is not None and blocks > 1:
            by_pixels(to).copy_(result.sum(0))
    if into.weight is not None and grad_weight is not None:
        into.weight.copy_(grad_weight.reshape(into.weight.shape))


def _backward_by_columns(
    arguments: Arguments, grad: Tensor, need_samples: bool, need_weight: bool, sizes: _Sizes, arrays: _Arrays
) -> Optional[Tensor]:
    """Fills the arrays of gradients; the kernel's `[..., C_in/groups, K]`. A slab is some pixels of some images."""
    x, groups, kernel, total = arguments.x, arguments.metric_groups, gather._kernel(arguments), None
    (batch, pixels, _), slab = grad.shape, gather._slab_pixels(arguments)
    share = x.shape[1] // groups
    for images in gather._pieces(batch, sizes.images):
        count = images.stop - images.start
        for span in gather._pieces(pixels, max(1, slab // count)):
            upstream = grad[images, span].flatten(0, 1)
            if need_samples:
                samples = gather._sample_gradient(upstream, kernel).view(len(upstream), -1, share)
                samples = _filled_up(samples.float()).contiguous()
            else:
                samples = torch.zeros(len(upstream), groups * sizes.taps, sizes.channels // groups)
            here = sizes._replace(images=count, image_0=images.start, pixel_0=span.start, pixel_1=span.stop)
            _work(_run_backward, sizes.blocks * count * groups, 1, here, arrays._replace(values=_flat(samples)))
            if need_weight:
                columns = samples[..., :share].to(x.dtype).flatten(1)
                part = gather._product_gradient(columns, upstream, kernel).float()
                total = part if total is None else total.add_(part)
    return None if total is None else total.flatten(0, 2).transpose(2, 3)


# `ball_conv2d_reference`, fastest on CPUs and straight from affine maps
compiled_conv2d = define("compiled_conv2d", _forward, _gradients, device_types="cpu")
