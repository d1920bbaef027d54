"""Loading q and k as operands of a matrix product that accumulates in float32.

float8_e4m3fn tensors are multiplied as float8 where the hardware can; elsewhere they arrive viewed as uint8 and become
float16, which holds each of their values.
"""

from __future__ import annotations

import triton
import triton.language as tl

# How float8 arrives: not at all, as itself to be multiplied or converted by the hardware (NVIDIA, sm_89 and newer), or
# as bytes that are taken apart bit by bit.
FP8_NONE = tl.constexpr(0)
FP8_NATIVE = tl.constexpr(1)
FP8_BITS = tl.constexpr(2)


@triton.jit
def _fp8_bits_to_float16(bits):
    """float8_e4m3fn in uint8 -> float16, on hardware without such a type.

    Shifted into place, exponent and mantissa read as a float16 that is 2^8 too small (biases 7 and 15), float8
    subnormals as float16 subnormals; both scale exactly.  The one NaN pattern of each sign is put back by hand.
    """
    wide = bits.to(tl.int16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), half * 256.0).to(tl.float16)


@triton.jit
def load_operand(pointer, mask, FP8: tl.constexpr):
    """``tl.load`` with 0 where not ``mask``; float8 in bytes as float16, everything else in its own dtype."""
    x = tl.load(pointer, mask=mask, other=0.0)
    if FP8 == FP8_BITS:
        x = _fp8_bits_to_float16(x)
    return x


@triton.jit
def load_factor(pointer, stride_batch, stride_token, batch, token, wanted):
    """A float32 factor of each token's key or score, 0 where not ``wanted``; None where there is no such tensor."""
    factor = None
    if pointer is not None:
        factor = tl.load(pointer + batch * stride_batch + token * stride_token, mask=wanted, other=0.0)
    return factor


@triton.jit
def dot(a, b, accumulator, WIDEN: tl.constexpr):
    """``a @ b + accumulator`` in float32, never as tf32.

    ``WIDEN`` casts 16-bit operands up first, which changes nothing but speed; the interpreter needs it, whose
    bfloat16 product is wrong.
    """
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")
