"""From two raw channels to a whitened drift v = A⁻¹ω: one function and one row of `DRIFTS` each.

A function takes the raw drift `[..., 2]`, the root A of the metric and ε_ω, and returns v as (x, y), each `[...]`. All
but `whitened` are the paper's: they give ω by their own formula, whose ε underestimates ‖ω‖ where M is small.
"""

from typing import Tuple

import torch
from torch import Tensor

from .metrics import Root, whitened_drift

EPS = 1e-6


def within_the_disk(raw: Tensor, eps_omega: float) -> Tuple[Tensor, Tensor]:
    """raw·(1 − ε_ω) / sqrt(1 + ‖raw‖²), shorter than 1 − ε_ω by algebra."""
    x, y = raw[..., 0], raw[..., 1]
    size = (1 - eps_omega) * torch.addcmul(torch.addcmul(torch.ones_like(x), x, x), y, y).rsqrt()
    return x * size, y * size


def whitened(raw: Tensor, root: Root, eps_omega: float) -> Tuple[Tensor, Tensor]:
    """v = `within_the_disk`: ‖ω‖_{M⁻¹} < 1 − ε_ω, whatever M is."""
    return within_the_disk(raw, eps_omega)


def _norm(raw: Tensor, root: Root, eps: float = EPS) -> Tensor:
    """n = sqrt(ωᵀ(M + εI)⁻¹ω + ε), the determinant of the 2×2 inverse + ε, written as a sum of squares."""
    x, y = raw[..., 0], raw[..., 1]
    b = root.b * (root.a + root.d)
    a = root.a * root.a + root.b * root.b + eps
    trace = a + eps + root.b * root.b + root.d * root.d
    determinant = root.det * root.det + eps * trace - eps * eps
    share = determinant / (determinant + eps)
    return ((a * y - b * x).square() / (a * (determinant + eps)) + x * x * share / a + eps).sqrt()


def _scaled(raw: Tensor, root: Root, size: Tensor) -> Tuple[Tensor, Tensor]:
    return whitened_drift(root, raw[..., 0] * size, raw[..., 1] * size)


def sigmoid_norm(raw: Tensor, root: Root, eps_omega: float, eps: float = EPS) -> Tuple[Tensor, Tensor]:
    """ω = raw·(2σ(n) − 1)(1 − ε_ω) / (n + ε)."""
    n = _norm(raw, root)
    return _scaled(raw, root, (2 * n.sigmoid() - 1) * (1 - eps_omega) / (n + eps))


def sigmoid_norm_detach(raw: Tensor, root: Root, eps_omega: float, eps: float = EPS) -> Tuple[Tensor, Tensor]:
    """As `sigmoid_norm`, the factor detached from the graph."""
    n = _norm(raw, root).detach()
    return _scaled(raw, root, (2 * n.sigmoid() - 1) * (1 - eps_omega) / (n + eps))


def norm_clip_detach(raw: Tensor, root: Root, eps_omega: float, eps: float = EPS) -> Tuple[Tensor, Tensor]:
    """ω = raw·min(n, 1 − ε_ω) / (n + ε), the factor detached."""
    n = _norm(raw, root).detach()
    return _scaled(raw, root, n.clamp(max=1 - eps_omega) / (n + eps))


DRIFTS = {
    "whitened": whitened,
    "sigmoid_norm": sigmoid_norm,
    "sigmoid_norm_detach": sigmoid_norm_detach,
    "norm_clip_detach": norm_clip_detach,
}
