"""Random numbers of a batch of images, those of each image made of (seed, index, number of the draw) alone.

SplitMix64 (Steele et al. 2014, OOPSLA '14), its state a mix of seed and index: the sum of a counter, mixed. It is
integer arithmetic that wraps alike everywhere, so the uniforms of a whole batch come out the same, bit for bit, on any
device, in any process, and whatever was drawn before.
"""

import math

import torch
from torch import Tensor

_STEP = 0x9E3779B97F4A7C15 - 2**64  # as torch's int64 has it
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)  # torch's own would fill in the sign


def _mixed(x: Tensor) -> Tensor:
    for shift, factor in _ROUNDS:
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


class ImageDraws:
    """What is drawn for the images of a batch, each call the next draws of every image.

    Args:
        seed: Of the pass through the images, 0 to 2^63 - 1.
        indices: Of the images in their data set, int64, on the CPU.
    """

    def __init__(self, seed: int, indices: Tensor):
        self._states = _mixed(_mixed(torch.tensor(seed) + _STEP) ^ (indices * _STEP))
        self._drawn = 0

    def uniforms(self, count: int) -> Tensor:
        """Uniform in [0, 1), multiples of 2^-53: float64, (images, count), on the CPU."""
        return _shifted(self._integers(count, self._states), 11).double() * 2.0**-53

    def normals(self, count: int, device: torch.device) -> Tensor:
        """Standard normal (Box and Muller 1958): float32, (images, count)."""
        raw = self._integers(count, moved(self._states, device))
        length = (-2 * ((_shifted(raw, 32) + 1).float() * 2.0**-32).log()).sqrt()
        return length * ((raw & 0xFFFFFFFF).float() * (math.tau * 2.0**-32)).cos()

    def _integers(self, count: int, states: Tensor) -> Tensor:
        numbers = torch.arange(self._drawn + 1, self._drawn + count + 1, device=states.device)
        self._drawn += count
        return _mixed(states[:, None] + numbers * _STEP)


def moved(values: Tensor, device: torch.device) -> Tensor:
    """The values on a device; neither it nor this process waits for the other."""
    if values.device.type == "cpu" and device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
