"""Zermelo's navigation: a Randers metric as a Riemannian metric h and a wind W, and its unit ball sampled by them.

With a frame B of h (BBᵀ = h⁻¹) and the wind W = B·w, ‖w‖ = ‖W‖_h < 1, the unit ball is {B(d + w) : ‖d‖ ≤ 1}: the disk,
bent by B and carried by W. A sample y = B(p + ρw) is affine in six fields, and every sample moves, the centre too,
where one on a ray (`rays.py`) slides along it. With λ = 1 − ‖w‖² = 1 − ‖v‖² and the whitened form (A, v) of
`metrics.py` the same ball is

    B = A⁻¹(I − vvᵀ)^{-1/2}/√λ up to a rotation on the right, w = −v;      M = h/λ + (hW)(hW)ᵀ/λ², ω = −hW/λ.

Source: Bao, Robles, Shen, Zermelo navigation on Riemannian manifolds (2004); sampling by it is ours.
"""

from typing import NamedTuple, Tuple

import torch
from torch import Tensor

from .metrics import Metric, Root, square_root, whitened_drift

# Where a drift of the paper's leaves the law there is no ball: λ is kept at this. `whitened` has λ ≥ 2e-4.
LEAST_MARGIN = 1e-4


class Frame(NamedTuple):
    """B = [[xx, xy], [yx, yy]] with det B > 0, in pixels, every component of the same shape `[...]`."""

    xx: Tensor
    xy: Tensor
    yx: Tensor
    yy: Tensor


class Navigation(NamedTuple):
    """A frame B in pixels and a wind in it, W = B·w with ‖w‖ < 1, every component of the same shape `[...]`.

    Attributes:
        xx: B₀₀; then B₀₁, B₁₀ and B₁₁.
        xy: See above.
        yx: See above.
        yy: See above.
        x: w_x.
        y: w_y.
    """

    xx: Tensor
    xy: Tensor
    yx: Tensor
    yy: Tensor
    x: Tensor
    y: Tensor


def frame_root(b: Frame) -> Root:
    """The symmetric root of h = (BBᵀ)⁻¹, the Riemannian metric whose unit ball is B's ellipse."""
    inverse = 1 / (b.xx * b.yy - b.xy * b.yx)
    xx, xy, yx, yy = b.xx * inverse, b.xy * inverse, b.yx * inverse, b.yy * inverse
    return square_root(yy * yy + yx * yx, -(yy * xy + yx * xx), xx * xx + xy * xy, inverse)


def navigation_of(metric: Metric, least: float = LEAST_MARGIN) -> Navigation:
    """The frame and the wind of a Randers metric with ‖v‖ < 1: B = A⁻¹(I + c·vvᵀ)/√λ, c = 1/(√λ + λ), and w = −v."""
    a, b, d, x, y = metric
    margin = (1 - x * x - y * y).clamp(min=least)
    root = margin.sqrt()
    c = 1 / (root + margin)
    size = 1 / (root * (a * d - b * b))
    # A⁻¹ times √λ·size, and then the symmetric I + c·vvᵀ
    xx, xy, yy = 1 + c * x * x, c * x * y, 1 + c * y * y
    return Navigation(
        size * (d * xx - b * xy), size * (d * xy - b * yy), size * (a * xy - b * xx), size * (a * yy - b * xy), -x, -y
    )


def randers_of(navigated: Navigation) -> Metric:
    """The metric in whitened form whose unit ball is {B(d + w) : ‖d‖ ≤ 1}: M = h/λ + (hW)(hW)ᵀ/λ², ω = −hW/λ."""
    xx, xy, yx, yy, x, y = navigated
    inverse, margin = 1 / (xx * yy - xy * yx), 1 - x * x - y * y
    # the rows of B⁻ᵀ, hW = B⁻ᵀw, and h = B⁻ᵀB⁻¹
    u0, u1, v0, v1 = yy * inverse, -yx * inverse, -xy * inverse, xx * inverse
    omega_x, omega_y = -(u0 * x + u1 * y) / margin, -(v0 * x + v1 * y) / margin
    root = square_root(
        (u0 * u0 + u1 * u1) / margin + omega_x * omega_x,
        (u0 * v0 + u1 * v1) / margin + omega_x * omega_y,
        (v0 * v0 + v1 * v1) / margin + omega_y * omega_y,
        inverse / (margin * margin.sqrt()),
    )
    x, y = whitened_drift(root, omega_x, omega_y)
    return Metric(root.a, root.b, root.d, x, y)


def affine_fields(navigated: Navigation, wind_step: Tuple[float, float]) -> Tensor:
    """The fields (L₀₀, L₀₁, L₁₀, L₁₁, t_x, t_y) of y = L·p + t: L = B and t = B(ρ ∘ w).

    Args:
        navigated: Components `[...]`.
        wind_step: ρ along x and along y, in the units of the pattern: the lattice's step, or 1 for a unit disk.

    Returns:
        `[..., 6]`.
    """
    xx, xy, yx, yy, x, y = navigated
    x, y = wind_step[0] * x, wind_step[1] * y
    return torch.stack((xx, xy, yx, yy, torch.addcmul(xx * x, xy, y), torch.addcmul(yx * x, yy, y)), -1)
