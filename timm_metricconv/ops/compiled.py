"""The fastest CPU backend, compiled by Numba: from a metric to its samples and their sum in one pass.

The kernels work in registers of sixteen numbers: sixteen output pixels while they find where the samples lie (`_plan`),
sixteen channels of one pixel while they read and add. A depthwise layer never has columns: every output pixel adds up
its samples in registers. Any other layer has its columns made slab by slab for oneDNN's matrix product, as in `gather`.

The threads are as many as torch's, and live no longer than a call: neither a fork nor a second caller can meet them.
Each owns what it writes, so nothing is added in a changing order.
"""

import math
import operator
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, List, NamedTuple, Optional, Tuple

import numba
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model
from torch import Tensor

from . import gather
from .custom_op import Arguments, define, kernel_format, with_far_corners
from .reference import first_centre

# `geometry.randers` keeps F above this share of ‖z‖.
FLOOR = 1e-3
# Columns in memory at a time: they fit a core's second-level cache.
SLAB_BYTES = 2**20
# Output pixels of which a thread has enough to do: to start one takes some 50 µs.
THREAD_SAMPLES = 2**12


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


def _store_whole(builder, array, index, register):
    builder.store(builder.fptosi(register, _ints), _at(builder, array, index, _ints), align=4)


def _where_larger(builder, a, b, yes, no):
    return builder.select(builder.fcmp_ordered(">", a, b), yes, no)


def _total(builder, register):
    add = _llvm(f"llvm.vector.reduce.fadd.v{LANES}f32", ir.FloatType(), ir.FloatType(), _floats)
    return add(builder, ir.Constant(ir.FloatType(), 0.0), register)


def load(array, index):
    """Sixteen numbers of an array."""


def store(array, index, register):
    """Writes them."""


def store_whole(array, index, register):
    """Writes whole numbers to an array of integers."""


def spread(array, index):
    """Sixteen times a number of an array."""


def larger(a, b):
    """The larger of two; b where a is NaN."""


def smaller(a, b):
    """The smaller of two; b where a is NaN."""


def where_larger(a, b, yes, no):
    """`yes` where a > b, else `no`."""


def total(register):
    """The sum of its numbers."""


# `contract`: a product and a sum become one instruction where the processor has it
for _function, _name in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv")):
    _operation(
        _function,
        lambda builder, a, b, name=_name: getattr(builder, name)(a, b, flags=("contract",)),
        _register,
        *_pairs,
    )
for _function, _name in ((math.floor, "floor"), (math.sqrt, "sqrt"), (abs, "fabs")):
    _operation(_function, _llvm(f"llvm.{_name}.v{LANES}f32", _floats, _floats), _register, (_register,))
_operation(spread, _spread, _register, (_array, numba.intp))
_operation(larger, _choice(">"), _register, *_pairs)
_operation(smaller, _choice("<"), _register, *_pairs)
_operation(where_larger, _where_larger, _register, (_register,) * 4)
_operation(load, _load, _register, (_array, numba.intp))
_operation(store, _store, numba.types.none, (_array, numba.intp, _register))
_operation(store_whole, _store_whole, numba.types.none, (_indices, numba.intp, _register))
_operation(total, _total, numba.float32, (_register,))


def _compiled(function: Callable) -> Callable:
    """Compiles at the first call, and keeps the machine code on disk where there is a place for it."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache
        return numba.njit(nogil=True)(function)


# --- where the samples lie: sixteen output pixels at a time ----------------------------------------------------------


class _Lattice(NamedTuple):
    """What every kernel is told. Output pixels are counted row by row through all images of the batch."""

    height: int  # of the image, two at least
    width: int
    channels: int  # of a pixel in memory: G runs of whole registers
    out_pixels: int  # of an image
    out_width: int
    stride_y: int
    stride_x: int
    top: float  # first centre
    left: float
    taps: int
    metric_groups: int
    from_metric: bool  # the source: fields of metrics, or positions
    eps: float
    masked: bool
    source_strides: Tuple[int, int, int]  # in memory: of images, numbers of a pixel, and pixels
    mask_strides: Tuple[int, int, int]


class _Plan(NamedTuple):
    """How sixteen pixels' samples read an image. Arrays of K·16 numbers, one tap after the other, or of four times that."""

    fields: np.ndarray  # [5, 16], the metrics
    centres: np.ndarray  # [2, 16], (x, y)
    corners: np.ndarray  # [K, 16] int32, the pixel that is the sample's upper left corner
    shares: np.ndarray  # [K, 4, 16], bilinear weights of the corners (0, 0), (0, 1), (1, 0), (1, 1) as (down, right)
    slopes: np.ndarray  # [K, 4, 16], their derivatives along x; of a metric's sample along its ray
    slopes_y: np.ndarray  # [K, 4, 16], along y; unused with a metric
    masks: np.ndarray  # [K, 16]


