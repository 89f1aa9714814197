"""The paper's way to sample a unit ball: y_j = r_j·û_j / F(û_j), every sample on the ray of its point."""

import torch
from torch import Tensor

from .metrics import Metric, randers


def directions_of(points: Tensor) -> Tensor:
    """û of points `[..., 2]`; any direction serves for a point at the origin."""
    radii = torch.linalg.vector_norm(points, dim=-1, keepdim=True)
    any_direction = torch.eye(2, dtype=points.dtype, device=points.device)[0]
    # no 0 / 0, which ONNX' constant folding warns of
    return torch.where(radii > 0, points / radii.clamp(min=1e-30), any_direction)


def ray_positions(metric: Metric, points: Tensor, eps: float = 0.0) -> Tensor:
    """The unit tangent ball at every pixel: y_j = p_j / (F(û_j) + eps); a point at the origin stays.

    Args:
        metric: Components `[B, H, W, G]`.
        points: The pattern's points p_j = r_j·û_j in pixels as (x, y), `[R, D, 2]`: R radii share each of D
            directions, so that F is evaluated D times. K = R·D.
        eps: Added to F (the paper's formulas).

    Returns:
        `[B, G·K, 2, H, W]`, (x, y) from each pixel.

    Source: Dagès, Lindenbaum, Bruckstein, Metric Convolutions (ICCV 2025), section 3.
    """
    stretch = (randers(directions_of(points[-1]), metric) + eps).reciprocal().permute(0, 3, 4, 1, 2)
    # planes, which neighbouring pixels share: a trailing dimension of 2 would be slow
    return (stretch[:, :, None, :, None] * points[:, :, :, None, None]).flatten(1, 3)
