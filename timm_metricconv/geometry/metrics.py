"""Randers metrics of the plane, F(u) = sqrt(uᵀMu) + ωᵀu, as plain tensors.

A `Metric` is the tuple (a, b, d, s): M = [[a, b], [b, d]] and s = sqrt(det M). A parametrization knows s exactly, as a
product of positive factors, where a·d − b² would cancel in float32. Every component has the same shape `[...]`, so that
a field of metrics is four dense images. Source: Dagès, Lindenbaum, Bruckstein, Metric Convolutions (ICCV 2025).
"""

import math
from typing import Tuple

import torch
from torch import Tensor

Metric = Tuple[Tensor, Tensor, Tensor, Tensor]

# float32 cannot hold a metric whose condition number is far above this one: its determinant is lost to rounding.
MAX_CONDITION = 1e5


def conditioned(metric: Metric, max_condition: float = MAX_CONDITION) -> Metric:
    """Adds a multiple of the identity that keeps M positive definite in float32, none where M is well conditioned."""
    a, b, d, s = metric
    trace = a + d
    # det / trace bounds the smaller eigenvalue from below
    lift = (trace / max_condition - s * s / trace).clamp(min=0)
    return a + lift, b, d + lift, (s * s + lift * trace + lift * lift).sqrt()


def drift_norm(omega: Tensor, metric: Metric) -> Tensor:
    """‖ω‖_{M⁻¹} as a sum of two squares, which no rounding turns negative. `omega`: `[..., 2]`."""
    a, b, _, s = metric
    x, y = omega[..., 0], omega[..., 1]
    # the tiny constant keeps the derivative finite at zero
    return (((a * y - b * x) / s).square() / a + x * x / a + 1e-12).sqrt()


def square_root(metric: Metric) -> Tuple[Tensor, Tensor, Tensor]:
    """The symmetric root of M in closed form, (M + sI) / sqrt(tr M + 2s), as its entries (a, b, d)."""
    a, b, d, s = metric
    scale = (a + d + 2 * s).rsqrt()
    return (a + s) * scale, b * scale, (d + s) * scale


def randers(directions: Tensor, metric: Metric, omega: Tensor, eps_omega: float, bounded: bool = False) -> Tensor:
    """F of unit vectors.

    Args:
        directions: Unit vectors û, `[D, 2]`.
        metric: Components of shape `[...]`.
        omega: Drift `[..., 2]` with ‖ω‖_{M⁻¹} ≤ 1 − `eps_omega`; not read where `eps_omega` is 1 (Riemannian).
        eps_omega: The margin ε_ω of the drift.
        bounded: The condition number of M is known to be small, so nothing can cancel.

    Returns:
        F(û), `[..., D]`, positive.
    """
    a, b, d, s = metric
    ux, uy = directions[:, 0], directions[:, 1]
    square = torch.addcmul(a[..., None] * (ux * ux), b[..., None], 2 * ux * uy)
    square = torch.addcmul(square, d[..., None], uy * uy)
    if not bounded:
        # Mathematically idle: det / trace is below the smallest eigenvalue.
        square = torch.maximum(square, (s * s / (a + d))[..., None])
    riemannian = square.sqrt()
    if eps_omega == 1.0:
        return riemannian
    value = torch.addcmul(torch.addcmul(riemannian, omega[..., 0:1], ux), omega[..., 1:2], uy)
    # Idle as well: F ≥ (1 − ‖ω‖)·sqrt(ûᵀMû)
    return value if bounded else torch.maximum(value, riemannian * (0.5 * eps_omega))


def zermelo_ellipse(metric: Metric, omega: Tensor) -> Tuple[Metric, Tensor]:
    """The unit ball of a Randers metric as a shifted ellipse.

    With λ = 1 − ‖ω‖²_{M⁻¹}, the ball {F ≤ 1} is {(u − c)ᵀ A (u − c) ≤ 1}, A = λ(M − ωωᵀ), c = −M⁻¹ω / λ: Zermelo's
    navigation data (Bao, Robles, Shen, Zermelo navigation on Riemannian manifolds, 2004).

    Args:
        metric: Components `[...]`.
        omega: `[..., 2]`.

    Returns:
        The metric A (components `[...]`) and the centre c, `[..., 2]`.
    """
    a, b, d, s = metric
    x, y = omega[..., 0], omega[..., 1]
    det = s * s
    margin = 1 - (d * x * x - 2 * b * x * y + a * y * y) / det
    ellipse = margin * (a - x * x), margin * (b - x * y), margin * (d - y * y), margin.pow(1.5) * s
    centre = torch.stack((-(d * x - b * y), -(a * y - b * x)), -1) / (det * margin)[..., None]
    return ellipse, centre


def max_stretch(bound: float, eps_omega: float) -> float:
    """The longest unit vector of a metric with eigenvalues above exp(−2·bound) and drift margin `eps_omega`."""
    return math.exp(bound) / eps_omega
