"""Which metric do samples imply? The unit ball of any convolution's positions, and the Randers metric nearest to it.

A sample y_j of a pattern point of radius r_j lies at distance F(y_j) = r_j, so z_j = y_j / r_j is on the boundary of
the unit ball, whatever convolution it comes from: the ball is the star-shaped hull of the z_j, and with A = M − ωωᵀ the
equation F(z_j) = 1 reads z_jᵀA z_j + 2ωᵀz_j = 1, an ellipse around the origin, linear in its five unknowns. M and ω are
a metric exactly where A is positive definite, because ‖ω‖²_{M⁻¹} = q / (1 + q) with q = ωᵀA⁻¹ω.
"""

from typing import NamedTuple, Tuple

import torch
from torch import Tensor

from .metrics import Metric, randers

# Bounds on the eigenvalues of A in units of the samples' own spread: beyond those of a ball that is sampled all around.
SPREAD_BOUNDS = (1e-3, 1e4)
# How far A and ω are expected from the disk, in the same units: it counts as much as the misfit is large.
PRIOR_VARIANCE = 0.05


class RandersFit(NamedTuple):
    """A field of metrics, each with its misfit.

    Attributes:
        metric: M `[..., 2, 2]`.
        omega: Drift `[..., 2]` with ‖ω‖_{M⁻¹} < 1.
        residual: ‖F(y) − r‖ / ‖r‖ over the samples, `[...]`: 0 where a metric explains them, at most 1.
    """

    metric: Tensor
    omega: Tensor
    residual: Tensor


def anisotropy(metric: Tensor) -> Tensor:
    """sqrt(λ_max / λ_min) of M `[..., 2, 2]`: ratio of the axes of the ball without drift, 1 for a disk. `[...]`."""
    a, b, d = metric[..., 0, 0], metric[..., 0, 1], metric[..., 1, 1]
    largest = (a + d) / 2 + torch.hypot((a - d) / 2, b)
    return largest / (a * d - b * b).clamp(min=1e-30).sqrt()


def asymmetry(metric: Tensor, omega: Tensor) -> Tensor:
    """‖ω‖_{M⁻¹} in [0, 1) of M `[..., 2, 2]`, ω `[..., 2]`: 0 for a ball that is its own mirror image. `[...]`."""
    whitened = Metric.from_tensors(metric, omega)
    return torch.hypot(whitened.x, whitened.y)


def unit_ball(metric: Tensor, omega: Tensor, angles: Tensor) -> Tensor:
    """Radius 1 / F(û) of a metric's unit ball.

    Args:
        metric: M `[..., 2, 2]`.
        omega: Drift `[..., 2]`.
        angles: Directions `[N]` in radians, from x (right) towards y (down).

    Returns:
        `[..., N]`.
    """
    directions = torch.stack((angles.cos(), angles.sin()), -1).to(omega.dtype)
    return 1 / randers(directions, Metric.from_tensors(metric, omega))


def _boundary(positions: Tensor, radii: Tensor) -> Tensor:
    """z_j = y_j / r_j of the samples that have r_j > 0: `[B, H, W, K', 2]`."""
    if positions.dim() != 5 or positions.shape[2] != 2 or radii.shape != positions.shape[1:2]:
        raise ValueError(
            f"positions: expected [B, K, 2, H, W] and radii [K], got {tuple(positions.shape)} and {tuple(radii.shape)}."
        )
    outer = radii > 0
    if not outer.any():
        raise ValueError("radii: all are zero; a kernel that samples only its centre has no ball.")
    return positions[:, outer].permute(0, 3, 4, 1, 2) / radii[outer][:, None]


def star_hull(positions: Tensor, radii: Tensor, angles: Tensor, tolerance: float = 1e-3) -> Tensor:
    """Radius of the star-shaped hull of samples: the polygon through the z_j = y_j / r_j in the order of their angles.

    It contains every z_j, and its corners lie on the unit ball of any metric that the samples come from. Where the
    samples leave more than half a turn empty the radius is 0: the centre lies on the hull's boundary.

    Args:
        positions: y_j, `[B, K, 2, H, W]` as (x, y) in pixels.
        radii: r_j of the pattern `[K]` (of the lattice ‖p_j‖); samples with r_j = 0 bear no information.
        angles: Directions `[N]` in radians, from x (right) towards y (down).
        tolerance: Samples whose angles differ by less, in radians, share a direction; the outermost counts.

    Returns:
        `[B, H, W, N]` in the dtype of the positions.

    Raises:
        ValueError: A shape does not fit, or no radius is positive.
    """
    z = _boundary(positions, radii)
    size = torch.linalg.vector_norm(z, dim=-1)
    # a sample at the centre has no direction
    azimuth = torch.where(size > 0, torch.atan2(z[..., 1], z[..., 0]), 0.0)
    azimuth, order = azimuth.sort(dim=-1)
    size = size.gather(-1, order)
    apart = torch.remainder(azimuth[..., :, None] - azimuth[..., None, :] + torch.pi, 2 * torch.pi) - torch.pi
    size = torch.where(apart.abs() < tolerance, size[..., None, :], 0.0).amax(-1)

    angles = torch.remainder(angles.to(z) + torch.pi, 2 * torch.pi) - torch.pi
    after = torch.searchsorted(azimuth.contiguous(), angles.expand(*azimuth.shape[:-1], -1).contiguous(), right=True)
    count = azimuth.shape[-1]
    corners = [index.remainder(count) for index in (after - 1, after)]
    (t0, r0), (t1, r1) = ((azimuth.gather(-1, index), size.gather(-1, index)) for index in corners)
    # The chord between two corners: ρ = r₀r₁ sin(t₁ − t₀) / (r₀ sin(t − t₀) + r₁ sin(t₁ − t))
    gap = torch.remainder(t1 - t0, 2 * torch.pi)
    chord = r0 * torch.sin(angles - t0) + r1 * torch.sin(t1 - angles)
    inside = (gap > 0) & (gap < torch.pi) & (chord > 0)
    radius = r0 * r1 * torch.sin(gap) / torch.where(inside, chord, 1.0)
    on_corner = torch.where(torch.remainder(angles - t0 + 1e-6, 2 * torch.pi) < 2e-6, r0, 0.0)
    return torch.where(inside, radius, on_corner)


