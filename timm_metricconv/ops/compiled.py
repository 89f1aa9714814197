"""The fastest CPU backend, compiled by Numba: from a metric to its samples and their sum in one pass.

The kernels work in registers of sixteen numbers: sixteen output pixels while they find where the samples lie, sixteen
channels of one pixel while they read and add. A depthwise layer never has columns: every output pixel adds up its
samples in registers. Any other layer has its columns made slab by slab for oneDNN's matrix product, as in `gather`.

Depthwise layers are shared out among as many threads as torch has, which live no longer than a call: neither a fork nor
a second caller can meet them. Each owns what it writes, so nothing is added in a changing order.
"""

import math
import operator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Callable, List, NamedTuple, Optional, Tuple

import numba
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba.core import cgutils, config
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model
from torch import Tensor

from ..geometry.metrics import FLOOR, TINY
from . import gather
from .custom_op import Arguments, define, kernel_format, with_far_corners
from .reference import first_centre
from .samples import directions_of

# Numbers to read of which a thread has enough to do: some 0.2 ms, where to start one takes 0.05.
THREAD_NUMBERS = 2**19

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


def _where_larger(builder, a, b, yes, no):
    return builder.select(builder.fcmp_ordered(">", a, b), yes, no)


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


def where_larger(a, b, yes, no):
    """`yes` where a > b, else `no`."""


def total(register):
    """The sum of its numbers."""


def _arithmetic(name: str) -> Callable:
    # `contract`: a product and a sum become one instruction where the processor has it
    return lambda builder, a, b: getattr(builder, name)(a, b, flags=("contract",))


_operation(operator.add, _arithmetic("fadd"), _register, *_pairs)
_operation(operator.sub, _arithmetic("fsub"), _register, *_pairs)
_operation(operator.mul, _arithmetic("fmul"), _register, *_pairs)
_operation(operator.truediv, _arithmetic("fdiv"), _register, *_pairs)
_operation(math.floor, _llvm(f"llvm.floor.v{LANES}f32", _floats, _floats), _register, (_register,))
_operation(math.sqrt, _llvm(f"llvm.sqrt.v{LANES}f32", _floats, _floats), _register, (_register,))
_operation(abs, _llvm(f"llvm.fabs.v{LANES}f32", _floats, _floats), _register, (_register,))
_operation(spread, _spread, _register, (_array, numba.intp))
_operation(larger, _choice(">"), _register, *_pairs)
_operation(smaller, _choice("<"), _register, *_pairs)
_operation(where_larger, _where_larger, _register, (_register,) * 4)
_operation(load, _load, _register, (_array, numba.intp))
_operation(store, _store, numba.types.none, (_array, numba.intp, _register))
_operation(store_corner, _store_corner, numba.types.none, (_indices, numba.intp, *[_register] * 3))
_operation(total, _total, numba.float32, (_register,))


_inlined = numba.njit(forceinline=True)