@_compiled
def _empty_plan(taps):
    n = taps * LANES
    return _Plan(
        np.empty(5 * LANES, np.float32),
        np.empty(2 * LANES, np.float32),
        np.empty(n, np.int32),
        np.empty(4 * n, np.float32),
        np.empty(4 * n, np.float32),
        np.empty(4 * n, np.float32),
        np.ones(n, np.float32),
    )


@_compiled
def _hat(distance):
    """max(0, 1 − |distance|)"""
    return larger(1 - abs(distance), 0)


@_compiled
def _axis(coordinate, size):
    """The near corner along an axis of `size` pixels, and the distance from it.

    The near corner stays in the image, and the hat function does the rest: a sample that is a pixel or more outside
    weighs nothing. NaN is outside.
    """
    coordinate = smaller(larger(coordinate, -2), size + 1)
    near = smaller(larger(math.floor(coordinate), 0), size - 2)
    return near, coordinate - near


@_compiled
def _randers(plan, ux, uy):
    """z = A·u, ‖z‖ and F(u) = ‖z‖ + v·z of sixteen metrics, as `geometry.randers` has it."""
    a, b, d = load(plan.fields, 0), load(plan.fields, LANES), load(plan.fields, 2 * LANES)
    zx, zy = a * ux + b * uy, b * ux + d * uy
    norm = math.sqrt(larger(zx * zx + zy * zy, 1e-30))
    finsler = norm + load(plan.fields, 3 * LANES) * zx + load(plan.fields, 4 * LANES) * zy
    return zx, zy, norm, larger(finsler, norm * FLOOR)


