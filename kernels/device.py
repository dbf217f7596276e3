"""Numeric primitives that every kernel shares.

Each has three forms, chosen when the kernel is compiled:

- FAST, for 16-bit logits: the approximate special-function units, where the result stays far inside one rounding of
  the gradient (relative error below 1e-4; bf16 rounds at 4e-3, fp16 at 5e-4);
- fp32: within 2e-6 relative for arguments to 20, 1e-5 to 80. The exponential keeps what the product with log2(e) would
  round away, and the logarithm is a polynomial, since the hardware's is only absolutely accurate near 1;
- fp64: the library functions.

No form needs CUDA's libdevice, so all of them run in Triton's interpreter and compile for every target.
"""

import torch
import triton
import triton.language as tl

# The interpreter cuts fp32 off to bf16 and takes 0 to 1e-38; load_as and store_rounded do what the hardware does.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# tl.exp2 is one instruction already on every target; tl.log2 is a call of twenty on NVIDIA's.
USE_PTX = tl.constexpr(
    not INTERPRETED.value and torch.version.hip is None and getattr(torch.version, "xpu", None) is None
)

# Threads of a warp, of which a block of threads has at most 1024.
LANES = 64 if torch.version.hip else 32

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
LARGE = tl.constexpr(1e30)  # finite stand-in for infinity: 0 * LARGE is 0
LARGEST = tl.constexpr(3.4028234663852886e38)  # of fp32
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)  # the smallest normal number
NAN_STAYS = tl.constexpr(tl.PropagateNan.ALL)
TO_12_BITS = tl.constexpr(2.0**41 + 1.0)  # t = 53 - 12 bits in Veltkamp's splitting of a double


@triton.jit
def _log2_approx(x):
    """log2(x) within 2^-22: relative above 2, absolute near 1."""
    if USE_PTX:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def load_as(pointer, mask, other, COMPUTE: tl.constexpr):
    """Load and widen to the dtype of the computation."""
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        bits = tl.load(pointer.to(tl.pointer_type(tl.uint16), bitcast=True), mask)
        x = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        return (x if other is None else tl.where(mask, x, other)).to(COMPUTE)
    else:
        return tl.load(pointer, mask, other).to(COMPUTE)


@triton.jit
def store_rounded(pointer, x, mask):
    """Store, rounded to the nearest value of the pointer's dtype."""
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        half = tl.where(x == x, nearest, bits) >> 16
        tl.store(pointer.to(tl.pointer_type(tl.uint16), bitcast=True), half.to(tl.uint16), mask)
    else:
        tl.store(pointer, x.to(pointer.dtype.element_ty), mask)