def _compiled(function: Callable) -> Callable:
    """Compiles at the first call, and keeps the machine code on disk where there is a place for it."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache
        return numba.njit(nogil=True)(function)


# --- where the samples lie: sixteen output pixels at a time ----------------------------------------------------------


class _Lattice(NamedTuple):
    """The sizes that a kernel needs. Output pixels are numbered row by row, image by image."""

    height: int  # of an image, two at least
    width: int
    channels: int  # of a pixel in memory: a run of whole registers for each metric group
    out_pixels: int  # of an image
    out_width: int
    stride_y: int
    stride_x: int
    top: float  # the first centre
    left: float
    taps: int
    runs: int  # G, the number of metric groups
    from_metric: bool  # whether the source is a field of metrics
    eps: float
    masked: bool
    source_strides: Tuple[int, int, int]  # in memory: of images, of a pixel's numbers, of pixels
    mask_strides: Tuple[int, int, int]


class _Inputs(NamedTuple):
    """What all kernels read, flat."""

    lattice: _Lattice
    x: np.ndarray  # [B, height, width, channels]
    source: np.ndarray
    mask: np.ndarray
    points: np.ndarray  # [K, 2] the pattern's points
    rays: np.ndarray  # [R, 2] their directions; of two opposite ones the first
    ray_of: np.ndarray  # [K] a point's ray r as 2r, or as 2r + 1 where it lies on the opposite side


class _Plan(NamedTuple):
    """How the samples of sixteen output pixels read an image, flat and in float32.

    Corners are (0, 0), (0, 1), (1, 0) and (1, 1) as (down, right).
    """

    fields: np.ndarray  # [5, 16] the metrics
    stretches: np.ndarray  # [R, 2, 16] 1 / (F + ε) along the rays and against them
    centres: np.ndarray  # [2, 16] (x, y)
    corners: np.ndarray  # [K, 16] int32, the pixel at the first corner
    shares: np.ndarray  # [K, 4, 16] the corners' bilinear weights
    slopes: np.ndarray  # [K, 4, 16] their derivative along x; where there is a metric, by the sample's stretch
    slopes_y: np.ndarray  # [K, 4, 16] and along y
    masks: np.ndarray  # [K, 16]


@_inlined
def _empty_plan(inputs):
    taps = inputs.lattice.taps
    return _Plan(
        np.empty(5 * LANES, np.float32),
        np.empty(len(inputs.rays) * LANES, np.float32),
        np.empty(2 * LANES, np.float32),
        np.empty(taps * LANES, np.int32),
        np.empty(taps * 4 * LANES, np.float32),
        np.empty(taps * 4 * LANES, np.float32),
        np.empty(taps * 4 * LANES, np.float32),
        np.ones(taps * LANES, np.float32),
    )


@_inlined
def _randers(plan, ux, uy):
    """z = A·u, ‖z‖ and v·z of sixteen metrics: F(±u) = ‖z‖ ± v·z, as in `geometry.randers`."""
    a, b, d = load(plan.fields, 0), load(plan.fields, LANES), load(plan.fields, 2 * LANES)
    zx, zy = a * ux + b * uy, b * ux + d * uy
    drift = load(plan.fields, 3 * LANES) * zx + load(plan.fields, 4 * LANES) * zy
    return zx, zy, math.sqrt(zx * zx + zy * zy + TINY), drift


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


@_compiled
def _fill_plan(plan, inputs, first, last, group, for_gradients):
    """Plans the output pixels from `first`; those from `last` on repeat the one before it.

    The mask goes into the shares, or, `for_gradients`, where the slopes are wanted too, stays beside them.
    """
    lattice, points, rays = inputs.lattice, inputs.points, inputs.rays
    source_at, mask_at = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    image = first // lattice.out_pixels
    pixel = first - image * lattice.out_pixels
    row = pixel // lattice.out_width
    column = pixel - row * lattice.out_width
    for i in range(LANES):
        plan.centres[i] = lattice.left + lattice.stride_x * column
        plan.centres[LANES + i] = lattice.top + lattice.stride_y * row
        source_at[i] = image * lattice.source_strides[0] + pixel * lattice.source_strides[2]
        mask_at[i] = image * lattice.mask_strides[0] + pixel * lattice.mask_strides[2]
        if first + i + 1 < last:  # a division for each pixel would cost as much as some of its samples
            pixel, column = pixel + 1, column + 1
            if column == lattice.out_width:
                row, column = row + 1, 0
            if pixel == lattice.out_pixels:
                image, pixel, row = image + 1, 0, 0
    if lattice.from_metric:
        for field in range(5):
            number = (group * 5 + field) * lattice.source_strides[1]
            for i in range(LANES):
                plan.fields[field * LANES + i] = inputs.source[source_at[i] + number]
        for ray in range(0, len(rays), 2):
            _, _, norm, drift = _randers(plan, rays[ray], rays[ray + 1])
            store(plan.stretches, ray * LANES, 1 / (larger(norm + drift, norm * FLOOR) + lattice.eps))
            store(plan.stretches, (ray + 1) * LANES, 1 / (larger(norm - drift, norm * FLOOR) + lattice.eps))

    centre_x, centre_y = load(plan.centres, 0), load(plan.centres, LANES)
    offsets = np.empty(2 * LANES, np.float32)
    for tap in range(lattice.taps):
        px, py = points[2 * tap], points[2 * tap + 1]
        if lattice.from_metric:
            stretch = load(plan.stretches, inputs.ray_of[tap] * LANES)
            offset_x, offset_y = stretch * px, stretch * py
        else:
            number = 2 * (group * lattice.taps + tap) * lattice.source_strides[1]
            for i in range(LANES):
                offsets[i] = inputs.source[source_at[i] + number]
                offsets[LANES + i] = inputs.source[source_at[i] + number + lattice.source_strides[1]]
            offset_x, offset_y = load(offsets, 0), load(offsets, LANES)
        column, right = _axis(centre_x + offset_x, lattice.width)
        row, down = _axis(centre_y + offset_y, lattice.height)
        store_corner(plan.corners, tap * LANES, row, column, row - row + lattice.width)
        x0, x1, y0, y1 = _hat(right), _hat(right - 1), _hat(down), _hat(down - 1)
        if lattice.masked:
            number = (group * lattice.taps + tap) * lattice.mask_strides[1]
            for i in range(LANES):
                plan.masks[tap * LANES + i] = inputs.mask[mask_at[i] + number]
        at = tap * 4 * LANES
        if not for_gradients:
            mask = load(plan.masks, tap * LANES)
            y0, y1 = mask * y0, mask * y1
        _store_four(plan.shares, at, y0 * x0, y0 * x1, y1 * x0, y1 * x1)
        if for_gradients:
            near_x, far_x = _hat_slopes(right)
            near_y, far_y = _hat_slopes(down)
            _store_four(plan.slopes, at, y0 * near_x, y0 * far_x, y1 * near_x, y1 * far_x)
            _store_four(plan.slopes_y, at, near_y * x0, near_y * x1, far_y * x0, far_y * x1)
            if lattice.from_metric:
                for corner in range(at, at + 4 * LANES, LANES):
                    along = px * load(plan.slopes, corner) + py * load(plan.slopes_y, corner)
                    store(plan.slopes, corner, along)


@_compiled
def _through_metric(plan, inputs, grad_stretches):
    """Gradients of sixteen pixels' stretches, [R, 2, 16] → of their metrics, in the place of `plan.fields`."""
    vx, vy = load(plan.fields, 3 * LANES), load(plan.fields, 4 * LANES)
    grad_a = grad_b = grad_d = grad_vx = grad_vy = nothing = vx - vx
    for ray in range(0, len(inputs.rays), 2):
        ux, uy = inputs.rays[ray], inputs.rays[ray + 1]
        zx, zy, norm, drift = _randers(plan, ux, uy)
        by_norm = by_drift = nothing
        for side in range(2):
            stretch = load(plan.stretches, (ray + side) * LANES)
            grad = nothing - load(grad_stretches, (ray + side) * LANES) * stretch * stretch
            # where F is kept at its floor only ‖z‖ counts
            sign, floor = 1 - 2 * side, norm * FLOOR
            finsler = norm + sign * drift
            by_norm = by_norm + where_larger(finsler, floor, grad, grad * FLOOR)
            by_drift = by_drift + where_larger(finsler, floor, sign * grad, nothing)
        by_norm = by_norm / norm
        grad_zx, grad_zy = by_norm * zx + by_drift * vx, by_norm * zy + by_drift * vy
        grad_a, grad_b, grad_d = grad_a + grad_zx * ux, grad_b + grad_zx * uy + grad_zy * ux, grad_d + grad_zy * uy
        grad_vx, grad_vy = grad_vx + by_drift * zx, grad_vy + by_drift * zy
    store(plan.fields, 0, grad_a)
    store(plan.fields, LANES, grad_b)
    store(plan.fields, 2 * LANES, grad_d)
    store(plan.fields, 3 * LANES, grad_vx)
    store(plan.fields, 4 * LANES, grad_vy)


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


