"""A backend for images of few channels: `grid_sample` reads, a matrix product weighs. Ordinary operators, any device.

With one channel there are no neighbours in memory for a channels-last gather to share, and reading planes wins. It
keeps all samples in memory.
"""

from typing import List, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import centres_of
from .samples import Samples, metric_groups_of, place


def grid_sample_conv2d(
    x: Tensor,
    samples: Union[Tensor, Samples],
    weight: Tensor,
    bias: Optional[Tensor],
    mask: Optional[Tensor],
    stride: List[int],
    padding: List[int],
    dilation: List[int],
    groups: int,
) -> Tensor:
    """`ball_conv2d_reference`, fast for few channels."""
    taps = weight.flatten(2).unflatten(0, (groups, -1))
    metric_groups = metric_groups_of(samples, taps.shape[-1])
    positions = place(samples)
    # grid_sample's coordinates run from −1 to 1. They are exact on pixels where the size is a power of two, and a pixel
    # must stay one: the interpolation has another slope on its other side. A square needs one scale for x and y.
    size = 1 << (max(x.shape[2], x.shape[3]) - 1).bit_length()
    image = F.pad(x.to(positions.dtype), (0, size - x.shape[3], 0, size - x.shape[2]))
    image = image.unflatten(1, (metric_groups, x.shape[1] // metric_groups))
    centres = centres_of(positions, weight, stride, padding, dilation) * (2 / size) + (1 / size - 1)
    grid = torch.add(centres, positions, alpha=2 / size).permute(0, 1, 3, 4, 2)
    # Each tap is an image of the batch for grid_sample, whose threads share out the batch; a view where x is one image.
    image = image[:, :, None].expand(-1, -1, taps.shape[-1], -1, -1, -1).flatten(0, 2)
    read = F.grid_sample(image, grid.flatten(0, 1), padding_mode="zeros", align_corners=False)
    read = read.view(len(x), metric_groups, taps.shape[-1], x.shape[1] // metric_groups, *grid.shape[2:4])
    if mask is not None:
        read = read * mask.unflatten(1, (metric_groups, -1))[:, :, :, None]
    read = read.transpose(1, 2).flatten(2, 3)
    read = read.unflatten(2, (groups, x.shape[1] // groups))
    out = torch.einsum("bkgchw,gock->bgohw", read, taps.to(read.dtype)).flatten(1, 2)
    if bias is not None:
        out = out + bias.to(out.dtype)[:, None, None]
    return out.to(x.dtype)
