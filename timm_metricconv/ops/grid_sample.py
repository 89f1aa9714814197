"""A backend for images of few channels: `grid_sample` reads, a matrix product weighs. Ordinary operators, any device.

With one channel there are no neighbours in memory for a channels-last gather to share, and reading planes wins: on two
cores a sample and its gradient cost some 40 ns here and 1000 ns in `gather`. It keeps all samples in memory.
"""

from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import kernel_size_of, sampling_points


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def grid_sample_conv2d(
    x: Tensor,
    positions: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    mask: Optional[Tensor],
    stride: List[int],
    padding: List[int],
    dilation: List[int],
    groups: int,
) -> Tensor:
    """`ball_conv2d_reference`, fast for few channels."""
    points = sampling_points(positions, kernel_size_of(weight), stride, padding, dilation).permute(0, 3, 1, 2, 4)
    # grid_sample's coordinates are exact on pixels where the size is a power of two. A pixel must stay one: the
    # interpolation has another slope on its other side.
    width, height = _power_of_two(x.shape[3]), _power_of_two(x.shape[2])
    image = F.pad(x.to(points.dtype), (0, width - x.shape[3], 0, height - x.shape[2]))
    scale = points.new_tensor([2 / width, 2 / height])
    grid = torch.addcmul(scale / 2 - 1, points, scale)
    taps = weight.flatten(2).unflatten(0, (groups, -1)).to(points.dtype)
    out = []
    for b in range(x.shape[0]):
        # the samples of a tap are an "image of the batch": grid_sample's threads share out the batch
        samples = F.grid_sample(image[b].expand(grid.shape[1], -1, -1, -1), grid[b], padding_mode="zeros", align_corners=False)
        if mask is not None:
            samples = samples * mask[b, :, None]
        out.append(torch.einsum("kgchw,gock->gohw", samples.unflatten(1, (groups, -1)), taps).flatten(0, 1))
    result = torch.stack(out)
    if bias is not None:
        result = result + bias.to(result.dtype)[:, None, None]
    return result.to(x.dtype)
