"""Where a convolution reads: positions, or affine maps of a pattern, of which a fused backend never makes positions."""

from typing import NamedTuple, Union

import torch
from torch import Tensor

# Numbers of an affine map.
FIELDS = 6


class Samples(NamedTuple):
    """A pattern under an affine map at every output pixel: y_j = L·p_j + t.

    Attributes:
        fields: (L₀₀, L₀₁, L₁₀, L₁₁, t_x, t_y) of every output pixel, metric group by metric group, in pixels of the
            input, `[B, G·6, H_out, W_out]`, float32 or float64.
        points: The pattern's points p_j as (x, y), `[K, 2]`. They get no gradient.
    """

    fields: Tensor
    points: Tensor


def place(samples: Union[Tensor, Samples], each: int = FIELDS) -> Tensor:  # TorchScript takes globals as defaults alone
    """Positions `[B, G·K, 2, H_out, W_out]` of samples; positions are returned as they are."""
    if isinstance(samples, Tensor):
        return samples
    batch, channels, height, width = samples.fields.shape
    maps = samples.fields.reshape(batch, channels // each, 1, each, height, width)
    points = samples.points.to(maps.dtype)[:, :, None, None, None]
    first, second, shift = maps[:, :, :, 0:4:2], maps[:, :, :, 1:4:2], maps[:, :, :, 4:6]  # [B, G, 1, 2, H, W] each
    return torch.addcmul(torch.addcmul(shift, first, points[:, 0]), second, points[:, 1]).flatten(1, 2)


def metric_groups_of(samples: Union[Tensor, Samples], taps: int) -> int:
    """G, the number of equal runs of input channels that have samples of their own."""
    source, each = (samples, taps) if isinstance(samples, Tensor) else (samples.fields, FIELDS)
    return max(1, source.shape[1] // each)
