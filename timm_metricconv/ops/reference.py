"""The plain reference: four corners, four weights, one sum. Every other backend is compared with it.

It runs on any device, in any dtype, under TorchScript, `torch.export` and the ONNX exporter, because it is ordinary
tensor code. It keeps all columns in memory.
"""

from typing import List, Optional, Tuple, Union

import torch
from torch import Tensor

from .samples import Samples, place


def first_centre(weight: Tensor, padding: List[int], dilation: List[int]) -> Tuple[float, float]:
    """(y, x) of the first output pixel's kernel centre; free taps `[C_out, C_in/groups, K]` sit about one pixel."""
    rows, columns = (weight.shape[2], weight.shape[3]) if weight.dim() == 4 else (1, 1)
    return dilation[0] * (rows - 1) / 2 - padding[0], dilation[1] * (columns - 1) / 2 - padding[1]


def centres_of(positions: Tensor, weight: Tensor, stride: List[int], padding: List[int], dilation: List[int]) -> Tensor:
    """Centres of the kernel's receptive fields, `[2, H_out, W_out]` as (x, y) in pixels of the image.

    Args:
        positions: `[B, G·K, 2, H_out, W_out]`.
        weight: The kernel.
        stride: (vertical, horizontal), as the next two.
        padding: Zeros around the image.
        dilation: Of the kernel.
    """
    height, width = positions.shape[3], positions.shape[4]
    top, left = first_centre(weight, padding, dilation)
    y = torch.arange(height, device=positions.device) * stride[0] + top
    x = torch.arange(width, device=positions.device) * stride[1] + left
    return torch.stack((x.expand(height, width), y[:, None].expand(height, width))).to(positions.dtype)


def ball_conv2d_reference(
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
    """out = bias + Σ_j W_j · m_j · f(centre + y_j). Arguments and shapes are `ball_conv2d`'s, pairs are written out."""
    batch, channels, height, width = x.shape
    positions = place(samples)
    points = (positions + centres_of(positions, weight, stride, padding, dilation)).permute(0, 3, 4, 1, 2)
    taps = weight.flatten(2).shape[2]
    # a row of the table is one pixel of one metric group
    metric_groups = points.shape[3] // taps
    each = channels // metric_groups
    table = x.permute(0, 2, 3, 1).reshape(batch * height * width * metric_groups, each).to(points.dtype)
    image = (torch.arange(batch, device=x.device) * (height * width)).view(batch, 1, 1, 1)
    group = torch.arange(metric_groups, device=x.device).repeat_interleave(taps)

    # the pixels left, right, above and below a sample, and their shares, zero outside the image
    pixels: List[Tensor] = []
    shares: List[Tensor] = []
    for axis, size in ((0, width), (1, height)):
        near = points[..., axis].floor()
        fraction = points[..., axis] - near
        for pixel, share in ((near, 1 - fraction), (near + 1, fraction)):
            shares.append(torch.where((pixel >= 0) & (pixel < size), share, torch.zeros_like(share)))
            # NaN and huge positions must not become wild indices: integers are clamped last
            pixels.append(pixel.to(torch.int64).clamp(0, size - 1))
    columns = torch.zeros(points.shape[:4] + (each,), dtype=points.dtype, device=x.device)
    for row in (2, 3):
        for column in (0, 1):
            values = table[(image + pixels[row] * width + pixels[column]) * metric_groups + group]
            columns = columns + values * (shares[row] * shares[column])[..., None]
    if mask is not None:
        columns = columns * mask.permute(0, 2, 3, 1)[..., None].to(columns.dtype)

    # torch's older ONNX exporter fixes all sizes at an `unflatten`
    out_height, out_width = points.shape[1], points.shape[2]
    columns = columns.reshape(batch, out_height, out_width, metric_groups, taps, each).transpose(3, 4)
    columns = columns.reshape(batch, out_height, out_width, taps, groups, channels // groups)
    kernel = weight.flatten(2).unflatten(0, (groups, weight.shape[0] // groups)).to(columns.dtype)
    out = torch.einsum("bhwkgc,gock->bgohw", columns, kernel).flatten(1, 2)
    if bias is not None:
        out = out + bias.to(out.dtype)[:, None, None]
    return out.to(x.dtype)