@_compiled
def _find(lattice, source, mask, points, first, last, group, gradients, plan):
    """Fills the plan for the output pixels from `first`, where those from `last` on repeat the one before.

    With `gradients` the slopes are wanted, and shares without the mask.
    """
    at, mask_at = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    for i in range(LANES):
        pixel = min(first + i, last - 1)
        image = pixel // lattice.out_pixels
        pixel -= image * lattice.out_pixels
        row = pixel // lattice.out_width
        plan.centres[i] = lattice.left + lattice.stride_x * (pixel - row * lattice.out_width)
        plan.centres[LANES + i] = lattice.top + lattice.stride_y * row
        at[i] = image * lattice.source_strides[0] + pixel * lattice.source_strides[2]
        mask_at[i] = image * lattice.mask_strides[0] + pixel * lattice.mask_strides[2]
    if lattice.from_metric:
        for field in range(5):
            shift = (group * 5 + field) * lattice.source_strides[1]
            for i in range(LANES):
                plan.fields[field * LANES + i] = source[at[i] + shift]

    centre_x, centre_y = load(plan.centres, 0), load(plan.centres, LANES)
    offset = np.empty(2 * LANES, np.float32)
    for tap in range(lattice.taps):
        px, py = points[4 * tap], points[4 * tap + 1]
        if lattice.from_metric:
            stretch = 1 / (_randers(plan, points[4 * tap + 2], points[4 * tap + 3])[3] + lattice.eps)
            x, y = stretch * px, stretch * py
        else:
            shift = 2 * (group * lattice.taps + tap) * lattice.source_strides[1]
            for i in range(LANES):
                offset[i] = source[at[i] + shift]
                offset[LANES + i] = source[at[i] + shift + lattice.source_strides[1]]
            x, y = load(offset, 0), load(offset, LANES)
        column, right = _axis(centre_x + x, lattice.width)
        row, down = _axis(centre_y + y, lattice.height)
        store_whole(plan.corners, tap * LANES, row * lattice.width + column)
        x0, x1, y0, y1 = _hat(right), _hat(right - 1), _hat(down), _hat(down - 1)
        if lattice.masked:
            for i in range(LANES):
                plan.masks[tap * LANES + i] = mask[mask_at[i] + (group * lattice.taps + tap) * lattice.mask_strides[1]]
            if not gradients:
                factor = load(plan.masks, tap * LANES)
                y0, y1 = y0 * factor, y1 * factor
        corner = 4 * tap * LANES
        store(plan.shares, corner, y0 * x0)
        store(plan.shares, corner + LANES, y0 * x1)
        store(plan.shares, corner + 2 * LANES, y1 * x0)
        store(plan.shares, corner + 3 * LANES, y1 * x1)
        if gradients:
            # A hat's slope is its rise over the pixel it is in, taken from the right as torchvision's.
            cell = math.floor(right)
            sx0, sx1 = _hat(cell + 1) - _hat(cell), _hat(cell) - _hat(cell - 1)
            cell = math.floor(down)
            sy0, sy1 = _hat(cell + 1) - _hat(cell), _hat(cell) - _hat(cell - 1)
            if lattice.from_metric:
                store(plan.slopes, corner, px * (y0 * sx0) + py * (sy0 * x0))
                store(plan.slopes, corner + LANES, px * (y0 * sx1) + py * (sy0 * x1))
                store(plan.slopes, corner + 2 * LANES, px * (y1 * sx0) + py * (sy1 * x0))
                store(plan.slopes, corner + 3 * LANES, px * (y1 * sx1) + py * (sy1 * x1))
            else:
                store(plan.slopes, corner, y0 * sx0)
                store(plan.slopes, corner + LANES, y0 * sx1)
                store(plan.slopes, corner + 2 * LANES, y1 * sx0)
                store(plan.slopes, corner + 3 * LANES, y1 * sx1)
                store(plan.slopes_y, corner, sy0 * x0)
                store(plan.slopes_y, corner + LANES, sy0 * x1)
                store(plan.slopes_y, corner + 2 * LANES, sy1 * x0)
                store(plan.slopes_y, corner + 3 * LANES, sy1 * x1)


# --- forward: sixteen channels at a time -----------------------------------------------------------------------------


@_compiled
def _mean(x, at, below, right, shares, sample):
    """The four corners of a sample, from the channel at `at`, weighed by shares or slopes."""
    upper = spread(shares, sample) * load(x, at) + spread(shares, sample + LANES) * load(x, at + right)
    sample += 2 * LANES
    lower = spread(shares, sample) * load(x, below) + spread(shares, sample + LANES) * load(x, below + right)
    return upper + lower


@_compiled
def _depthwise(first, last, lattice, x, source, mask, points, weight, bias, out):
    """The output pixels from `first` to `last` of a depthwise layer. `weight`: [K, C]."""
    plan, channels = _empty_plan(lattice.taps), lattice.channels
    run, line = channels // lattice.metric_groups, lattice.width * channels
    for chunk in range(first, last, LANES):
        for group in range(lattice.metric_groups):
            _find(lattice, source, mask, points, chunk, last, group, False, plan)
            for i in range(min(LANES, last - chunk)):
                image = (chunk + i) // lattice.out_pixels * lattice.height * line
                for c in range(group * run, group * run + run, LANES):
                    added = load(bias, c)
                    for tap in range(lattice.taps):
                        at = image + plan.corners[tap * LANES + i] * channels + c
                        value = _mean(x, at, at + line, channels, plan.shares, 4 * tap * LANES + i)
                        added = added + value * load(weight, tap * channels + c)
                    store(out, (chunk + i) * channels + c, added)


