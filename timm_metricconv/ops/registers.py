"""Registers of sixteen float32 numbers as a type of Numba, for the kernels of `compiled`."""

import math
import operator
from typing import Callable, Optional

import numba
from llvmlite import binding, ir
from numba.core import cgutils, config
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model

if config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("Numba's compiler is switched off, see NUMBA_DISABLE_JIT.")

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


def _operation(result, *cases: tuple, named: Optional[Callable] = None) -> Callable:
    """Teaches Numba a function of registers: a kernel calls what is decorated, but without the LLVM builder.

    Args:
        result: Its type.
        cases: The types of its arguments, each way to call it. A number among registers fills one.
        named: What the kernels call instead.
    """

    def decorate(emit: Callable) -> Callable:
        # Numba asks for a key that is no local object, and the name of `emit` is not bound yet
        key = named or f"{__name__}.{emit.__name__}"
        signatures = [signature(result, *case) for case in cases]
        template = type("Template", (ConcreteTemplate,), {"cases": signatures})
        infer_global(named or emit, typing_key=key)(template)

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
            lower_builtin(key, *case)(lower)
        return emit

    return decorate


def _filled(builder, number, vector=_floats):
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, first, ir.Constant(_ints, [0] * LANES))


def _llvm(name: str, *types) -> Callable:
    """Emits a call of LLVM's own function; the first of `types` is the result's."""

    def emit(builder, *values):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(types[0], types[1:]), name)
        return builder.call(function, values, fastmath=("reassoc",))

    return emit


def _arithmetic(name: str) -> Callable:
    # `contract`: a product and a sum become one instruction where the processor has it
    return lambda builder, a, b: getattr(builder, name)(a, b, flags=("contract",))


_operation(_register, *_pairs, named=operator.add)(_arithmetic("fadd"))
_operation(_register, *_pairs, named=operator.sub)(_arithmetic("fsub"))
_operation(_register, *_pairs, named=operator.mul)(_arithmetic("fmul"))
_operation(_register, (_register,), named=math.floor)(_llvm(f"llvm.floor.v{LANES}f32", _floats, _floats))
_operation(_register, (_register,), named=abs)(_llvm(f"llvm.fabs.v{LANES}f32", _floats, _floats))


@_operation(_register, *_pairs)
def larger(builder, a, b):
    """The larger of two; b where a is NaN, which is what the processor's instruction does."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@_operation(_register, *_pairs)
def smaller(builder, a, b):
    """The smaller of two; b where a is NaN."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


@_operation(_register, ())
def zeros(builder):
    """Sixteen zeros."""
    return ir.Constant(_floats, None)


@_operation(numba.float32, (_register,))
def total(builder, register):
    """The sum of its numbers."""
    add = _llvm(f"llvm.vector.reduce.fadd.v{LANES}f32", ir.FloatType(), ir.FloatType(), _floats)
    return add(builder, ir.Constant(ir.FloatType(), 0.0), register)


def _at(builder, array, index, vector):
    return builder.bitcast(builder.gep(array, [index]), vector.as_pointer())


@_operation(_register, (_array, numba.intp))
def load(builder, array, index):
    """Sixteen numbers of an array."""
    return builder.load(_at(builder, array, index, _floats), align=4)


@_operation(_register, (_array, numba.intp))
def spread(builder, array, index):
    """Sixteen times one number of an array."""
    return _filled(builder, builder.load(builder.gep(array, [index])))


@_operation(numba.types.none, (_array, numba.intp, _register))
def store(builder, array, index, register):
    """Writes them."""
    builder.store(register, _at(builder, array, index, _floats), align=4)


@_operation(numba.types.none, (_indices, numba.intp, *[_register] * 3))
def store_corner(builder, array, index, row, column, width):
    """Writes row · width + column, which float32 may not hold, to an array of integers."""
    row, column, width = (builder.fptosi(register, _ints) for register in (row, column, width))
    builder.store(builder.add(builder.mul(row, width), column), _at(builder, array, index, _ints), align=4)


@_operation(numba.int64, (numba.types.Array(numba.int64, 1, "C"), numba.int64))
def fetch_and_add(builder, array, step):
    """Adds to the first of some integers, which other threads do too; what it was before."""
    return builder.atomic_rmw("add", array, step, "monotonic")


@_operation(numba.types.voidptr, (numba.int64,))
def pointer(builder, address):
    """An integer as a pointer."""
    return builder.inttoptr(address, ir.IntType(8).as_pointer())


# A tile of a matrix product stays in registers: of four rows, and as many columns as there are registers for.
ROWS = 4
WIDEST = 4 if dict(binding.get_host_cpu_features()).get("avx512f") else 1


def _emit_tile(registers: int) -> Callable:
    """Emits out[row, column] += Σ_d a[row, d]·b[d, column], d in a loop, but to no column from `width` on.

    a is [4, depth], b [depth, 16·registers]. They are parts of larger matrices, at `at` and with steps of `row` and of
    `depth`; columns are neighbours.
    """

    def emit(builder, out, at, out_row, a, a_at, a_row, a_depth, b, b_at, b_depth, depth, width):
        integer = ir.IntType(64)
        columns = [ir.Constant(integer, LANES * i) for i in range(registers)]
        rows = [ir.Constant(integer, row) for row in range(ROWS)]
        places = [builder.add(builder.add(at, builder.mul(out_row, row)), column) for row in rows for column in columns]
        firsts = [builder.add(a_at, builder.mul(a_row, row)) for row in rows]
        sums = [load(builder, out, place) for place in places]
        before = builder.block
        loop, after = builder.append_basic_block("depth"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        d = builder.phi(integer)
        d.add_incoming(ir.Constant(integer, 0), before)
        running = [builder.phi(_floats) for _ in sums]
        b_row = builder.add(b_at, builder.mul(d, b_depth))
        factors = [load(builder, b, builder.add(b_row, column)) for column in columns]
        through = builder.mul(d, a_depth)
        numbers = [spread(builder, a, builder.add(first, through)) for first in firsts]
        products = [builder.fmul(number, factor, flags=("contract",)) for number in numbers for factor in factors]
        added = [builder.fadd(*pair, flags=("contract",)) for pair in zip(running, products, strict=True)]
        for phi, start, value in zip(running, sums, added, strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(value, loop)
        following = builder.add(d, ir.Constant(integer, 1))
        d.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
        builder.position_at_end(after)
        # beyond the width a sum has zeros of a filled-up kernel times what may be infinite
        limit = _filled(builder, builder.trunc(width, ir.IntType(32)), _ints)
        lanes = [ir.Constant(_ints, list(range(LANES * i, LANES * (i + 1)))) for i in range(registers)]
        within = [builder.icmp_signed("<", lane, limit) for lane in lanes] * ROWS
        for place, inside, value, start in zip(places, within, added, sums, strict=True):
            store(builder, out, place, builder.select(inside, value, start))

    emit.__name__ = f"tile_{registers}"
    return emit


_i = numba.int64
_tile = _operation(numba.types.none, (_array, _i, _i, _array, _i, _i, _i, _array, _i, _i, _i, _i))
tile_1, tile_2, tile_4 = (_tile(_emit_tile(registers)) for registers in (1, 2, 4))
