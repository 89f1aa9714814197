"""Patterns, the points p = r·û that a unit ball bends: one function and one row of `PATTERNS` each.

A function takes the kernel size k and the dilation, and returns the points `[R, D, 2]` in pixels as (x, y), in float64
on the CPU (under `torch.device("meta")` too). K = R·D = k², and the R points of a column share their direction, so that
a metric is read D times, not K times.
"""

import math
from typing import Tuple

import torch
from torch import Tensor


def lattice(kernel_size: int, dilation: Tuple[int, int] = (1, 1)) -> Tensor:
    """The grid of a standard convolution, row-major. `dilation` is (vertical, horizontal), as everywhere in torch."""
    axis = torch.arange(kernel_size, dtype=torch.float64, device="cpu") - (kernel_size - 1) / 2
    y, x = torch.meshgrid(dilation[0] * axis, dilation[1] * axis, indexing="ij")
    return torch.stack((x.flatten(), y.flatten()), -1)[None]


def onion(kernel_size: int, dilation: Tuple[int, int] = (1, 1)) -> Tensor:
    """The centre, then rings of 8m points with radius m / ((k−1)/2). Odd k; ignores dilation."""
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size}: the pattern 'onion' needs an odd kernel, 'lattice' takes any.")
    rings = (kernel_size - 1) // 2
    points = [(0.0, 0.0)]
    for m in range(1, rings + 1):
        angles = [2 * math.pi * n / (8 * m) for n in range(8 * m)]
        points += [(m / rings * math.cos(angle), m / rings * math.sin(angle)) for angle in angles]
    return torch.tensor(points, dtype=torch.float64, device="cpu")[None]


def polar(kernel_size: int, dilation: Tuple[int, int] = (1, 1)) -> Tensor:
    """k angles and k radii (i + 1) / k, the radius is the slow index. Ignores dilation."""
    steps = torch.arange(kernel_size, dtype=torch.float64, device="cpu")
    angles = 2 * math.pi * steps / kernel_size
    return (steps[:, None, None] + 1) / kernel_size * torch.stack((angles.cos(), angles.sin()), -1)


PATTERNS = {"lattice": lattice, "onion": onion, "polar": polar}
