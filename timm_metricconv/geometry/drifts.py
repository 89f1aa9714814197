"""From two raw channels to a drift ω with ‖ω‖_{M⁻¹} < 1: one function and one row of `DRIFTS` each.

A function takes the raw drift `[..., 2]`, the metric and ε_ω, and returns ω `[..., 2]`. All but `whitened` are the
paper's.
"""

import torch
from torch import Tensor

from .metrics import Metric, square_root

EPS = 1e-6


def _regularised_norm(raw: Tensor, metric: Metric, eps: float = EPS) -> Tensor:
    """n = sqrt(ωᵀ(M + εI)⁻¹ω + ε), the determinant of the 2×2 inverse +ε, written as a sum of squares."""
    a, b, d, s = metric
    x, y = raw[..., 0], raw[..., 1]
    determinant = s * s + eps * (a + d) + eps * eps
    a = a + eps
    share = determinant / (determinant + eps)
    return ((a * y - b * x).square() / (a * (determinant + eps)) + x * x * share / a + eps).sqrt()


def sigmoid_norm(raw: Tensor, metric: Metric, eps_omega: float, eps: float = EPS) -> Tensor:
    """ω·(2σ(n) − 1)(1 − ε_ω) / (n + ε)."""
    n = _regularised_norm(raw, metric)
    return raw * ((2 * n.sigmoid() - 1) * (1 - eps_omega) / (n + eps))[..., None]


def sigmoid_norm_detach(raw: Tensor, metric: Metric, eps_omega: float, eps: float = EPS) -> Tensor:
    """As `sigmoid_norm`, the factor detached from the graph."""
    n = _regularised_norm(raw, metric).detach()
    return raw * ((2 * n.sigmoid() - 1) * (1 - eps_omega) / (n + eps))[..., None]


def norm_clip_detach(raw: Tensor, metric: Metric, eps_omega: float, eps: float = EPS) -> Tensor:
    """ω·min(n, 1 − ε_ω) / (n + ε), the factor detached."""
    n = _regularised_norm(raw, metric).detach()
    return raw * (n.clamp(max=1 - eps_omega) / (n + eps))[..., None]


def whitened(raw: Tensor, metric: Metric, eps_omega: float) -> Tensor:
    """M^{1/2}·v·(1 − ε_ω) / sqrt(1 + ‖v‖²): ‖ω‖_{M⁻¹} < 1 − ε_ω by algebra."""
    a, b, d = square_root(metric)
    x, y = raw[..., 0], raw[..., 1]
    size = (1 - eps_omega) * (1 + x * x + y * y).rsqrt()
    return torch.stack(((a * x + b * y) * size, (b * x + d * y) * size), -1)


DRIFTS = {
    "whitened": whitened,
    "sigmoid_norm": sigmoid_norm,
    "sigmoid_norm_detach": sigmoid_norm_detach,
    "norm_clip_detach": norm_clip_detach,
}
