"""What tickets regenerate from seeds: known answers, so that a change of platform or library cannot go unnoticed."""

import hashlib
import math

import numpy as np
import pytest
import torch

from timm_tickets.core import draws

MASK = 2**64 - 1


def philox(seed, layer, purpose, count):
    """Philox4x64-10 from its definition, in Python's integers: ten rounds of two wide products."""
    out = []
    for block in range(1, -(-count // 4) + 1):
        c, k0, k1 = [block, 0, 0, 0], seed, 256 * layer + purpose
        for _ in range(10):
            one, two = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [two >> 64 ^ c[1] ^ k0, two & MASK, one >> 64 ^ c[3] ^ k1, one & MASK]
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
        out += c
    return out[:count]


def sha(*arrays):
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def hexadecimal(array):
    return [float(value).hex() for value in array.flatten()]


@pytest.mark.parametrize(
    ("key", "integers"),
    [
        ((0, 0, 0), (0x02F4BA6408E4D89B, 0x3DD62B0B9CA8C5B2, 0x1C8667A55D902E79, 0x907D7A052FD5B4DC)),
        ((7, 2, 1), (0x9D6FD231788C6641, 0x90C5416FCE70430A, 0xDC152C6C7E00EDC3, 0xCE07CED300BD6008)),
        ((2**64 - 1, 3, 2), (0xEF0E2FF927FB5AAB, 0x8153911088AEA381, 0x4F65365BC8E7C14B, 0x79E8BD8B9151CB29)),
    ],
)
def test_raw_integers(key, integers):
    assert draws.stream(*key).random_raw(4).tolist() == list(integers) == philox(*key, 4)
    assert draws.stream(*key).random_raw(50).tolist() == philox(*key, 50)


def test_every_seed_layer_and_purpose_has_its_own_stream():
    keys = [(s, layer, purpose) for s in (0, 1, 2**40) for layer in (0, 1, 300) for purpose in (0, 1, 2)]
    assert len({draws.stream(*key).random_raw() for key in keys}) == len(keys)


@pytest.mark.parametrize("key", [(-1, 0, 0), (2**64, 0, 0), (0, -1, 0), (0, 2**55, 0), (0, 0, 256)])
def test_numbers_outside_the_key_are_refused(key):
    with pytest.raises(ValueError, match="is not valid; it is an integer from 0 to"):
        draws.stream(*key)


def test_signs_by_hand():
    # The first integer of (7, 2, 0) begins, from the lowest bit: its bits are the signs of weights 0, 1, 2 ...
    first, second = philox(7, 2, 0, 2)
    signs = draws.signs(draws.stream(7, 2, 0), 70).tolist()
    assert signs == [bool(first >> i & 1) for i in range(64)] + [bool(second >> i & 1) for i in range(6)]


def test_uniforms_by_hand():
    # 0x9d6fd231788c6641: top 24 bits t = 0x9d6fd2; (2 t + 1 - 2^24) / 2^24.
    value = draws.uniforms(draws.stream(7, 2, 1), 1)[0]
    assert value == (2 * 0x9D6FD2 + 1 - 2**24) / 2**24
    many = draws.uniforms(draws.stream(3, 0, 0), 100_000)
    assert (many.astype(np.float32) == many).all()  # float32 holds them exactly
    assert abs(many.mean()) < 0.01
    assert many.std() == pytest.approx(1 / math.sqrt(3), rel=0.01)
    assert np.abs(many).max() < 1


@pytest.mark.parametrize(
    ("kind", "values", "large"),
    [
        (
            "signed_constant",  # sqrt(2 / 3) in float32
            [*["0x1.a20bd80000000p-1"] * 2, "-0x1.a20bd80000000p-1", "0x1.a20bd80000000p-1"]
            + ["-0x1.a20bd80000000p-1"] * 2,
            "3584c5ec15b41e7ff27933b09ab638956371b9e47f785129941f2a2975dab7ad",
        ),
        (
            "kaiming_uniform",
            [
                *("-0x1.1ca7ca0000000p+0", "0x1.a7b77a0000000p-1", "0x1.55a3fc0000000p+0"),
                *("-0x1.4d20520000000p+0", "-0x1.5179dc0000000p+0", "0x1.2ea1480000000p-1"),
            ],
            "00fc62035a06b3b45f50ceffa570de92268a313f8572206863d39e421ab424db",
        ),
        (
            "kaiming_normal",
            [
                *("-0x1.03e2f40000000p+0", "0x1.54e4a20000000p-1", "0x1.8ee52c0000000p+0"),
                *("-0x1.6e1a8e0000000p+0", "-0x1.7daed60000000p+0", "0x1.cc2eb40000000p-2"),
            ],
            "ce86077413e9a17d87de046650a094553b970a086f758b48a50142fa6c89589a",
        ),
    ],
)
def test_weights_are_known(kind, values, large):
    assert hexadecimal(draws.draw(kind, (2, 3), 7, 2)) == values
    weight = draws.draw(kind, (64, 64, 3, 3), 1, 5)  # more than a chunk
    assert weight.dtype == np.float32
    assert weight.shape == (64, 64, 3, 3)
    assert sha(weight.astype("<f4")) == large
    assert weight.std() == pytest.approx(math.sqrt(2 / 576), rel=0.01)


def test_normals_are_known_and_agree_with_an_independent_quantile():
    known = ["0x1.2b5bc15748514p-2", "0x1.51d35ef49eec2p-3", "0x1.1436f9df16452p+0"]
    known += ["0x1.b7c3df041c026p-1", "-0x1.187d2cd4b684cp-1", "0x1.8dacee2df343cp+0"]
    assert hexadecimal(draws.normals(draws.stream(7, 2, 1), 6)) == known
    quantile = np.concatenate([np.linspace(-0.5, 0.5, 10_001)[1:-1], [2.0**-53 - 0.5, 2.0**-40 - 0.5, 1e-7 - 0.5]])
    expected = torch.special.ndtri(torch.from_numpy(0.5 + quantile)).numpy()
    assert np.abs(draws.normal_quantile(quantile) - expected).max() < 1e-12
    assert (draws.normal_quantile(-quantile) == -draws.normal_quantile(quantile)).all()


def test_the_logarithm_is_libms_to_the_last_bits():
    x = np.array([2.0**-53, 1e-12, 0.05, 0.075, 0.3535, 0.3536, 0.5])
    assert np.abs(draws._log(x) / np.log(x) - 1).max() < 4e-16


def test_freezing_is_known_and_exact():
    pruned, locked = draws.frozen(12, 4, 3, 7, 2)
    assert np.flatnonzero(pruned).tolist() == [1, 3, 8, 11]
    assert np.flatnonzero(locked).tolist() == [5, 9, 10]
    order = np.argsort(draws.stream(7, 2, draws.FREEZING).random_raw(12), kind="stable")
    assert sorted(order[:4].tolist()) == [1, 3, 8, 11]
    assert sorted(order[4:7].tolist()) == [5, 9, 10]
    pruned, locked = draws.frozen(36864, 9000, 3000, 1, 5)
    assert (pruned.sum(), locked.sum(), (pruned & locked).sum()) == (9000, 3000, 0)
    known = "92eae582b12ead0934423caa723fcd62620af444538ff8ba8e80d98c232308cd"
    assert sha(np.packbits(pruned), np.packbits(locked)) == known


def test_nothing_and_everything_frozen():
    assert not any(part.any() for part in draws.frozen(5, 0, 0, 0, 0))
    pruned, locked = draws.frozen(5, 0, 5, 0, 0)
    assert not pruned.any()
    assert locked.all()
