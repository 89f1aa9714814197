"""Unit geodesic balls: where the geodesics of a field of Randers metrics are after a given distance.

In whitened form F(u) = ‖z‖ + v·z, z = A·u, so the dual unit sphere {F* = 1} is the circle ‖A⁻¹p − v‖ = 1. Geodesics of
unit speed are the flow of H = ½F*² on H = ½, and there an angle θ says what the momentum p does: A⁻¹p = ζ + v with
ζ = (cos θ, sin θ), the direction of z. In these terms Hamilton's equations have no root and no division by 1 − ‖v‖²:

    (x, y)' = A⁻¹ζ / (1 + v·ζ),        θ' = −(curl e₁·cos θ + curl e₂·sin θ + curl ω) / (det A·(1 + v·ζ)),

with e₁ = (a, b) and e₂ = (b, d) the rows of A, ω = A·v and curl w = ∂w_y/∂x − ∂w_x/∂y. The curl of the metric's
coframe turns a geodesic, and that of the drift does, as a magnetic field turns a charge. F of the velocity is 1 by
algebra, whatever the coefficients are: a path is exactly as long as asked for.

There are eight coefficients: A⁻¹, the three curls over det A, and v. They are computed at the pixels, the curls by
central differences, and read bilinearly in between. So the field and its first derivatives are continuous, and of
second order between pixels, where a mean of positive definite A⁻¹ is positive definite and a mean of v with ‖v‖ < 1 has
‖v‖ < 1: a metric stays one. No single interpolation has all of this. A kernel that is positive, exact at pixels and
continuously differentiable is flat there, and a geodesic along a row of pixels would never turn; a cubic one
(Catmull-Rom) overshoots. The price: between pixels the curls are not quite those of the field that is read.
"""

import math
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .metrics import FLOOR

# A turn by more than this in one step is not resolved; without a bound, gradients of wild fields overflow.
MAX_TURN = math.pi
# det A over (tr A)² below this one is rounding.
TINY = 1e-7


def _curl(x: Tensor, y: Tensor, spacing: Tuple[float, float]) -> Tensor:
    """∂y/∂x − ∂x/∂y by central differences; the border pixels are lost."""
    down = (x[:, 2:, 1:-1] - x[:, :-2, 1:-1]) / (2 * spacing[0])
    return (y[:, 1:-1, 2:] - y[:, 1:-1, :-2]) / (2 * spacing[1]) - down


def _coefficients(fields: Tensor, spacing: Tuple[float, float], tiny: float = TINY) -> Tensor:
    """`[B, 5, H, W]` → A⁻¹, the curls over −det A and v, `[B, 8, H + 2, W + 2]`: the pixels and a ring around them."""
    # Outside the grid the field is the nearest pixel's, so from the ring on nothing changes across the border.
    # By indices: Inductor cannot compile the derivative of torch's replicating pad.
    rows = torch.arange(-2, fields.shape[2] + 2, device=fields.device).clamp(0, fields.shape[2] - 1)
    columns = torch.arange(-2, fields.shape[3] + 2, device=fields.device).clamp(0, fields.shape[3] - 1)
    around = fields.index_select(2, rows).index_select(3, columns)
    a, b, d, vx, vy = around.unbind(1)
    curls = torch.stack(
        (_curl(a, b, spacing), _curl(b, d, spacing), _curl(a * vx + b * vy, b * vx + d * vy, spacing)), 1
    )
    a, b, d, vx, vy = around[:, :, 1:-1, 1:-1].unbind(1)
    det = torch.maximum(a * d - b * b, tiny * (a + d).square())
    return torch.cat((torch.cat((torch.stack((d, -b, a), 1), -curls), 1) / det[:, None], torch.stack((vx, vy), 1)), 1)


