"""Where a convolution reads: positions, or the metrics that they follow from. A backend that fuses never makes them."""

from typing import NamedTuple, Union

import torch
from torch import Tensor

# The law of F stands in `geometry`; it is all that this folder imports of ours.
from ..geometry.metrics import Metric, randers


class Samples(NamedTuple):
    """The unit tangent balls of a field of metrics: y_j = p_j / (F(û_j) + eps), and a point at the origin stays.

    Attributes:
        fields: (a, b, d, v_x, v_y) of the metrics in whitened form at the output pixels, group by group,
            `[B, G·5, H_out, W_out]`, float32 or float64. See `geometry.Metric`.
        points: The pattern's points p_j = r_j·û_j in pixels as (x, y), `[K, 2]`; or `[R, D, 2]`, R points in each of D
            directions, so that F is evaluated D times. They get no gradient.
        eps: Added to F (the paper's formulas).
    """

    fields: Tensor
    points: Tensor
    eps: float


def directions_of(points: Tensor) -> Tensor:
    """û of points `[..., 2]`; any direction serves for a point at the origin."""
    radii = torch.linalg.vector_norm(points, dim=-1, keepdim=True)
    any_direction = torch.eye(2, dtype=points.dtype, device=points.device)[0]
    # no 0 / 0, which ONNX' constant folding warns of
    return torch.where(radii > 0, points / radii.clamp(min=1e-30), any_direction)


def place(samples: Union[Tensor, Samples]) -> Tensor:
    """Positions `[B, G·K, 2, H_out, W_out]` of samples; positions are returned as they are."""
    if isinstance(samples, Tensor):
        return samples
    batch, channels, height, width = samples.fields.shape
    fields = samples.fields.reshape(batch, channels // 5, 5, height, width).permute(0, 3, 4, 1, 2)
    metric = Metric(fields[..., 0], fields[..., 1], fields[..., 2], fields[..., 3], fields[..., 4])
    points = samples.points if samples.points.dim() == 3 else samples.points[None]
    stretch = (randers(directions_of(points[-1]), metric) + samples.eps).reciprocal()[:, :, :, :, None]
    # a plane for x and one for y: a trailing dimension of 2 would be slow
    planes = torch.stack((stretch * points[..., 0], stretch * points[..., 1]))
    return planes.flatten(4).permute(1, 4, 0, 2, 3)


def metric_groups(samples: Union[Tensor, Samples], taps: int) -> int:
    """G, the number of equal runs of input channels that have samples of their own."""
    source, each = (samples, taps) if isinstance(samples, Tensor) else (samples.fields, 5)
    return max(1, source.shape[1] // each)
