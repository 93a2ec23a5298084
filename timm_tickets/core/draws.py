"""Random weights, scores and freezing patterns that come out the same, bit for bit, on every platform and release.

A ticket regenerates them from a seed, so nothing here may depend on a library's default. The source is the raw 64-bit
integers of Philox4x64-10 (Salmon et al. 2011, SC '11), whose stream numpy guarantees for ``Philox.random_raw``; its
distributions it does not, so they are made here. Blocks of four integers have the counters 1, 2, 3 and so on; the
128-bit key of a stream is::

    low 64 bits:  seed
    high 64 bits: 256 * layer + purpose      (purpose: 0 weights, 1 scores, 2 freezing)

where layer is the position of the weight among the prunable ones, from 0. What follows from an integer uses only
exact integer steps and + - * / sqrt of IEEE double precision, one numpy call each (so that nothing is fused), and ends
in one rounding to float32:

- sign: bit ``i % 64`` of integer ``i // 64``, least significant first; 1 is +;
- uniform on (-1, 1): with t the top 24 bits, ``(2 t + 1 - 2^24) / 2^24``, exact;
- normal: the quantile at ``(2 t + 1) / 2^53``, t the top 52 bits, by algorithm AS 241 (Wichura 1988, Applied Statistics
  37:477) with a logarithm made of the same steps;
- subset: the weights with the lowest integers, equal ones in memory order.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["signed_constant", "kaiming_uniform", "kaiming_normal"]
Array = NDArray[np.float64]

WEIGHTS, SCORES, FREEZING = 0, 1, 2
MAX_SEED = 2**64 - 1
_CHUNK = 1 << 15  # the work arrays of a chunk stay in cache, and memory stays bounded


def stream(seed: int, layer: int, purpose: int) -> np.random.Philox:
    """The raw integer stream of a purpose in a layer.

    Args:
        seed: 0 to 2^64 - 1.
        layer: Position of the weight among the prunable ones, 0 to 2^55 - 1.
        purpose: `WEIGHTS`, `SCORES` or `FREEZING`; 0 to 255.

    Raises:
        ValueError: A number outside its range.
    """
    for name, value, top in (("seed", seed, MAX_SEED), ("layer", layer, 2**55 - 1), ("purpose", purpose, 255)):
        if not 0 <= value <= top:
            raise ValueError(f"{name}: {value} is not valid; it is an integer from 0 to {top}")
    return np.random.Philox(key=np.array([seed, 256 * layer + purpose], dtype=np.uint64))


def draw(kind: Kind, shape: Sequence[int], seed: int, layer: int, purpose: int = WEIGHTS) -> NDArray[np.float32]:
    """Random weights of Kaiming's scale, standard deviation ``sqrt(2 / fan_in)``, float32.

    Args:
        kind: ``signed_constant``, ``kaiming_uniform`` or ``kaiming_normal``.
        shape: Shape of the weight; fan_in is the product of all dimensions but the first.
        seed: 0 to 2^64 - 1.
        layer: Position of the weight among the prunable ones.
        purpose: Which stream.

    Source: He et al. 2015, 1502.01852, section 2.2; signed constants: Ramanujan et al. 2020, 1911.13299, section 3.2.
    """
    source = stream(seed, layer, purpose)
    count, fan_in = math.prod(shape), math.prod(shape[1:])
    if kind == "signed_constant":
        constant = np.float32(math.sqrt(2 / fan_in))
        values = np.where(signs(source, count), constant, -constant)
    else:
        uniform = kind == "kaiming_uniform"
        scale = math.sqrt((6 if uniform else 2) / fan_in)
        values = np.empty(count, dtype=np.float32)
        for start in range(0, count, _CHUNK):
            part = values[start : start + _CHUNK]
            part[:] = (uniforms if uniform else normals)(source, len(part)) * scale
    return values.reshape(shape)


def signs(source: np.random.Philox, count: int) -> NDArray[np.bool_]:
    """Fair coins, True for +, one bit of the stream each."""
    raw = np.asarray(source.random_raw(-(-count // 64)), dtype="<u8")
    return np.unpackbits(raw.view(np.uint8), count=count, bitorder="little").view(np.bool_)


def uniforms(source: np.random.Philox, count: int) -> Array:
    """Uniform on (-1, 1): odd multiples of 2^-24, symmetric, never 0; float64, exact in float32 too."""
    top = np.asarray(source.random_raw(count) >> np.uint64(40), dtype=np.float64)
    return (top * 2 + (1 - 2**24)) * 2.0**-24


def normals(source: np.random.Philox, count: int) -> Array:
    """Standard normal, float64, from -8.2 to 8.2."""
    top = np.asarray(source.random_raw(count) >> np.uint64(12), dtype=np.float64)
    return normal_quantile((top * 2 + (1 - 2**52)) * 2.0**-53)


def frozen(size: int, pruned: int, locked: int, seed: int, layer: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which weights of a layer leave the search: a random subset as pruned, another as kept.

    In the order of their integers the first ``pruned`` are pruned and the next ``locked`` kept.

    Args:
        size: Weights in the layer.
        pruned: How many leave as pruned.
        locked: How many leave as kept; together with ``pruned`` at most ``size``.
        seed: 0 to 2^64 - 1.
        layer: Position of the weight among the prunable ones.

    Returns:
        Two bool arrays of length ``size``.
    """
    keys = stream(seed, layer, FREEZING).random_raw(size)
    gone = lowest(keys, pruned)
    return gone, lowest(keys, pruned + locked) & ~gone


