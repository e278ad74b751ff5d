"""Sixteen float32 numbers as one value in a numba kernel: a register of AVX-512, two of AVX, four of NEON.

LLVM makes such vectors of plain loops too, but cannot know that the arrays of a kernel do not overlap, and checks it
anew before every inner loop: half of the scan's time, where that loop is over a few channels.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16

_LLVM_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_LLVM_BITS = ir.VectorType(ir.IntType(32), LANES)
# Products may be fused with sums; no "reassoc", which would undo the rounding in `exp2`.
_FUSED = ("contract",)

#: Added and taken away again, it leaves the nearest whole number, and that number in the lowest bits in between.
_ROUND = np.float32(1.5 * 2**23)
#: As exponents of a float32, -127 is that of zero and 128 that of infinity.
_LOWEST, _HIGHEST = np.float32(-127), np.float32(128)
_ONE = np.float32(1)
#: 2^f = 1 + f (C1 + C2 f + ...): exactly 1 at 0, for a decay a little above 1 would grow over many tokens.
_C1, _C2, _C3, _C4, _C5, _C6 = (
    np.polynomial.Chebyshev.interpolate(lambda f: np.expm1(f * np.log(2)) / f, 5, (-0.5, 0.5))
    .convert(kind=np.polynomial.Polynomial)
    .coef.astype(np.float32)
)


def _instruction(function: Callable[..., Any]) -> Any:
    """numba's `intrinsic`, untyped: a function that writes LLVM instructions, called in kernels without its first
    argument.
    """
    return intrinsic(function)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


_vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _LLVM_VECTOR)


def _spread(builder: Any, value: Any) -> Any:
    """A scalar in every lane; a vector as it is."""
    if value.type == _LLVM_VECTOR:
        return value
    first = builder.insert_element(ir.Constant(_LLVM_VECTOR, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    same = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(_LLVM_VECTOR, ir.Undefined), same)


def _lane_by_lane(symbol: Callable[[Any, Any], Any], instruction: str) -> None:
    """Let an operator work on two vectors, or a vector and a float32."""

    @_instruction
    def operation(typing_context: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, b = (_spread(builder, value) for value in arguments)
            return getattr(builder, instruction)(a, b, flags=_FUSED)

        return _vector(a, b), generate

    @overload(symbol, strict=False)
    def applied(a: Any, b: Any) -> Any:
        if {a, b} in ({_vector}, {_vector, types.float32}):
            return lambda a, b: operation(a, b)
        return None


_lane_by_lane(operator.add, "fadd")
_lane_by_lane(operator.sub, "fsub")
_lane_by_lane(operator.mul, "fmul")


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index_type: Any, index: Any) -> Any:
    """Where `LANES` neighbours of a float32 array begin."""
    array = context.make_array(array_type)(context, builder, array)
    shape, strides = (cgutils.unpack_tuple(builder, part, array_type.ndim) for part in (array.shape, array.strides))
    indices = [
        context.cast(builder, value, kind, types.intp)
        for value, kind in zip(cgutils.unpack_tuple(builder, index, len(index_type)), index_type, strict=True)
    ]
    item = cgutils.get_item_pointer2(context, builder, array.data, shape, strides, array_type.layout, indices)
    return builder.bitcast(item, _LLVM_VECTOR.as_pointer())


@_instruction
def load(typing_context: Any, array: Any, index: Any) -> Any:
    """The `LANES` neighbours of a float32 array along its last axis, contiguous in memory, from `index` (tuple) on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _pointer(context, builder, signature.args[0], arguments[0], signature.args[1], arguments[1])
        return builder.load(address, align=4)

    return _vector(array, index), generate


@_instruction
def store(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Write a vector where `load` would read it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _pointer(context, builder, signature.args[0], arguments[0], signature.args[1], arguments[1])
        builder.store(arguments[2], address, align=4)
        return context.get_dummy_value()

    return types.void(array, index, value), generate


@_instruction
def spread(typing_context: Any, value: Any) -> Any:
    """A float32 in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _spread(builder, arguments[0])

    return _vector(value), generate


@_instruction
def total(typing_context: Any, value: Any) -> Any:
    """The sum of the lanes, a float32, halves first."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (vector,) = arguments
        width = LANES
        while width > 1:
            width //= 2
            order = ir.VectorType(ir.IntType(32), width)
            nothing = ir.Constant(vector.type, ir.Undefined)
            lower, upper = (
                builder.shuffle_vector(vector, nothing, ir.Constant(order, list(range(first, first + width))))
                for first in (0, width)
            )
            vector = builder.fadd(lower, upper)
        return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

    return types.float32(value), generate


@_instruction
def _where_less(typing_context: Any, a: Any, b: Any, then: Any, otherwise: Any) -> Any:
    """`then` in the lanes where a < b, `otherwise` elsewhere, also where a or b is NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, then, otherwise = (_spread(builder, value) for value in arguments)
        return builder.select(builder.fcmp_ordered("<", a, b), then, otherwise)

    return _vector(a, b, then, otherwise), generate


@_instruction
def _power_of_two(typing_context: Any, rounded: Any) -> Any:
    """2^k of k + `_ROUND`: k, in the lowest bits, becomes the exponent."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def each(bits: int) -> Any:
            return ir.Constant(_LLVM_BITS, [bits] * LANES)

        bits = builder.bitcast(arguments[0], _LLVM_BITS)
        return builder.bitcast(builder.add(builder.shl(bits, each(23)), each(0x3F800000)), _LLVM_VECTOR)

    return _vector(rounded), generate


@njit(inline="always")
def exp2(x: Any) -> Any:
    """2^x = 2^k 2^f to 1e-7; 0 below -126.5, infinite above 127.5, NaN for NaN."""
    inside = _where_less(x, _LOWEST, _LOWEST, x)
    inside = _where_less(_HIGHEST, inside, _HIGHEST, inside)
    rounded = inside + _ROUND
    f = inside - (rounded - _ROUND)
    return _power_of_two(rounded) * ((((((f * _C6 + _C5) * f + _C4) * f + _C3) * f + _C2) * f + _C1) * f + _ONE)