@_compiled
def _columns(first, last, lattice, x, source, mask, points, columns, origin):
    """The columns [n, K, C] of the output pixels from `first` to `last`, those of the pixel `origin` at the beginning."""
    plan, channels = _empty_plan(lattice.taps), lattice.channels
    run, line = channels // lattice.metric_groups, lattice.width * channels
    for chunk in range(first, last, LANES):
        for group in range(lattice.metric_groups):
            _find(lattice, source, mask, points, chunk, last, group, False, plan)
            for i in range(min(LANES, last - chunk)):
                image = (chunk + i) // lattice.out_pixels * lattice.height * line
                for tap in range(lattice.taps):
                    corner = image + plan.corners[tap * LANES + i] * channels
                    column = ((chunk + i - origin) * lattice.taps + tap) * channels
                    for c in range(group * run, group * run + run, LANES):
                        at = corner + c
                        value = _mean(x, at, at + line, channels, plan.shares, 4 * tap * LANES + i)
                        store(columns, column + c, value)


# --- backward --------------------------------------------------------------------------------------------------------


class _Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    source: bool
    weight: bool


@_compiled
def _add(x, at, factor, value):
    store(x, at, load(x, at) + factor * value)


@_compiled
def _backward(
    first, last, lattice, needs, depthwise, x, source, mask, points, weight, grad, images, pixels, results
):
    """Everything that a sample's gradient gives, for the metric groups from `first` to `last`, counted through images.

    A group of an image owns what it adds to: its channels of the image's gradient, and of a kernel's gradient for each
    image. Where `depthwise`, `grad` is the output's and a sample's gradient is made here; else it holds samples'
    gradients `[images, pixels, K, C]`, in whose place the samples themselves are left for the kernel's gradient.

    Args:
        first: Number of the first (image, group); the images are counted from the first of `images`.
        last: The number after the last.
        lattice: As for the other kernels.
        needs: Gradients wanted.
        depthwise: Whether `grad` and `weight` are a depthwise layer's.
        x: Images.
        source: Metrics or positions.
        mask: As they.
        points: (x, y) and direction of each.
        weight: [K, C]; of a depthwise layer.
        grad: See above.
        images: First image.
        pixels: First and last output pixel of each image.
        results: Gradients of x, source, mask, and [B, K, C] of the weight.
    """
    plan, channels, taps = _empty_plan(lattice.taps), lattice.channels, lattice.taps
    grad_x, grad_source, grad_mask, grad_weight = results
    run, line = channels // lattice.metric_groups, lattice.width * channels
    along, along_y, along_mask = np.zeros(taps * LANES, np.float32), np.zeros(taps * LANES, np.float32), np.zeros(taps * LANES, np.float32)
    for unit in range(first, last):
        group, image = unit % lattice.metric_groups, images + unit // lattice.metric_groups
        begin, end = image * lattice.out_pixels + pixels[0], image * lattice.out_pixels + pixels[1]
        for chunk in range(begin, end, LANES):
            _find(lattice, source, mask, points, chunk, end, group, True, plan)
            for i in range(min(LANES, end - chunk)):
                for tap in range(taps):
                    sample = tap * LANES + i
                    share = 4 * tap * LANES + i
                    corner = (image * lattice.height * lattice.width + plan.corners[sample]) * channels
                    factor = spread(plan.masks, sample)
                    slope = slope_y = product = factor - factor
                    for c in range(group * run, group * run + run, LANES):
                        at, below = corner + c, corner + line + c
                        value = _mean(x, at, below, channels, plan.shares, share)
                        if depthwise:
                            upstream = load(grad, (chunk + i) * channels + c)
                            value_at = (image * taps + tap) * channels + c
                            if needs.weight:
                                _add(grad_weight, value_at, upstream * factor, value)
                            upstream = upstream * load(weight, tap * channels + c)
                        else:
                            value_at = (((image - images) * (pixels[1] - pixels[0]) + chunk + i - begin) * taps + tap) * channels + c
                            upstream = load(grad, value_at)
                            store(grad, value_at, factor * value)
                        if needs.source:
                            slope = slope + upstream * _mean(x, at, below, channels, plan.slopes, share)
                            if not lattice.from_metric:
                                slope_y = slope_y + upstream * _mean(x, at, below, channels, plan.slopes_y, share)
                            if lattice.masked:
                                product = product + upstream * value
                        if needs.x:
                            upstream = upstream * factor
                            _add(grad_x, at, spread(plan.shares, share), upstream)
                            _add(grad_x, at + channels, spread(plan.shares, share + LANES), upstream)
                            _add(grad_x, below, spread(plan.shares, share + 2 * LANES), upstream)
                            _add(grad_x, below + channels, spread(plan.shares, share + 3 * LANES), upstream)
                    if needs.source:
                        along[sample] = total(slope * factor)
                        if not lattice.from_metric:
                            along_y[sample] = total(slope_y * factor)
                        if lattice.masked:
                            along_mask[sample] = total(product)
            if needs.source:
                if lattice.from_metric:
                    _through_metric(lattice, points, along, plan)
                for i in range(min(LANES, end - chunk)):
                    place = (chunk + i) * lattice.metric_groups + group
                    if lattice.from_metric:
                        for field in range(5):
                            grad_source[5 * place + field] = plan.fields[field * LANES + i]
                    for tap in range(taps):
                        if not lattice.from_metric:
                            grad_source[2 * (place * taps + tap)] = along[tap * LANES + i]
                            grad_source[2 * (place * taps + tap) + 1] = along_y[tap * LANES + i]
                        if lattice.masked:
                            grad_mask[place * taps + tap] = along_mask[tap * LANES + i]