def _quadratic(entries: Tensor, points: Tensor) -> Tensor:
    """pᵀ(a, b; b, d)p of entries `[..., 3]` and points `[..., K, 2]`: `[..., K]`."""
    a, b, d = entries[..., None, :].unbind(-1)
    x, y = points.unbind(-1)
    return a * x * x + 2 * b * x * y + d * y * y


def _symmetric(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    return torch.stack((a, b, b, d), -1).unflatten(-1, (2, 2))


def _whitening(z: Tensor) -> Tensor:
    """Symmetric T `[..., 2, 2]` that gives the points z `[..., K, 2]` unit spread, as far as they have any."""
    a, b, d = z[..., 0].square().mean(-1), (z[..., 0] * z[..., 1]).mean(-1), z[..., 1].square().mean(-1)
    floor = 1e-6 * (a + d) + 1e-12
    a, d = a + floor, d + floor
    root = (a * d - b * b).clamp(min=1e-24).sqrt()
    # the inverse of the symmetric root (S + sI) / sqrt(tr S + 2s)
    return _symmetric(d + root, -b, a + root) * ((a + d + 2 * root).rsqrt() / root)[..., None, None]


def _clamped(a: Tensor, b: Tensor, d: Tensor, least: float, most: float) -> Tuple[Tensor, Tensor, Tensor]:
    """The symmetric matrix (a, b; b, d) with its eigenvalues clamped; unchanged where they are within the bounds."""
    mean, half = (a + d) / 2, (a - d) / 2
    n = torch.hypot(half, b)
    low, high = (mean - n).clamp(least, most), (mean + n).clamp(least, most)
    turn = (high - low) / 2 / torch.where(n > 0, n, 1.0)
    mean = (low + high) / 2
    return mean + turn * half, turn * b, mean - turn * half


def fit_randers(positions: Tensor, radii: Tensor, steps: int = 6) -> RandersFit:
    """The Randers metric that explains given positions best: F(y_j) ≈ r_j.

    Least squares in A = M − ωωᵀ and ω on the conic z_jᵀA z_j + 2ωᵀz_j = 1. Its algebraic error is F(z_j) − 1 times
    sqrt(z_jᵀM z_j) + 1 − ωᵀz_j, which would let far samples count more than near ones: each step divides by that factor
    and multiplies by r_j, so that the error is F(y_j) − r_j, the one that is reported. The steps are proximal (each
    starts from the last one's result, the first from a disk): positions that come from a metric and have five
    directions or more give it back up to rounding, and those that determine none (a repeated sample, samples on a line,
    the three directions of a 3×3 polar pattern) stay at the disk in what they leave open. The mean square error that is
    left is the noise of the samples, and a second round weighs the disk of their spread as a prior against it: samples
    that no metric explains would otherwise be answered by balls that reach to infinity where there are no samples. Only
    distances are looked at: how far a sample has turned along its ball is free.

    Args:
        positions: y_j, `[B, K, 2, H, W]` as (x, y) in pixels: `layer.positions(x)`, or a few pixels of it.
        radii: r_j of the pattern `[K]`; of a layer `layer.points.norm(dim=-1).flatten()`. A sample with r_j = 0 should
            stay in the centre; it does not steer the fit but counts in the residual.
        steps: Number of weighted solves in each of the two rounds.

    Returns:
        The fit, `[B, H, W]`, in the dtype of the positions; computed in float64. Finite for finite positions.

    Raises:
        ValueError: A shape does not fit, or no radius is positive.

    Source: that every convolution has an implicit metric is section 3 of Dagès, Lindenbaum, Bruckstein, Metric
    Convolutions (ICCV 2025); the fit is ours.
    """
    dtype, positions, radii = positions.dtype, positions.double(), radii.to(positions.device).double()
    z, r = _boundary(positions, radii), radii[radii > 0]
    # The fit is made in coordinates of unit spread, where its equations are well conditioned.
    whiten = _whitening(z)
    z = z @ whiten
    x, y = z[..., 0], z[..., 1]
    design = torch.stack((x * x, 2 * x * y, y * y, 2 * x, 2 * y), -1)
    disk = design.new_tensor([0.5, 0.0, 0.5, 0.0, 0.0]).expand(*design.shape[:-2], 5)
    identity = torch.eye(5, dtype=z.dtype, device=z.device)
    unknowns, noise = disk, torch.zeros_like(disk[..., 0])
    for number in range(2 * steps):
        drift = (design[..., 3:] @ unknowns[..., 3:, None])[..., 0] / 2
        root = (_quadratic(unknowns[..., :3], z) + drift.square()).sqrt()
        if number == steps:
            noise = (r * (root + drift - 1)).square().mean(-1).clamp(max=1.0)
        weight = r / (root + (1 - drift).clamp(min=0) + 1e-3)
        rows = design * weight[..., None]
        error = weight - (rows @ unknowns[..., None])[..., 0]
        normal = rows.mT @ rows
        damping = 1e-7 * normal.diagonal(dim1=-2, dim2=-1).sum(-1) + 1e-12
        prior = noise[..., None] / PRIOR_VARIANCE
        right = rows.mT @ error[..., None] + (prior * (disk - unknowns))[..., None]
        # solve_ex: positions that are not finite give metrics that are not, instead of LAPACK's exception
        step = torch.linalg.solve_ex(normal + (damping[..., None] + prior)[..., None] * identity, right)[0]
        a, b, d, wx, wy = (unknowns + step[..., 0]).unbind(-1)
        unknowns = torch.stack((*_clamped(a, b, d, *SPREAD_BOUNDS), wx, wy), -1)

    a, b, d = unknowns[..., :3].unbind(-1)
    omega = (whiten @ unknowns[..., 3:, None])[..., 0]
    # A + ωωᵀ
    metric = whiten @ _symmetric(a, b, d) @ whiten + omega[..., :, None] * omega[..., None, :]

    samples = positions.permute(0, 3, 4, 1, 2)
    square = torch.einsum("...ki,...ij,...kj->...k", samples, metric, samples)
    value = square.clamp(min=0).sqrt() + (samples @ omega[..., None])[..., 0]
    # The best multiple of F, in closed form: 1 where the steps have converged; elsewhere it bounds the residual by 1.
    factor = (value @ radii) / value.square().sum(-1).clamp(min=1e-30)
    factor = torch.where(factor > 0, factor, 1.0)
    residual = torch.linalg.vector_norm(value * factor[..., None] - radii, dim=-1) / torch.linalg.vector_norm(radii)
    metric, omega = metric * factor.square()[..., None, None], omega * factor[..., None]
    return RandersFit(metric.to(dtype), omega.to(dtype), residual.to(dtype))


class FrameFit(NamedTuple):
    """The affine map that explains given positions best, y_j ≈ L·p_j + t.

    Attributes:
        linear: L `[..., 2, 2]`.
        shift: t as (x, y) in pixels, `[..., 2]`.
        moved: How far the samples have moved from the pattern by the shift, by the linear part and by the rest that no
            affine map explains: mean squares in pixel², `[..., 3]`. They add up to that of y_j − p_j.
    """

    linear: Tensor
    shift: Tensor
    moved: Tensor


def fit_frame(positions: Tensor, points: Tensor) -> FrameFit:
    """The affine part of any convolution's positions: least squares of y_j = L·p_j + t over the K samples of a pixel.

    The shift that counts is that of the samples' mean, to which the linear part is orthogonal. A displacement at random
    has 1/K in the shift and 2/K in the linear part, so a third of it is affine for K = 9.

    Args:
        positions: y_j, `[B, K, 2, H, W]` as (x, y) in pixels: `layer.positions(x)`, of one metric group.
        points: The pattern's p_j `[K, 2]`: of a layer `layer.points.flatten(0, 1)`.

    Returns:
        The fit, `[B, H, W]`, in the dtype of the positions; computed in float64.

    Raises:
        ValueError: A shape does not fit.
    """
    if positions.dim() != 5 or positions.shape[2] != 2 or points.shape != (positions.shape[1], 2):
        raise ValueError(
            f"positions: expected [B, K, 2, H, W] and points [K, 2], got {tuple(positions.shape)} and "
            f"{tuple(points.shape)}."
        )
    p = points.to(positions.device).double()
    y = positions.permute(0, 3, 4, 1, 2).double()
    centre = p.mean(0)
    around, moved = p - centre, y - p
    mean = moved.mean(-2)
    # a pattern on a line, or in a point, leaves directions open: there nothing has moved
    change = (torch.linalg.pinv(around) @ (moved - mean[..., None, :])).mT
    bent = around @ change.mT
    rest = moved - mean[..., None, :] - bent
    parts = torch.stack([t.square().sum(-1).mean(-1) for t in (mean[..., None, :], bent, rest)], -1)
    linear = torch.eye(2, dtype=p.dtype, device=p.device) + change
    shift = mean - change @ centre
    return FrameFit(linear.to(positions.dtype), shift.to(positions.dtype), parts.to(positions.dtype))