@triton.jit
def exp_scaled(x, SCALE: tl.constexpr, FAST: tl.constexpr):
    """exp(SCALE * x) for SCALE * x <= 0."""
    if x.dtype == tl.float64:
        return tl.exp(x * SCALE)
    elif FAST:
        return tl.exp2(x * (SCALE * LOG2E))
    else:
        # 2^t with t = c * x in fp32 is off by t * 2^-24, 5e-6 at 80: recover the rounding error of the product.
        C: tl.constexpr = SCALE * LOG2E
        C_HEAD: tl.constexpr = C * TO_12_BITS - (C * TO_12_BITS - C)
        x = tl.clamp(x, -LARGE, LARGE, propagate_nan=NAN_STAYS)
        x_head = (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
        rounded = x * C
        lost = (x_head * C_HEAD - rounded) + (x - x_head) * C_HEAD + x * (C - C_HEAD)
        power = tl.exp2(rounded)
        return power + power * (lost * LN2)


@triton.jit
def two_sum(a, b):
    """a + b rounded, and what the rounding lost (D. Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@triton.jit
def exp_difference(x, top, SCALE: tl.constexpr, FAST: tl.constexpr):
    """exp(SCALE (x - top)) for x <= top; where the rounding of the difference would show, it is made up for."""
    if FAST or x.dtype == tl.float64:
        return exp_scaled(x - top, SCALE, FAST)
    else:
        distance, lost = two_sum(x, -top)
        e = exp_scaled(distance, SCALE, False)
        return e + tl.where(e == 0, 0.0, e * (lost * SCALE))  # of an infinity, what is lost is NaN


@triton.jit
def tanh(x):
    """tanh(x) and its derivative, both relatively accurate: the one to the smallest x, the other to the largest."""
    e = exp_scaled(-tl.abs(x), 2.0, False)
    inverse = 1.0 / (1.0 + e)
    if x.dtype == tl.float64:
        # 1 - e, of which the rounding of e takes most where it is near 1 (W. Kahan's expm1)
        log = tl.log(e)
        small = e > 0.5
        rest = tl.where(small & (e != 1), (1.0 - e) * (-2.0 * tl.abs(x)) / tl.where(e == 1, 1.0, log), 1.0 - e)
        ratio = tl.where(e == 1, tl.abs(x), rest * inverse)
    else:
        # Minimax polynomial of tanh(x) / x in x^2: 4e-8 relative up to |x| = 0.55.
        square = x * x
        r = 0.016202563 * square - 0.052528664
        r = r * square + 0.13317879
        r = r * square - 0.33332744
        series = tl.abs(x) * (r * square + 0.99999994)
        ratio = tl.where(tl.abs(x) < 0.55, series, (1.0 - e) * inverse)
    return tl.where(x < 0, -ratio, ratio), 4.0 * e * inverse * inverse


@triton.jit
def _log1p_exponential(e):
    """log(1 + e) for e in [0, 1], relatively accurate to the smallest e."""
    if e.dtype == tl.float64:
        one_plus = 1.0 + e
        kept = one_plus - 1.0  # what the addition kept of e; the quotient makes up for what it lost (W. Kahan)
        return tl.where(kept == 0.0, e, tl.log(one_plus) * (e / tl.where(kept == 0.0, 1.0, kept)))
    else:
        # Minimax polynomial of log1p(e) / e: 3e-8 relative, 1.7e-7 with fp32 rounding.
        r = 0.0052326926 * e - 0.02950524
        r = r * e + 0.07822596
        r = r * e - 0.13663247
        r = r * e + 0.19106008
        r = r * e - 0.24842982
        r = r * e + 0.33319098
        r = r * e - 0.49999493
        return (r * e + 0.99999994) * e


@triton.jit
def sigmoids(v, FAST: tl.constexpr):
    """p = sigmoid(-v), q = sigmoid(v), and their negative logarithms: (p, q, -log p, -log q).

    With v = (1 - 2y)x, p is the probability of the true label and q that of the wrong one. q and -log p are relatively
    accurate to the end of the exponent range: they are the gradient and the loss of well-classified elements.
    """
    if FAST:
        neg_log2_q = _log2_approx(1.0 + tl.exp2(v * -LOG2E))
        neg_log_q = neg_log2_q * LN2
        q = tl.exp2(-neg_log2_q)
        p = 1.0 - q  # only absolutely accurate: wherever p is small, it is added to a q near 1
        # v + -log q cancels where q is small; from q = 2^-5 on, three terms of -log(1 - q) are exact to 1e-5.
        series = q + q * q * (0.5 + 0.3333333 * q)
        return p, q, tl.where(q < 0.03125, series, v + neg_log_q), neg_log_q
    else:
        e = exp_scaled(-tl.abs(v), 1.0, False)
        larger = 1.0 / (1.0 + e)
        smaller = e * larger
        log1p_e = _log1p_exponential(e)
        wrong = v > 0
        q = tl.where(wrong, larger, smaller)
        p = tl.where(wrong, smaller, larger)
        return p, q, tl.where(wrong, v, 0.0) + log1p_e, log1p_e - tl.where(wrong, 0.0, v)


@triton.jit
def neg_log(x, FAST: tl.constexpr):
    """-log x for x in [0, 1], absolutely accurate near 1."""
    if FAST:
        return _log2_approx(x) * -LN2
    else:
        return -tl.log(x)


@triton.jit
def neg_log1p(r, one_minus_r, FAST: tl.constexpr):
    """-log(1 - r) for r in [0, 1), relatively accurate to the smallest r, and 1 / (1 - r)."""
    if FAST:
        log2 = _log2_approx(one_minus_r)
        return tl.where(r < 0.03125, r + r * r * (0.5 + 0.3333333 * r), log2 * -LN2), tl.exp2(-log2)
    else:
        # log(1 + e) with e = r / (1 - r), where that is at most 1
        inverse = 1.0 / one_minus_r
        small = r <= 0.5
        series = _log1p_exponential(tl.where(small, r * inverse, 0.0))
        return tl.where(small, series, -tl.log(one_minus_r)), inverse


@triton.jit
def select(condition, when_true, when_false):
    """tl.where whose condition may be None, for what is nowhere true."""
    if condition is None:
        return when_false
    else:
        return tl.where(condition, when_true, when_false)


@triton.jit
def power(base, neg_log_base, EXPONENT: tl.constexpr, FAST: tl.constexpr):
    """base^EXPONENT for base in [0, 1], by products for small integers."""
    if EXPONENT == 0:
        return 1.0
    elif EXPONENT == 1:
        return base
    elif EXPONENT == 2:
        return base * base
    elif EXPONENT == 3:
        return base * base * base
    elif EXPONENT == 4:
        return (base * base) * (base * base)
    else:
        return exp_scaled(neg_log_base, -EXPONENT, FAST)