@_compiled
def _through_metric(lattice, points, along, plan):
    """Gradients of the samples' stretches 1 / (F + ε) → of the metrics, in the place of `plan.fields`."""
    vx, vy = load(plan.fields, 3 * LANES), load(plan.fields, 4 * LANES)
    ga = gb = gd = gx = gy = vx - vx
    for tap in range(lattice.taps):
        ux, uy = points[4 * tap + 2], points[4 * tap + 3]
        zx, zy, norm, finsler = _randers(plan, ux, uy)
        stretch = 1 / (finsler + lattice.eps)
        grad = 0 - load(along, tap * LANES) * stretch * stretch
        # where F is kept at its floor, only ‖z‖ counts
        by_norm, by_drift = where_larger(finsler, norm * FLOOR, grad, grad * FLOOR), where_larger(finsler, norm * FLOOR, grad, grad - grad)
        gzx, gzy = by_norm * zx / norm + by_drift * vx, by_norm * zy / norm + by_drift * vy
        ga, gb, gd = ga + gzx * ux, gb + gzx * uy + gzy * ux, gd + gzy * uy
        gx, gy = gx + by_drift * zx, gy + by_drift * zy
    store(plan.fields, 0, ga)
    store(plan.fields, LANES, gb)
    store(plan.fields, 2 * LANES, gd)
    store(plan.fields, 3 * LANES, gx)
    store(plan.fields, 4 * LANES, gy)


# --- between torch and the kernels -----------------------------------------------------------------------------------


def _flat(t: Tensor) -> np.ndarray:
    return t.detach().contiguous().view(-1).numpy()


def _planes(t: Tensor) -> Tuple[np.ndarray, Tuple[int, int, int]]:
    """`[B, ..., H, W]` as it lies in memory, and the strides of images, of numbers of a pixel, and of pixels."""
    t = t.detach().float().flatten(1, -3).flatten(2)
    reach = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((reach,), (1,)).numpy(), t.stride()


def _runs(t: Tensor, groups: int) -> Tensor:
    """`[..., C]` with each of `groups` runs of channels filled up to whole registers."""
    length = t.shape[-1] // groups
    return t if length % LANES == 0 else F.pad(t.unflatten(-1, (groups, length)), (0, -length % LANES)).flatten(-2)