@_compiled
def _depthwise(first, last, inputs, weight, bias, out):
    """The output pixels from `first` to `last` of a depthwise layer, its kernel [K, channels]."""
    lattice, plan = inputs.lattice, _empty_plan(inputs)
    channels, taps = lattice.channels, lattice.taps
    run, line = channels // lattice.runs, lattice.width * channels
    for chunk in range(first, last, LANES):
        for group in range(lattice.runs):
            _fill_plan(plan, inputs, chunk, last, group, False)
            for i in range(min(LANES, last - chunk)):
                image = (chunk + i) // lattice.out_pixels * lattice.height * line
                for c in range(group * run, group * run + run, LANES):
                    added = load(bias, c)
                    for tap in range(taps):
                        at = image + plan.corners[tap * LANES + i] * channels + c
                        shares = _four(plan.shares, tap, i)
                        value = _weighed(_corners(inputs.x, at, at + line, channels), shares)
                        added = added + value * load(weight, tap * channels + c)
                    store(out, (chunk + i) * channels + c, added)


@_compiled
def _columns(first, last, inputs, columns, origin):
    """The columns [n, G, K, channels / G] of the output pixels from `first` to `last`, counted from `origin` on."""
    lattice, plan = inputs.lattice, _empty_plan(inputs)
    channels, taps = lattice.channels, lattice.taps
    run, line = channels // lattice.runs, lattice.width * channels
    for chunk in range(first, last, LANES):
        for group in range(lattice.runs):
            _fill_plan(plan, inputs, origin + chunk, origin + last, group, False)
            for i in range(min(LANES, last - chunk)):
                image = (origin + chunk + i) // lattice.out_pixels * lattice.height * line
                for tap in range(taps):
                    corner = image + plan.corners[tap * LANES + i] * channels
                    column = (((chunk + i) * lattice.runs + group) * taps + tap - group) * run
                    shares = _four(plan.shares, tap, i)
                    for c in range(group * run, group * run + run, LANES):
                        corners = _corners(inputs.x, corner + c, corner + line + c, channels)
                        store(columns, column + c, _weighed(corners, shares))


