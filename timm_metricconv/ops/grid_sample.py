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
    # Each tap is an image of the batch for grid_sample, whose threads share out the batch; a view where x is one image.
    image = image[:, None].expand(-1, grid.shape[1], -1, -1, -1).flatten(0, 1)
    samples = F.grid_sample(image, grid.flatten(0, 1), padding_mode="zeros", align_corners=False)
    samples = samples.view(*grid.shape[:2], groups, x.shape[1] // groups, *grid.shape[2:4])
    if mask is not None:
        samples = samples * mask[:, :, None, None]
    out = torch.einsum("bkgchw,gock->bgohw", samples, taps).flatten(1, 2)
    if bias is not None:
        out = out + bias.to(out.dtype)[:, None, None]
    return out.to(x.dtype)
