"""From the predictor's raw channels to the root A of a metric: one function and one row of `PARAMETRIZATIONS` each.

A function takes `raw` `[..., channels − 2]` (the last two predicted channels are the drift's) and the pair
`scale = (s_min, s_max)`, and returns A with its determinant in closed form. `logspd` and `frame` are ours, the others
the paper's. `frame` alone gives more than a metric: a frame, which may turn the pattern (`frame_of`).
"""

import math
from dataclasses import dataclass
from typing import Callable, Tuple

import torch
from torch import Tensor

from .metrics import TINY, Root, square_root
from .navigation import Frame, frame_root

EPS = 1e-6
EPS_L = 0.01
# `logspd` keeps trace and anisotropy of log M within ±LOG_BOUND each: the semi-axes of a ball stay between 1/4 and 4.
LOG_BOUND = math.log(4.0)
# `frame` keeps B within this Frobenius distance of the identity: its singular values stay between 0.05 and 1.95.
FRAME_BOUND = 0.95


def cholesky(raw: Tensor, scale: Tuple[float, float], eps_l: float = EPS_L) -> Root:
    """M = LLᵀ with L = [[|l₀| + ε_L, 0], [l₁, |l₂| + ε_L]]."""
    l0, l1, l2 = raw[..., 0].abs() + eps_l, raw[..., 1], raw[..., 2].abs() + eps_l
    return square_root(l0 * l0, l0 * l1, l1 * l1 + l2 * l2, l0 * l2)


def ldl(raw: Tensor, scale: Tuple[float, float], eps_l: float = EPS_L) -> Root:
    """M = LDLᵀ with L = [[1, 0], [l₀, 1]] and D = diag(|d₁| + ε_L, |d₂| + ε_L)."""
    l0, d1, d2 = raw[..., 0], raw[..., 1].abs() + eps_l, raw[..., 2].abs() + eps_l
    return square_root(d1, d1 * l0, d1 * l0 * l0 + d2, (d1 * d2).sqrt())


def _from_axes(direction: Tensor, first: Tensor, second: Tensor, eps: float = EPS, tiny: float = TINY) -> Root:
    """The root of M = R diag(λ) Rᵀ with R = [v̂, v̂⊥] and v̂ = (v + ε) / (‖v‖ + ε), whose length ε keeps from one."""
    direction, size = direction + eps, torch.linalg.vector_norm(direction, dim=-1) + eps
    x, y = direction[..., 0], direction[..., 1]
    length = (x * x + y * y + tiny).sqrt()
    x, y, first, second = x / length, y / length, first.sqrt() * length / size, second.sqrt() * length / size
    b = (first - second) * x * y
    return Root(first * x * x + second * y * y, b, first * y * y + second * x * x, first * second)


def spectral(raw: Tensor, scale: Tuple[float, float], eps_l: float = EPS_L) -> Root:
    """Axis v = raw₀₁, eigenvalues |raw₂₃| + ε_L."""
    return _from_axes(raw[..., 0:2], raw[..., 2].abs() + eps_l, raw[..., 3].abs() + eps_l)


def _scale(raw: Tensor, scale: Tuple[float, float]) -> Tensor:
    return (scale[1] + scale[0]) / 2 + (raw.sigmoid() - 0.5) * (scale[1] - scale[0])


# A sigmoid of −1e4 is zero in float32, and a metric is not: the floor is far below any trained value.
def spectral_scale(raw: Tensor, scale: Tuple[float, float], floor: float = 1e-8) -> Root:
    """Axis v = raw₀₁, eigenvalues 2σ(raw₂₃)·scale(raw₄)."""
    size = _scale(raw[..., 4], scale)
    first, second = (2 * raw[..., 2].sigmoid()).clamp(min=floor), (2 * raw[..., 3].sigmoid()).clamp(min=floor)
    return _from_axes(raw[..., 0:2], first * size, second * size)


def spectral_scale_ratio(raw: Tensor, scale: Tuple[float, float], eps: float = EPS, floor: float = 1e-8) -> Root:
    """As `spectral_scale`, the second eigenvalue 1 / (2σ(raw₃) + ε) before scaling."""
    size = _scale(raw[..., 4], scale)
    first, second = (2 * raw[..., 2].sigmoid()).clamp(min=floor), 1 / (2 * raw[..., 3].sigmoid() + eps)
    return _from_axes(raw[..., 0:2], first * size, second * size)