class _Results(NamedTuple):
    """The gradients, flat; of length 0 where not wanted."""

    x: np.ndarray  # [B, height, width, channels], begins at 0
    source: np.ndarray  # [B, H_out, W_out, ...]
    mask: np.ndarray  # [B, H_out, W_out, G·K]
    weight: np.ndarray  # [B, K, channels] of a depthwise kernel, image by image; begins at 0


@_inlined
def _add(array, at, value):
    store(array, at, load(array, at) + value)


@_compiled
def _backward(first, last, inputs, image_0, pixel_0, pixel_1, weight, upstream, results):
    """All gradients of the samples of some output pixels.

    A unit of work is a metric group of an image: it owns what it adds to, and adds pixel by pixel.

    Args:
        first: The first unit, counted from the image `image_0` on.
        last: The unit after the last.
        inputs: As always.
        image_0: See above.
        pixel_0: First output pixel of every image.
        pixel_1: The one after the last.
        weight: Of a depthwise layer [K, channels]; else of length 0.
        upstream: Of a depthwise layer the gradient of its output, [B, H_out, W_out, channels]. Else that of the
            samples, [images, pixels, G, K, channels / G]; the samples themselves come into its place.
        results: What is added to, or written.
    """
    lattice, plan, x = inputs.lattice, _empty_plan(inputs), inputs.x
    channels, taps, groups = lattice.channels, lattice.taps, lattice.runs
    run, line = channels // groups, lattice.width * channels
    need_x, need_source, need_weight = len(results.x) > 0, len(results.source) > 0, len(results.weight) > 0
    by_stretch = np.empty(len(plan.stretches), np.float32)
    for unit in range(first, last):
        image, group = image_0 + unit // groups, unit % groups
        begin, end = image * lattice.out_pixels + pixel_0, image * lattice.out_pixels + pixel_1
        for chunk in range(begin, end, LANES):
            _fill_plan(plan, inputs, chunk, end, group, True)
            count = min(LANES, end - chunk)
            by_stretch[:] = 0.0
            for i in range(count):
                place = (chunk + i) * groups + group
                column = (image - image_0) * (pixel_1 - pixel_0) + chunk + i - begin
                column = ((column * groups + group) * taps - group) * run
                for tap in range(taps):
                    sample = tap * LANES + i
                    mask, shares = spread(plan.masks, sample), _four(plan.shares, tap, i)
                    slopes = _four(plan.slopes, tap, i)
                    slopes_y = slopes if lattice.from_metric else _four(plan.slopes_y, tap, i)
                    slope = slope_y = product = mask - mask
                    corner = image * lattice.height * line + plan.corners[sample] * channels
                    for c in range(group * run, group * run + run, LANES):
                        at, below = corner + c, corner + line + c
                        corners = _corners(x, at, below, channels)
                        value = _weighed(corners, shares)
                        if len(weight):
                            grad = load(upstream, (chunk + i) * channels + c)
                            if need_weight:
                                _add(results.weight, (image * taps + tap) * channels + c, grad * (mask * value))
                            grad = grad * load(weight, tap * channels + c)
                        else:
                            grad = load(upstream, column + tap * run + c)
                            store(upstream, column + tap * run + c, mask * value)
                        if need_source:
                            slope = slope + grad * _weighed(corners, slopes)
                            if not lattice.from_metric:
                                slope_y = slope_y + grad * _weighed(corners, slopes_y)
                            if lattice.masked:
                                product = product + grad * value
                        if need_x:
                            grad = mask * grad
                            _add(results.x, at, shares[0] * grad)
                            _add(results.x, at + channels, shares[1] * grad)
                            _add(results.x, below, shares[2] * grad)
                            _add(results.x, below + channels, shares[3] * grad)
                    if need_source:
                        if lattice.from_metric:
                            by_stretch[inputs.ray_of[tap] * LANES + i] += total(mask * slope)
                        else:
                            results.source[2 * (place * taps + tap)] = total(mask * slope)
                            results.source[2 * (place * taps + tap) + 1] = total(mask * slope_y)
                        if lattice.masked:
                            results.mask[place * taps + tap] = total(product)
            if need_source and lattice.from_metric:
                _through_metric(plan, inputs, by_stretch)
                for i in range(count):
                    for field in range(5):
                        results.source[5 * ((chunk + i) * groups + group) + field] = plan.fields[field * LANES + i]