def lowest(keys: NDArray[np.uint64], count: int) -> NDArray[np.bool_]:
    """Mask of the ``count`` lowest keys; among equal ones the earlier, as in a stable sort.

    >>> lowest(np.array([5, 1, 3, 3, 3], dtype=np.uint64), 3).tolist()
    [False, True, True, True, False]
    """
    if count == 0:
        return np.zeros(len(keys), dtype=np.bool_)
    threshold = np.partition(keys, count - 1)[count - 1]
    mask = keys < threshold
    mask[np.flatnonzero(keys == threshold)[: count - int(mask.sum())]] = True
    return mask


# Coefficients of AS 241's routine PPND16, highest power first: numerator, denominator.
_CENTRE = (
    (
        *(2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4),
        *(1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    ),
    (
        *(5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4),
        *(5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
    ),
)
_MIDDLE = (
    (
        *(7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0),
        *(3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    ),
    (
        *(1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1),
        *(6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0),
    ),
)
_TAIL = (
    (
        *(2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2),
        *(2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0),
    ),
    (
        *(2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4),
        *(1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0),
    ),
)


def normal_quantile(centred: Array) -> Array:
    """The standard normal's quantile at ``1/2 + centred``: AS 241, routine PPND16, relative error about 1e-16.

    Args:
        centred: Float64, in (-1/2, 1/2).
    """
    out = centred * _rational(_CENTRE, 0.180625 - centred * centred)
    outer = np.flatnonzero(np.abs(centred) > 0.425)
    q = centred[outer]
    r = np.sqrt(-_log(0.5 - np.abs(q)))  # the subtraction is exact for the multiples of 2^-53 drawn here
    tail = _rational(_MIDDLE, r - 1.6)
    far = np.flatnonzero(r > 5)
    tail[far] = _rational(_TAIL, r[far] - 5)
    out[outer] = np.where(q < 0, -tail, tail)
    return out


def _rational(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Array) -> Array:
    above, below = (_polynomial(part, x) for part in coefficients)
    return above / below


def _polynomial(coefficients: Sequence[float], x: Array) -> Array:
    """Horner's rule, each product and sum rounded by itself: a ufunc call does one operation."""
    out = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        np.multiply(out, x, out=out)
        np.add(out, coefficient, out=out)
    return out


_LN2 = 0.6931471805599453
_ATANH = tuple(1 / k for k in range(23, 0, -2))  # 1/23, 1/21 ... 1: the series of atanh(s) / s in s^2


def _log(x: Array) -> Array:
    """Natural logarithm of positive x: libm's differs between platforms in the last bit.

    ``x = m 2^e`` with m in [1/2, 1), doubled below sqrt(1/2); then ``log m = 2 atanh((m - 1) / (m + 1))``.
    """
    m, e = np.frexp(x)
    small = m < 0.7071067811865476
    m = np.where(small, m * 2, m)
    e = (e - small).astype(np.float64)
    s = (m - 1) / (m + 1)
    return e * _LN2 + s * _polynomial(_ATANH, s * s) * 2
