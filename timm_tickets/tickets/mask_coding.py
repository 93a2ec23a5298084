"""Entropy coding of masks: all layers in one stream of 32-bit words, next to the bound of log2 C(n, k) bits a layer.

The coder is asymmetric numeral systems (Duda 2013, 1311.2540) as constriction (Bamler 2022, 2201.01741) has it: 64
bits of state, 32-bit words, probabilities in units of 2^-24. A layer of n weights of which k are kept is n independent
symbols whose probability of "kept" is ``f / 2^24``, f the nearest integer to ``2^24 k / n`` in [1, 2^24 - 1]. A layer
that keeps nothing or everything has no symbols.

This is pinned to integers. constriction takes weights w and gives symbol i the frequency ``w_i s + 1`` with
``s = (2^24 - number of symbols) / sum(w)``; the weights given are the wanted frequencies less 1, so that s is exactly 1
and every product and sum is of integers below 2^24, exact in any floating-point format that has 24 bits. The tests hold
it against the few lines of integer arithmetic that define the code, and against known words.

Coding loses at most ``log2(n + 1)`` bits a layer against log2 C(n, k) (the counts are known beforehand), up to 32 bits
once, and a part of about 2^-24 for the rounding of f.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.bool_]
Words = NDArray[np.uint32]

_stream: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue] - it has no type stubs
_PRECISION = 1 << 24
_CHUNK = 1 << 20  # a symbol takes 4 bytes while it is coded


def encode(masks: Sequence[Bits]) -> Words:
    """Code masks with known sizes and counts.

    Args:
        masks: A flat bool array a layer.

    Returns:
        Words, uint32; the same for the same masks, always.
    """
    coder = _stream.stack.AnsCoder()
    for mask in reversed(masks):  # a stack: what goes in last comes out first
        size, kept = len(mask), int(mask.sum())
        if 0 < kept < size:
            model = _model(_frequency(size, kept))
            for start in reversed(range(0, size, _CHUNK)):
                coder.encode_reverse(mask[start : start + _CHUNK].astype(np.int32), model)
    return coder.get_compressed()


def decode(words: Words, counts: Sequence[tuple[int, int]]) -> Iterator[Bits]:
    """The masks that were coded, one after the other; every mask has exactly its count.

    Args:
        words: What `encode` returned, or anything a stranger sent: time and memory depend on ``counts`` alone.
        counts: Size and number kept of each layer.

    Raises:
        ValueError: The words are not the code of masks with these counts; raised before a wrong mask is given out, or
            at the end where words are left over.
    """
    coder = _stream.stack.AnsCoder(np.ascontiguousarray(words, dtype=np.uint32))
    for size, kept in counts:
        mask = np.zeros(size, dtype=np.bool_)
        if 0 < kept < size:
            model = _model(_frequency(size, kept))
            for start in range(0, size, _CHUNK):
                part = mask[start : start + _CHUNK]
                part[:] = coder.decode(model, len(part))
        elif kept == size:
            mask[:] = True
        found = int(mask.sum())
        if found != kept:
            raise ValueError(f"the coded mask of a layer of {size} weights keeps {found}, not the {kept} it should")
        yield mask
    if not coder.is_empty():
        raise ValueError("the coded masks go on past the last layer")


def bound(size: int, kept: int) -> float:
    """``log2 C(size, kept)``: the bits that a mask with a known count needs, where every such mask is as likely.

    >>> round(bound(10, 3), 4)  # log2 120
    6.9069
    """
    log = math.lgamma(size + 1) - math.lgamma(kept + 1) - math.lgamma(size - kept + 1)
    return max(0.0, log / math.log(2))


def coded_bits(size: int, kept: int) -> float:
    """The bits that a layer adds to the stream."""
    if not 0 < kept < size:
        return 0.0
    frequency = _frequency(size, kept)
    return kept * math.log2(_PRECISION / frequency) + (size - kept) * math.log2(_PRECISION / (_PRECISION - frequency))


def _frequency(size: int, kept: int) -> int:
    """Of 2^24 parts those that say "kept": the nearest integer, halves up, neither none nor all."""
    return min(max((2 * _PRECISION * kept + size) // (2 * size), 1), _PRECISION - 1)


def _model(frequency: int) -> Any:
    weights = np.array([_PRECISION - frequency - 1, frequency - 1], dtype=np.float64)
    return _stream.model.Categorical(weights, lazy=False, perfect=False)
