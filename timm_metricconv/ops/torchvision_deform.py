"""torchvision's `deform_conv2d` as a backend: the only place that knows its interleaved (dy, dx) offsets."""

from typing import List, Optional, Union

import torch
from torch import Tensor
from torchvision.ops import deform_conv2d

from .samples import Samples, place


def ball_conv2d_torchvision(
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
    """`ball_conv2d_reference` through torchvision, which asks for one dtype: everything is cast to the positions'.

    It knows no groups beside the shapes (metric groups are its offset groups), and no free taps: `weight` is
    `[C_out, C_in/groups, k, k]`.
    """
    positions = place(samples)
    dtype, (rows, columns) = positions.dtype, weight.shape[2:]
    y = dilation[0] * (torch.arange(rows, device=x.device, dtype=dtype) - (rows - 1) / 2)
    x_ = dilation[1] * (torch.arange(columns, device=x.device, dtype=dtype) - (columns - 1) / 2)
    lattice = torch.stack((y[:, None].expand(rows, columns), x_.expand(rows, columns)), -1).view(1, -1, 2, 1, 1)
    offset = positions.flip(2).unflatten(1, (-1, rows * columns)) - lattice
    # torchvision makes a wild index of NaN, and crashes; such samples read zero
    offset = offset.flatten(1, 3).nan_to_num(nan=-1e9, posinf=1e9, neginf=-1e9)
    return deform_conv2d(
        x.to(dtype),
        offset,
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        mask=None if mask is None else mask.to(dtype),
    ).to(x.dtype)