def logspd(raw: Tensor, scale: Tuple[float, float], bound: float = LOG_BOUND, tiny: float = TINY) -> Root:
    """M = exp(S), A = exp(S / 2), S = [[p + q, r], [r, p − q]]; p and the norm of (q, r) stay smoothly in ±`bound`."""
    p, q, r = raw[..., 0], raw[..., 1], raw[..., 2]
    p = 0.5 * p * (1 + (p / bound).square()).rsqrt()
    squash = 0.5 * (1 + (q * q + r * r) / (bound * bound)).rsqrt()
    q, r = q * squash, r * squash
    n = (q * q + r * r + tiny).sqrt()
    # sinh and cosh by the tangent of the half: as exact as torch's own, which are not vectorised
    size, half = p.exp(), (0.5 * n).tanh()
    growth = size / (1 - half * half)
    mean, slope = growth * (1 + half * half), 2 * growth * half / n
    return Root(mean + slope * q, slope * r, mean - slope * q, size * size)


def frame_of(raw: Tensor, bound: float = FRAME_BOUND) -> Frame:
    """B = I + N, N = β·raw / sqrt(β² + ‖raw‖²) as a 2×2 matrix in row-major order, β = `FRAME_BOUND`."""
    size = bound * (bound * bound + raw.square().sum(-1)).rsqrt()
    return Frame(1 + raw[..., 0] * size, raw[..., 1] * size, raw[..., 2] * size, 1 + raw[..., 3] * size)


def frame(raw: Tensor, scale: Tuple[float, float]) -> Root:
    """The root of h = (BBᵀ)⁻¹ with B of `frame_of`, in whose terms the paper's drifts measure ω."""
    return frame_root(frame_of(raw))


@dataclass(frozen=True)
class Parametrization:
    """One way from raw channels to a metric.

    Attributes:
        function: Raw channels to the root A of the metric.
        channels: Number of predicted channels, the drift's two included.
        identity: `scale` → raw values (without the drift's) for which M = I.
        uniform_rows: Predictor rows that the paper starts at 1 / (k²·C_in).
        default_rows: Predictor rows that the paper leaves at `nn.Conv2d`'s initialisation.
        least: No eigenvalue of A is smaller, whatever the drift.
        eps: The paper's formulas divide by F + ε.
    """

    function: Callable[[Tensor, Tuple[float, float]], Root]
    channels: int
    identity: Callable[[Tuple[float, float]], Tuple[float, ...]]
    uniform_rows: Tuple[int, ...] = ()
    default_rows: Tuple[int, ...] = ()
    least: float = 0.0
    eps: float = EPS


def _half_scale_logit(scale: Tuple[float, float]) -> float:
    """The raw value for which 2σ(raw)·scale(0) = 1."""
    mean = (scale[0] + scale[1]) / 2
    if mean <= 0.5:
        raise ValueError(f"scale={scale}: the identity metric is out of reach, (s_min + s_max) / 2 must be above 0.5.")
    return -math.log(2 * mean - 1)


def _ratio_identity(scale: Tuple[float, float]) -> Tuple[float, ...]:
    first = _half_scale_logit(scale)
    # 1 / (2σ + ε) = 1 / mean
    share = ((scale[0] + scale[1]) / 2 - EPS) / 2
    if share >= 1:
        raise ValueError(f"scale={scale}: the identity metric is out of reach, (s_min + s_max) / 2 must be below 2.")
    return 1.0, 0.0, first, math.log(share / (1 - share)), 0.0


PARAMETRIZATIONS = {
    "frame": Parametrization(frame, 6, lambda scale: (0.0,) * 4, least=1 / (1 + FRAME_BOUND), eps=0.0),
    "logspd": Parametrization(logspd, 5, lambda scale: (0.0, 0.0, 0.0), least=math.exp(-LOG_BOUND), eps=0.0),
    "cholesky": Parametrization(cholesky, 5, lambda scale: (1 - EPS_L, 0.0, 1 - EPS_L), uniform_rows=(0, 2)),
    "ldl": Parametrization(ldl, 5, lambda scale: (0.0, 1 - EPS_L, 1 - EPS_L), uniform_rows=(1, 2)),
    "spectral": Parametrization(
        spectral, 6, lambda scale: (1.0, 0.0, 1 - EPS_L, 1 - EPS_L), default_rows=(0, 1, 2, 3, 4, 5)
    ),
    "spectral_scale": Parametrization(
        spectral_scale, 7, lambda s: (1.0, 0.0, _half_scale_logit(s), _half_scale_logit(s), 0.0), default_rows=(0, 1)
    ),
    "spectral_scale_ratio": Parametrization(spectral_scale_ratio, 7, _ratio_identity, default_rows=(0, 1)),
}