# --- between torch and the kernels -----------------------------------------------------------------------------------


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
    return F.pad(t, (0, -t.shape[-1] % LANES))


def _in_runs(t: Tensor, runs: int) -> Tensor:
    """`[..., C]` → `[..., channels]`, every metric group's run of channels filled up to whole registers."""
    return _filled_up(t.unflatten(-1, (runs, -1))).flatten(-2)


def _out_of_runs(t: Tensor, runs: int, channels: int) -> Tensor:
    """`[..., C]` from what `_in_runs` gave."""
    return t.unflatten(-1, (runs, -1))[..., : channels // runs].flatten(-2)


@lru_cache
def _rays(directions: bytes) -> Tuple[np.ndarray, np.ndarray]:
    """Directions [K, 2], the bytes of float32 numbers → `rays` and `ray_of` of `_Inputs`."""
    rays: List[np.ndarray] = []
    ray_of: List[int] = []
    for direction in np.frombuffer(directions, np.float32).reshape(-1, 2):
        # points of one ray differ in the last bit of their directions
        found = [i for i, ray in enumerate(rays) if abs(direction[0] * ray[1] - direction[1] * ray[0]) < 1e-6]
        if not found:
            found = [len(rays)]
            rays.append(direction)
        ray_of.append(2 * found[0] + int(direction @ rays[found[0]] < 0))
    return np.concatenate(rays), np.array(ray_of)


def _inputs(arguments: Arguments) -> _Inputs:
    x, source, weight, mask = arguments[:4]
    x = _in_runs(with_far_corners(x.detach()).permute(0, 2, 3, 1).float(), arguments.runs)
    taps = weight[0, 0].numel()
    source_values, source_strides = _planes(source)
    mask_values, mask_strides = (np.empty(0, np.float32), (0, 0, 0)) if mask is None else _planes(mask)
    points = torch.zeros(taps, 2) if arguments.points is None else arguments.points.detach().float()
    rays, ray_of = _rays(_flat(directions_of(points)).tobytes())
    top, left = first_centre(weight, arguments.padding, arguments.dilation)
    lattice = _Lattice(
        height=x.shape[1],
        width=x.shape[2],
        channels=x.shape[3],
        out_pixels=source.shape[-2] * source.shape[-1],
        out_width=source.shape[-1],
        stride_y=arguments.stride[0],
        stride_x=arguments.stride[1],
        top=float(top),
        left=float(left),
        taps=taps,
        runs=arguments.runs,
        from_metric=arguments.points is not None,
        eps=float(arguments.eps),
        masked=mask is not None,
        source_strides=source_strides,
        mask_strides=mask_strides,
    )
    return _Inputs(lattice, _flat(x), source_values, mask_values, _flat(points), rays, ray_of)


class _Threads(ThreadPoolExecutor):
    """As many threads as torch has; they start when there is work for more than one."""

    def __init__(self):
        self.number = torch.get_num_threads()
        super().__init__(self.number)

    def run(self, kernel: Callable, total: int, step: int, *arguments) -> None:
        """Calls `kernel(first, last, *arguments)` for pieces of `range(total)` in whole steps, all at the same time."""
        pieces = gather._pieces(total, -(-total // self.number), step)
        if len(pieces) == 1:
            kernel(0, total, *arguments)
        else:
            list(self.map(lambda piece: kernel(piece.start, piece.stop, *arguments), pieces))


def _is_depthwise(arguments: Arguments) -> bool:
    return arguments.weight.shape[:2] == (arguments.groups, 1)


def _for_gather(arguments: Arguments) -> bool:
    """float64; and layers with columns where torch has several threads.

    After each product those wait busily for the next, and keep threads of ours from their cores: on two cores a layer
    of 64 channels took half as long again. `gather` makes the columns with torch's own.
    """
    in_double = torch.float64 in (arguments.x.dtype, arguments.source.dtype)
    return in_double or not (_is_depthwise(arguments) or torch.get_num_threads() == 1)


def _depthwise_kernel(arguments: Arguments) -> np.ndarray:
    """[K, channels]."""
    return _flat(_in_runs(arguments.weight.flatten(1).t().float(), arguments.runs))


# --- forward ---------------------------------------------------------------------------------------------------------


def _forward(arguments: Arguments, bias: Optional[Tensor]) -> Tensor:
    if _for_gather(arguments):
        return gather._forward(arguments, bias)
    x, source, weight = arguments[:3]
    (batch, *_, height, width), out_channels = source.shape, len(weight)
    out = x.new_empty(0, out_channels)
    if batch:
        way = _forward_depthwise if _is_depthwise(arguments) else _forward_by_columns
        with _Threads() as threads:
            out = way(arguments, bias, batch * height * width, threads)
    return out.view(batch, height, width, out_channels).permute(0, 3, 1, 2)


def _step(lattice: _Lattice) -> int:
    """Output pixels that are worth a thread."""
    return LANES * -(-THREAD_NUMBERS // (LANES * lattice.taps * lattice.channels))


def _forward_depthwise(arguments: Arguments, bias: Optional[Tensor], total: int, threads: _Threads) -> Tensor:
    x, weight, runs, inputs = arguments.x, arguments.weight, arguments.runs, _inputs(arguments)
    bias = weight.new_zeros(len(weight)) if bias is None else bias.view(len(weight))
    arrays = _depthwise_kernel(arguments), _flat(_in_runs(bias.float(), runs))
    out = torch.empty(total, inputs.lattice.channels)
    threads.run(_depthwise, total, _step(inputs.lattice), inputs, *arrays, _flat(out))
    return _out_of_runs(out, runs, len(weight)).to(x.dtype)


def _forward_by_columns(arguments: Arguments, bias: Optional[Tensor], total: int, threads: _Threads) -> Tensor:
    x, weight, runs, inputs = arguments.x, arguments.weight, arguments.runs, _inputs(arguments)
    taps, channels = inputs.lattice.taps, inputs.lattice.channels
    kernel, pieces = gather._kernel(arguments), gather._pieces(total, gather._slab_pixels(arguments))
    out, slab = x.new_empty(total, len(weight)), torch.empty(pieces[0].stop, runs * taps, channels // runs)
    for piece in pieces:
        columns = slab[: piece.stop - piece.start]
        threads.run(_columns, len(columns), _step(inputs.lattice), inputs, _flat(columns), piece.start)
        columns = columns[..., : x.shape[1] // runs].to(x.dtype).flatten(1)
        out[piece] = gather._product(columns, kernel, bias)
    return out


# --- backward --------------------------------------------------------------------------------------------------------


def _gradients(
    arguments: Arguments, grad: Tensor, need_x: bool, need_source: bool, need_weight: bool
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, positions or fields, weight and mask; an empty tensor for what is not needed."""
    if _for_gather(arguments):
        return gather._gradients(arguments, grad, need_x, need_source, need_weight)
    (x, source, weight, mask), runs, inputs = arguments[:4], arguments.runs, _inputs(arguments)
    (batch, *numbers, height, width), depthwise = source.shape, _is_depthwise(arguments)
    lattice = inputs.lattice
    grad_x = torch.zeros((batch, lattice.height, lattice.width, lattice.channels) if need_x else 0)
    grad_source = torch.empty((batch, height, width, *numbers) if need_source else 0)
    grad_mask = torch.empty((batch, height, width, mask.shape[1]) if need_source and mask is not None else 0)
    grad_taps = torch.zeros((batch, lattice.taps, lattice.channels) if need_weight and depthwise else 0)
    results = _Results(*(_flat(t) for t in (grad_x, grad_source, grad_mask, grad_taps)))
    grad = grad.detach().permute(0, 2, 3, 1).reshape(batch, height * width, -1)

    with _Threads() as threads:
        if depthwise:
            upstream = _flat(_in_runs(grad.float(), runs))
            kernel = _depthwise_kernel(arguments)
            threads.run(_backward, batch * runs, 1, inputs, 0, 0, height * width, kernel, upstream, results)
            grad_weight = _out_of_runs(grad_taps.sum(0), runs, len(weight)).t() if need_weight else grad_taps
        else:
            need_samples = need_x or need_source
            grad_weight = _backward_by_columns(arguments, grad, need_samples, need_weight, inputs, results, threads)

    if need_x:
        grad_x = _out_of_runs(grad_x[:, : x.shape[2], : x.shape[3]], runs, x.shape[1]).contiguous()
        grad_x = grad_x.to(x.dtype).permute(0, 3, 1, 2)
    if need_source:
        grad_source = grad_source.movedim((1, 2), (-2, -1))
    if grad_mask.dim() > 1:
        grad_mask = grad_mask.permute(0, 3, 1, 2)
    if need_weight:
        grad_weight = grad_weight.to(weight.dtype).reshape(weight.shape)
        grad_weight = grad_weight.contiguous(memory_format=kernel_format(weight))
    return grad_x, grad_source, grad_weight, grad_mask


def _backward_by_columns(
    arguments: Arguments,
    grad: Tensor,
    need_samples: bool,
    need_weight: bool,
    inputs: _Inputs,
    results: _Results,
    threads: _Threads,
) -> Tensor:
    """Fills the `results`; the kernel's gradient `[..., C_in/groups, K]`. A slab is some pixels of some images."""
    x, runs, kernel, total = arguments.x, arguments.runs, gather._kernel(arguments), None
    (batch, pixels, _), slab = grad.shape, gather._slab_pixels(arguments)
    share = x.shape[1] // runs
    together = max(threads.number, slab // pixels)  # a thread needs a whole image to itself
    for images in gather._pieces(batch, together):
        for span in gather._pieces(pixels, max(1, slab // together)):
            upstream = grad[images, span].flatten(0, 1)
            if need_samples:
                samples = gather._sample_gradient(upstream, kernel).view(len(upstream), -1, share)
                samples = _filled_up(samples.float()).contiguous()
            else:
                samples = torch.zeros(len(upstream), runs * inputs.lattice.taps, inputs.lattice.channels // runs)
            units, nothing = (images.stop - images.start) * runs, np.empty(0, np.float32)
            where = images.start, span.start, span.stop
            threads.run(_backward, units, 1, inputs, *where, nothing, _flat(samples), results)
            if need_weight:
                columns = samples[..., :share].to(x.dtype).flatten(1)
                part = gather._product_gradient(columns, upstream, kernel).float()
                total = part if total is None else total.add_(part)
    return torch.empty(0) if total is None else total.flatten(0, 2).transpose(2, 3)


# `ball_conv2d_reference`, fastest on CPUs and straight from the metrics
compiled_conv2d = define("compiled_conv2d", _forward, _gradients, device_types="cpu")