def _channels(t: Tensor, groups: int, channels: int) -> Tensor:
    """The inverse of `_runs`."""
    return t if t.shape[-1] == channels else t.unflatten(-1, (groups, -1))[..., : channels // groups].flatten(-2)


class _Inputs(NamedTuple):
    lattice: _Lattice
    x: Tensor  # [B, height, width, C] float32, in runs
    source: np.ndarray
    mask: np.ndarray
    points: np.ndarray


def _inputs(arguments: Arguments) -> _Inputs:
    x, source, weight, mask = with_far_corners(arguments.x), arguments.source, arguments.weight, arguments.mask
    taps, from_metric = weight[0, 0].numel(), arguments.points is not None
    groups = source.shape[1] // (5 if from_metric else taps)
    table = _runs(x.detach().permute(0, 2, 3, 1).float(), groups).contiguous()
    values, strides = _planes(source)
    masks, mask_strides = (np.ones(1, np.float32), (0, 0, 0)) if mask is None else _planes(mask)
    points = source.new_zeros(taps, 2) if arguments.points is None else arguments.points.detach()
    radii = torch.linalg.vector_norm(points, dim=1, keepdim=True)
    # any direction serves for a point at the origin
    directions = torch.where(radii > 0, points / radii, points.new_tensor([1.0, 0.0]))
    top, left = first_centre(weight, arguments.padding, arguments.dilation)
    lattice = _Lattice(
        *table.shape[1:],
        source.shape[-2] * source.shape[-1],
        source.shape[-1],
        *arguments.stride,
        float(top),
        float(left),
        taps,
        groups,
        from_metric,
        float(arguments.eps),
        mask is not None,
        strides,
        mask_strides,
    )
    return _Inputs(lattice, table, values, masks, _flat(torch.cat((points, directions), 1).float()))


def _is_depthwise(arguments: Arguments) -> bool:
    return arguments.weight.shape[:2] == (arguments.groups, 1)


def _taps(arguments: Arguments, groups: int) -> Tensor:
    """A depthwise kernel `[K, C]`, in runs."""
    return _runs(arguments.weight.flatten(1).t().float(), groups)


class _Threads:
    """Calls of a kernel in as many threads as torch has."""

    def __enter__(self):
        self.number = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.number)
        return self

    def __exit__(self, *error):
        self.pool.shutdown()

    def __call__(self, kernel: Callable, first: int, last: int, step: int, *arguments) -> None:
        """Calls `kernel(first, last, ...)` for pieces of whole steps."""
        pieces = gather._pieces(last - first, -(-(last - first) // self.number), step)
        if len(pieces) == 1:
            return kernel(first, last, *arguments)
        list(self.pool.map(lambda piece: kernel(first + piece.start, first + piece.stop, *arguments), pieces))


def _forward(arguments: Arguments, bias: Optional[Tensor]) -> Tensor:
    x, source, weight = arguments[:3]
    if x.dtype == torch.float64:
        return gather._forward(arguments, bias)
    batch, out_channels, (height, width) = len(x), len(weight), source.shape[-2:]
    pixels = batch * height * width
    out = x.new_empty(pixels, out_channels)
    if not pixels:
        return out.view(batch, height, width, out_channels).permute(0, 3, 1, 2)
    lattice, table, *rest = inputs = _inputs(arguments)
    with _Threads() as threads:
        if _is_depthwise(arguments):
            groups, channels = lattice.metric_groups, lattice.channels
            added = x.new_zeros(channels) if bias is None else _runs(bias, groups)
            result = torch.empty(pixels, channels)
            threads(
                _depthwise, 0, pixels, LANES,
                lattice, _flat(table), *rest, _flat(_taps(arguments, groups)), _flat(added.float()), _flat(result),
            )
            out = _channels(result, groups, out_channels).to(x.dtype)
        else:
            kernel = gather._kernel(arguments)
            flat = _flat(table)
            for piece in gather._pieces(pixels, _slab(arguments)):
                columns = torch.empty(piece.stop - piece.start, lattice.taps, lattice.channels)
                threads(_columns, piece.start, piece.stop, LANES, lattice, flat, *rest, _flat(columns), piece.start)
                columns = _channels(columns, lattice.metric_groups, x.shape[1]).to(x.dtype).flatten(1)
                out[piece] = gather._product(columns, kernel, bias)
    return out.view(batch, height, width, out_channels).permute(0, 3, 1, 2)


def _slab(arguments: Arguments) -> int:
    """Output pixels of a slab: no fewer than the kernel has rows, lest reading the kernel take the time."""
    weight = arguments.weight
    return max(SLAB_BYTES // (4 * weight[0].numel() * arguments.groups), len(weight))


def _gradients(
    arguments: Arguments, grad: Tensor, need_x: bool, need_source: bool, need_weight: bool
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, positions or fields, weight and mask; an empty tensor for what is not needed."""
    x, source, weight, mask = arguments[:4]
    if x.dtype == torch.float64:
        return gather._gradients(arguments, grad, need_x, need_source, need_weight)
    batch, out_channels, (height, width) = len(x), len(weight), source.shape[-2:]
    lattice, table, *rest = _inputs(arguments)
    groups, taps, pixels = lattice.metric_groups, lattice.taps, lattice.out_pixels
    depthwise = _is_depthwise(arguments)
    needs = _Needs(need_x, need_source, need_weight)
    grad = grad.detach().permute(0, 2, 3, 1).reshape(batch, pixels, out_channels)
    grad_x = torch.zeros(table.shape if need_x else 0)
    grad_source = torch.empty(batch * pixels * source[0, ..., 0, 0].numel() if need_source else 0)
    grad_mask = torch.empty(mask.numel() if need_source and mask is not None else 0)
    grad_weight = torch.zeros(batch, taps, lattice.channels) if depthwise and need_weight else torch.empty(0)
    results = tuple(_flat(t) for t in (grad_x, grad_source, grad_mask, grad_weight))
    flat = _flat(table)
    with _Threads() as threads:
        if depthwise:
            upstream = _runs(grad.float(), groups)
            threads(
                _backward, 0, batch * groups, 1,
                lattice, needs, True, flat, *rest, _flat(_taps(arguments, groups)), _flat(upstream), 0, (0, pixels), results,
            )
            grad_kernel = _channels(grad_weight.sum(0), groups, out_channels).t().view(out_channels, 1, taps)
        else:
            kernel, grad_kernel = gather._kernel(arguments), None
            slab = _slab(arguments)
            images = min(batch, max(threads.number, slab // pixels))
            nothing = np.zeros(1, np.float32)
            for piece in gather._pieces(batch, images):
                for span in gather._pieces(pixels, max(slab // images, 1)):
                    upstream = grad[piece, span].reshape(-1, out_channels)
                    if need_x or need_source:
                        samples = gather._sample_gradient(upstream, kernel).view(len(upstream), taps, -1)
                        samples = _runs(samples.float(), groups).contiguous()
                    else:
                        samples = torch.empty(len(upstream), taps, lattice.channels)
                    threads(
                        _backward, 0, (piece.stop - piece.start) * groups, 1,
                        lattice, needs, False, flat, *rest, nothing, _flat(samples), piece.start, (span.start, span.stop), results,
                    )
                    if need_weight:
                        columns = _channels(samples, groups, x.shape[1]).to(x.dtype).flatten(1)
                        part = gather._product_gradient(columns, upstream, kernel)
                        grad_kernel = part if grad_kernel is None else grad_kernel.add_(part)
            if grad_kernel is not None:
                grad_kernel = grad_kernel.flatten(0, 1).transpose(1, 2)
    if need_x:
        grad_x = grad_x[:, : x.shape[2], : x.shape[3]]
        grad_x = _channels(grad_x, groups, x.shape[1]).contiguous().permute(0, 3, 1, 2).to(x.dtype)
    if need_source:
        grad_source = grad_source.view(batch, height, width, *source.shape[1:-2]).movedim((1, 2), (-2, -1))
        if mask is not None:
            grad_mask = grad_mask.view(batch, height, width, -1).permute(0, 3, 1, 2)
    if need_weight:
        grad_weight = grad_kernel.to(weight.dtype).reshape(weight.shape).contiguous(memory_format=kernel_format(weight))
    return grad_x, grad_source, grad_weight, grad_mask


compiled_conv2d = define("compiled_conv2d", _forward, _gradients, device_types="cpu")
