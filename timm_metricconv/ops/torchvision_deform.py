"""torchvision's `deform_conv2d` as a backend: the only place that knows its interleaved (dy, dx) offsets."""

from typing import Any, Tuple, Union

import torch
import torchvision.ops  # noqa: F401 (registers the operators)
from torch import Tensor

from .custom_op import Arguments, Gradients, define
from .samples import Samples, place


def _arguments(arguments: Arguments) -> Tuple[Any, ...]:
    """Those of torchvision's operator, which asks for one dtype: everything is cast to the positions'."""
    x, positions, weight, bias, mask, stride, padding, dilation, *_ = arguments
    dtype, (rows, columns) = positions.dtype, weight.shape[2:]
    y = dilation[0] * (torch.arange(rows, device=x.device, dtype=dtype) - (rows - 1) / 2)
    x_ = dilation[1] * (torch.arange(columns, device=x.device, dtype=dtype) - (columns - 1) / 2)
    lattice = torch.stack((y[:, None].expand(rows, columns), x_.expand(rows, columns)), -1).view(1, -1, 2, 1, 1)
    offset = positions.flip(2).unflatten(1, (-1, rows * columns)) - lattice
    # torchvision makes a wild index of NaN, and crashes; such samples read zero
    offset = offset.flatten(1, 3).nan_to_num(nan=-1e9, posinf=1e9, neginf=-1e9)
    groups, metric_groups = arguments.groups, arguments.metric_groups
    geometry = (*stride, *padding, *dilation, groups, metric_groups, mask is not None)
    mask = offset.new_zeros(len(x), 1) if mask is None else mask.to(dtype)
    bias = offset.new_zeros(len(weight)) if bias is None else bias.to(dtype)
    return x.to(dtype), weight.to(dtype), offset, mask, bias, *geometry


def _forward(arguments: Arguments, out: Tensor) -> None:
    out.copy_(torch.ops.torchvision.deform_conv2d(*_arguments(arguments)))


def _gradients(arguments: Arguments, grad: Tensor, into: Gradients) -> None:
    inputs = _arguments(arguments)
    x, weight, offset, mask, _ = torch.ops.torchvision._deform_conv2d_backward(grad.to(inputs[0].dtype), *inputs)
    positions = offset.unflatten(1, (-1, arguments.taps, 2)).flatten(1, 2).flip(2)
    for to, gradient in zip(into, (x, positions, weight, mask), strict=True):
        if to is not None:
            to.copy_(gradient)


_conv2d = define("torchvision_conv2d", _forward, _gradients)


def ball_conv2d_torchvision(x: Tensor, samples: Union[Tensor, Samples], *others: Any) -> Tensor:
    """`ball_conv2d_reference` through torchvision, whose offset groups are our metric groups.

    It knows no free taps: the kernel is `[C_out, C_in/groups, k, k]`.
    """
    positions = place(samples)
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # to ONNX' DeformConv, for one
        arguments = Arguments(x, positions, *others)
        return torch.ops.torchvision.deform_conv2d(*_arguments(arguments)).to(x.dtype)
    return _conv2d(x, positions, *others)
