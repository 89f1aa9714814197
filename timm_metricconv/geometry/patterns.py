"""Patterns, the points p = r·û that a unit ball bends: one function and one row of `PATTERNS` each.

A function takes the kernel size k and the dilation, and returns unit directions `[D, 2]` and radii `[R, D]` in float64
on the CPU (under `torch.device("meta")` too), with K = R·D = k². Point j = ρ·D + n is `radii[ρ, n] · directions[n]`,
as (x, y) in pixels: a metric is read D times, not K times.
"""

import math
from typing import Tuple

import torch
from torch import Tensor


def _polar_form(points: Tensor) -> Tuple[Tensor, Tensor]:
    radii = torch.linalg.vector_norm(points, dim=-1)
    # any direction serves for a point at the origin, which no metric moves
    directions = torch.where(radii[:, None] > 0, points / radii[:, None], points.new_tensor([1.0, 0.0]))
    return directions, radii[None]


def lattice(kernel_size: int, dilation: Tuple[int, int] = (1, 1)) -> Tuple[Tensor, Tensor]:
    """The grid of a standard convolution, row-major. `dilation` is (vertical, horizontal), as everywhere in torch."""
    axis = torch.arange(kernel_size, dtype=torch.float64, device="cpu") - (kernel_size - 1) / 2
    y, x = torch.meshgrid(dilation[0] * axis, dilation[1] * axis, indexing="ij")
    return _polar_form(torch.stack((x.flatten(), y.flatten()), -1))


def onion(kernel_size: int, dilation: Tuple[int, int] = (1, 1)) -> Tuple[Tensor, Tensor]:
    """The centre, then rings of 8m points with radius m / ((k−1)/2). Odd k; ignores dilation."""
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size}: the pattern 'onion' needs an odd kernel, 'lattice' takes any.")
    rings = (kernel_size - 1) // 2
    points = [(0.0, 0.0)]
    for m in range(1, rings + 1):
        angles = [2 * math.pi * n / (8 * m) for n in range(8 * m)]
        points += [(m / rings * math.cos(angle), m / rings * math.sin(angle)) for angle in angles]
    return _polar_form(torch.tensor(points, dtype=torch.float64, device="cpu"))


def polar(kernel_size: int, dilation: Tuple[int, int] = (1, 1)) -> Tuple[Tensor, Tensor]:
    """k angles and k radii (i + 1) / k, the radius is the slow index. Ignores dilation."""
    steps = torch.arange(kernel_size, dtype=torch.float64, device="cpu")
    angles = 2 * math.pi * steps / kernel_size
    radii = ((steps + 1) / kernel_size)[:, None].expand(kernel_size, kernel_size)
    return torch.stack((angles.cos(), angles.sin()), -1), radii.contiguous()


PATTERNS = {"lattice": lattice, "onion": onion, "polar": polar}
