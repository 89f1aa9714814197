"""Randers metrics of the plane, F(u) = sqrt(uᵀMu) + ωᵀu, in the whitened form: the one place of the law.

With A the symmetric root of M (A² = M) and v = A⁻¹ω,

    F(u) = ‖z‖ + v·z,   z = A·u,   ‖ω‖_{M⁻¹} = ‖v‖,   F(u) ≥ (1 − ‖v‖)·‖z‖.

So five numbers (a, b, d, v_x, v_y) are a metric as soon as A = [[a, b], [b, d]] is positive and ‖v‖ < 1: nothing is
inverted, and nothing has to be guarded. Source: Dagès, Lindenbaum, Bruckstein, Metric Convolutions (ICCV 2025); the
whitened form is ours.
"""

from typing import NamedTuple, Tuple

import torch
from torch import Tensor

# Where a drift of the paper's leaves the law, F is kept at this multiple of ‖z‖; idle by algebra where ‖v‖ < 0.999.
FLOOR = 1e-3
# ‖z‖² of any metric is far above this, which only keeps the derivative of the root finite at zero.
TINY = 1e-30


class Root(NamedTuple):
    """The symmetric root A = [[a, b], [b, d]] of a metric M, every component of the same shape `[...]`.

    Attributes:
        a: A₀₀.
        b: A₀₁ = A₁₀.
        d: A₁₁.
        det: det A = sqrt(det M), which a parametrization knows as a product of positive factors.
    """

    a: Tensor
    b: Tensor
    d: Tensor
    det: Tensor


class Metric(NamedTuple):
    """A Randers metric in whitened form, every component of the same shape `[...]`.

    Attributes:
        a: A₀₀ of the symmetric root A of M, in 1 / pixel.
        b: A₀₁ = A₁₀.
        d: A₁₁.
        x: v_x of the whitened drift v = A⁻¹ω.
        y: v_y.
    """

    a: Tensor
    b: Tensor
    d: Tensor
    x: Tensor
    y: Tensor

    @classmethod
    def from_tensors(cls, m: Tensor, omega: Tensor) -> "Metric":
        """The whitened form of M `[..., 2, 2]`, symmetric positive definite, and ω `[..., 2]`."""
        a, b, d = m[..., 0, 0], m[..., 0, 1], m[..., 1, 1]
        root = square_root(a, b, d, (a * d - b * b).clamp(min=TINY).sqrt())
        return cls(root.a, root.b, root.d, *whitened_drift(root, omega[..., 0], omega[..., 1]))

    def tensors(self) -> Tuple[Tensor, Tensor]:
        """M = A² `[..., 2, 2]` and ω = A·v `[..., 2]`."""
        a, b, d, x, y = self
        off = b * (a + d)
        m = torch.stack((a * a + b * b, off, off, b * b + d * d), -1).unflatten(-1, (2, 2))
        return m, torch.stack((a * x + b * y, b * x + d * y), -1)


def square_root(a: Tensor, b: Tensor, d: Tensor, s: Tensor) -> Root:
    """The symmetric root of M = [[a, b], [b, d]] with s = sqrt(det M), in closed form: (M + sI) / sqrt(tr M + 2s)."""
    scale = (a + d + 2 * s).rsqrt()
    return Root((a + s) * scale, b * scale, (d + s) * scale, s)


def whitened_drift(root: Root, x: Tensor, y: Tensor) -> Tuple[Tensor, Tensor]:
    """v = A⁻¹ω of ω = (x, y)."""
    return (root.d * x - root.b * y) / root.det, (root.a * y - root.b * x) / root.det


def randers(directions: Tensor, metric: Metric, floor: float = FLOOR, tiny: float = TINY) -> Tensor:
    """F of vectors, positive: ‖z‖ + v·z with z = A·u, kept at `FLOOR`·‖z‖.

    Args:
        directions: Vectors u `[D, 2]` as (x, y).
        metric: Components `[...]`.
        floor: See `FLOOR`.
        tiny: See `TINY`. (TorchScript reads constants as defaults only.)

    Returns:
        F(u) `[..., D]`.
    """
    a, b, d, x, y = metric
    ux, uy = directions[:, 0], directions[:, 1]
    zx = torch.addcmul(a[..., None] * ux, b[..., None], uy)
    zy = torch.addcmul(b[..., None] * ux, d[..., None], uy)
    size = (zx * zx + zy * zy + tiny).sqrt()
    value = torch.addcmul(torch.addcmul(size, x[..., None], zx), y[..., None], zy)
    return torch.maximum(value, floor * size)


def zermelo_ellipse(metric: Metric) -> Tuple[Tensor, Tensor]:
    """The unit ball of a Randers metric as a shifted ellipse {(u − c)ᵀE(u − c) ≤ 1}.

    With λ = 1 − ‖v‖², E = λ·A(I − vvᵀ)A and c = −A⁻¹v / λ: Zermelo's navigation data (Bao, Robles, Shen, Zermelo
    navigation on Riemannian manifolds, 2004).

    Args:
        metric: Components `[...]` with ‖v‖ < 1.

    Returns:
        E `[..., 2, 2]` and the centre c `[..., 2]`.
    """
    a, b, d, x, y = metric
    margin = 1 - x * x - y * y
    m, omega = metric.tensors()
    ellipse = margin[..., None, None] * (m - omega[..., :, None] * omega[..., None, :])
    centre = whitened_drift(Root(a, b, d, -margin * (a * d - b * b)), x, y)
    return ellipse, torch.stack(centre, -1)