def _read(table: Tensor, x: Tensor, y: Tensor, spacing: Tuple[float, float]) -> Tensor:
    """The coefficients at (x, y) `[B, D, H, W]` from every pixel, `[B, 8, D, H, W]`."""
    height, width = table.shape[2], table.shape[3]
    column = (2 * torch.arange(width - 2, dtype=table.dtype, device=table.device) + 3) / width - 1
    row = (2 * torch.arange(height - 2, dtype=table.dtype, device=table.device) + 3) / height - 1
    grid = torch.stack((column + x * (2 / (width * spacing[1])), row[:, None] + y * (2 / (height * spacing[0]))), -1)
    values = F.grid_sample(table, grid.flatten(1, 2), padding_mode="border", align_corners=False)
    return values.reshape(x.shape[0], 8, x.shape[1], x.shape[2], x.shape[3])


def _slopes(
    coefficients: Tensor,
    start: Tuple[Tensor, Tensor],
    turn: Tensor,
    length: Tensor,
    floor: float = FLOOR,
    max_turn: float = MAX_TURN,
) -> Tuple[Tensor, Tensor, Tensor]:
    """`length` times the derivatives of x, y and θ, where ζ is `start` turned by this much."""
    a, b, d, first, second, drift, vx, vy = coefficients.unbind(1)
    cos, sin = turn.cos(), turn.sin()
    cos, sin = start[0] * cos - start[1] * sin, start[1] * cos + start[0] * sin
    time = length / torch.addcmul(vx * cos, vy, sin).add(1).clamp(min=floor)
    rate = torch.addcmul(torch.addcmul(drift, first, cos), second, sin) * time
    return (
        torch.addcmul(a * cos, b, sin) * time,
        torch.addcmul(b * cos, d, sin) * time,
        rate.clamp(-max_turn, max_turn),
    )


def _progress(k1: Tensor, k23: Tensor, k4: Tensor, s: Tensor) -> Tensor:
    """The classical Runge-Kutta step up to the part s of it, with its continuous extension of third order."""
    square, cube = s * s, s * s * s * (2 / 3)
    return torch.addcmul(torch.addcmul((s - 1.5 * square + cube) * k1, square - cube, k23), cube - 0.5 * square, k4)


def _step(
    table: Tensor,
    start: Tuple[Tensor, Tensor],
    x: Tensor,
    y: Tensor,
    turn: Tensor,
    samples_x: Tensor,
    samples_y: Tensor,
    length: Tensor,
    parts: Tensor,
    first: bool,
    spacing: Tuple[float, float],
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of all geodesics, and of the samples up to those parts `[R, D, 1, 1]` of it."""
    # The first is a pixel, which needs no interpolation
    here = table[:, :, None, 1:-1, 1:-1] if first else _read(table, x, y, spacing)
    x1, y1, turn1 = _slopes(here, start, turn, length)
    there = _read(table, x + 0.5 * x1, y + 0.5 * y1, spacing)
    x2, y2, turn2 = _slopes(there, start, turn + 0.5 * turn1, length)
    there = _read(table, x + 0.5 * x2, y + 0.5 * y2, spacing)
    x3, y3, turn3 = _slopes(there, start, turn + 0.5 * turn2, length)
    x4, y4, turn4 = _slopes(_read(table, x + x3, y + y3, spacing), start, turn + turn3, length)
    x23, y23 = x2 + x3, y2 + y3
    if parts.shape[0] > 1:
        samples_x = samples_x + _progress(x1[:, None], x23[:, None], x4[:, None], parts)
        samples_y = samples_y + _progress(y1[:, None], y23[:, None], y4[:, None], parts)
    one = torch.ones_like(length)
    x, y = x + _progress(x1, x23, x4, one), y + _progress(y1, y23, y4, one)
    return x, y, turn + _progress(turn1, turn2 + turn3, turn4, one), samples_x, samples_y


def _flow(
    table: Tensor, start: Tuple[Tensor, Tensor], radii: Tensor, steps: int, spacing: Tuple[float, float]
) -> Tuple[Tensor, Tensor]:
    """From every pixel with ζ, two of `[B, D, H, W]`, to the distances `[R, D]`: x and y, `[B, R, D, H, W]` each."""
    length = radii.amax(0) / steps
    parts = radii / length.clamp(min=1e-30)
    length, parts = length[:, None, None], parts[:, :, None, None]
    x = torch.zeros_like(start[0])
    y, turn, samples_x, samples_y = x, x, x[:, None], x[:, None]
    for number in range(steps):
        part = (parts - number).clamp(0, 1)
        if torch.jit.is_scripting():
            x, y, turn, samples_x, samples_y = _step(
                table, start, x, y, turn, samples_x, samples_y, length, part, number == 0, spacing
            )
        else:
            arguments = table, start, x, y, turn, samples_x, samples_y, length, part, number == 0, spacing
            differentiated = table.requires_grad and torch.is_grad_enabled()
            followed = torch.compiler.is_compiling() or torch.jit.is_tracing()
            followed = followed or torch._C._are_functorch_transforms_active()
            if differentiated and not followed:  # a checkpoint works with none of them
                state = checkpoint(_step, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                state = _step(*arguments)
            x, y, turn, samples_x, samples_y = state
    return (samples_x, samples_y) if radii.shape[0] > 1 else (x[:, None], y[:, None])


def geodesic_positions(fields: Tensor, points: Tensor, steps: int, spacing: Tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """The unit geodesic ball at every pixel: sample j is where the geodesic in direction û_j is after the distance r_j.

    All pixels and directions are integrated at once by the classical Runge-Kutta method, whose order is four where the
    field is smooth and two across the pixels of a grid. Radii below a direction's largest are read off on the way, with
    order three. Outside the grid the field is that of the nearest pixel. Where ‖v‖ ≥ 1, which is no metric, F is kept
    at 1e-3·‖z‖. Values that are not finite give samples that are not.

    The backward pass takes each step again: between the passes only the paths' places and turns after every step are
    kept. While compiling or exporting the steps are plain operators.

    No sample is farther away than r_j·max ‖A⁻¹‖ / (1 − max ‖v‖), the bound of the tangent ball.

    Args:
        fields: The metric in whitened form at the pixels of a grid, (a, b, d, v_x, v_y), `[B, 5, H, W]`.
        points: The pattern r_j·û_j as (x, y), `[K, 2]`; or `[R, D, 2]`, where R radii share each of D directions, which
            are then integrated once. K = R·D.
        steps: Steps from the pixel to the largest radius of a direction; each reads the field four times.
        spacing: Distance of neighbouring pixels of the grid in units of the positions, (vertical, horizontal): the
            stride, for a grid of a strided convolution's output.

    Returns:
        `[B, K, 2, H, W]`, (x, y) from each pixel.

    Raises:
        ValueError: A shape is another one, or `steps` is below 1.

    Source: the unit geodesic ball of Dagès, Lindenbaum, Bruckstein, Metric Convolutions (ICCV 2025), which they compute
    with a heat equation for every pixel.
    """
    if fields.dim() != 4 or fields.shape[1] != 5:
        raise ValueError(f"fields: expected [B, 5, H, W], got {fields.shape}.")
    if points.dim() not in (2, 3) or points.shape[-1] != 2:
        raise ValueError(f"points: expected [K, 2] or [R, D, 2], got {points.shape}.")
    if steps < 1:
        raise ValueError(f"steps={steps}: expected at least 1.")
    rays = points.to(fields.dtype).view(-1, points.shape[-2], 2)
    radii = torch.linalg.vector_norm(rays, dim=-1)
    total = rays.sum(0)
    norm = torch.linalg.vector_norm(total, dim=-1)
    # Any direction serves for a point at the origin
    ux = torch.where(norm > 0, total[:, 0] / norm, 1.0)[:, None, None]
    uy = torch.where(norm > 0, total[:, 1] / norm, 0.0)[:, None, None]
    a, b, d = fields[:, 0:1], fields[:, 1:2], fields[:, 2:3]
    zx, zy = a * ux + b * uy, b * ux + d * uy
    size = (zx * zx + zy * zy).rsqrt()
    x, y = _flow(_coefficients(fields, spacing), (zx * size, zy * size), radii, steps, spacing)
    return torch.stack((x, y), 3).flatten(1, 2)
