"""What a backend of its own kernels needs to be an operator of torch: schema, fake tensors, autograd and flops, once.

The samples come from a `source`: positions `[B, G·K, 2, H_out, W_out]`, or, with the pattern's `points` `[K, 2]` and
`eps`, the fields `[B, G·5, H_out, W_out]` of `Samples`.
"""

from typing import Callable, List, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from .flops import register_flops
from .samples import Samples


def _innermost_channels(t: Tensor) -> Tensor:
    """An empty tensor like `t`, image by image and pixel by pixel: `t.permute(0, -2, -1, 1, ...)` is contiguous."""
    order = (0, t.dim() - 2, t.dim() - 1, *range(1, t.dim() - 2))
    return t.new_empty([t.shape[i] for i in order]).permute(0, *range(3, t.dim()), 1, 2)


def with_far_corners(x: Tensor) -> Tensor:
    """Images of one row or column with a second one of zeros: a sample's far corner then always exists."""
    if x.shape[2] < 2 or x.shape[3] < 2:
        x = F.pad(x, (0, int(x.shape[3] < 2), 0, int(x.shape[2] < 2)))
    return x


def kernel_format(weight: Tensor) -> torch.memory_format:
    """The memory format in which autograd takes over the kernel's gradient without a copy."""
    channels_last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


class Arguments(NamedTuple):
    """What both directions are given; see `ball_conv2d` and `Samples`."""

    x: Tensor
    source: Tensor
    weight: Tensor
    mask: Optional[Tensor]
    stride: List[int]
    padding: List[int]
    dilation: List[int]
    groups: int
    points: Optional[Tensor]
    eps: float

    @property
    def runs(self) -> int:
        """G, the number of metric groups."""
        return self.source.shape[1] // (5 if self.points is not None else self.weight[0, 0].numel())


def fake_gradients(
    x: Tensor,
    source: Tensor,
    weight: Tensor,
    mask: Optional[Tensor],
    need_x: bool,
    need_source: bool,
    need_weight: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, source, weight and mask without values; an empty tensor for what is not needed."""
    return (
        _innermost_channels(x) if need_x else x.new_empty(0),
        _innermost_channels(source) if need_source else x.new_empty(0),
        torch.empty_like(weight, memory_format=kernel_format(weight)) if need_weight else x.new_empty(0),
        _innermost_channels(mask) if need_source and mask is not None else x.new_empty(0),
    )


def define(name: str, forward: Callable, gradients: Callable, device_types: Optional[str] = None) -> Callable:
    """Registers `timm_metricconv::<name>` and `timm_metricconv::<name>_backward`.

    Args:
        name: Of the operator.
        forward: (arguments, bias) → the output, channels-last.
        gradients: (arguments, grad, need_x, need_source, need_weight) → what `fake_gradients` says, with values; not
            asked for a batch of 0.
        device_types: The devices that it runs on; by default any.

    Returns:
        The backend's function, with the arguments of `ball_conv2d_reference`.
    """

    @torch.library.custom_op(f"timm_metricconv::{name}", mutates_args=(), device_types=device_types)
    def operator(
        x: Tensor,
        source: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        mask: Optional[Tensor],
        stride: List[int],
        padding: List[int],
        dilation: List[int],
        groups: int,
        points: Optional[Tensor] = None,
        eps: float = 0.0,
    ) -> Tensor:
        arguments = Arguments(x, source, weight, mask, stride, padding, dilation, groups, points, eps)
        return forward(arguments, bias)

    @operator.register_fake
    def _(x, source, weight, *arguments):
        return x.new_empty(x.shape[0], source.shape[-2], source.shape[-1], weight.shape[0]).permute(0, 3, 1, 2)

    @torch.library.custom_op(f"timm_metricconv::{name}_backward", mutates_args=(), device_types=device_types)
    def backward_operator(
        grad: Tensor,
        x: Tensor,
        source: Tensor,
        weight: Tensor,
        mask: Optional[Tensor],
        stride: List[int],
        padding: List[int],
        dilation: List[int],
        groups: int,
        need_x: bool,
        need_source: bool,
        need_weight: bool,
        points: Optional[Tensor] = None,
        eps: float = 0.0,
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        if not grad.numel():
            grads = fake_gradients(x, source, weight, mask, need_x, need_source, need_weight)
            return grads[0].zero_(), grads[1].zero_(), grads[2].zero_(), grads[3].zero_()
        arguments = Arguments(x, source, weight, mask, stride, padding, dilation, groups, points, eps)
        return gradients(arguments, grad, need_x, need_source, need_weight)

    @backward_operator.register_fake
    def _(grad, x, source, weight, mask, stride, padding, dilation, groups, need_x, need_source, need_weight, *metric):
        return fake_gradients(x, source, weight, mask, need_x, need_source, need_weight)

    def setup_context(ctx, inputs, output):
        x, source, weight, _, mask, *ctx.geometry, points, ctx.eps = inputs
        ctx.save_for_backward(x, source, weight, mask, points)

    def backward(ctx, grad):
        x, source, weight, mask, points = ctx.saved_tensors
        need_x, need_source, need_weight, need_bias, need_mask = ctx.needs_input_grad[:5]
        needs = need_x, need_source or need_mask, need_weight
        grad_x, grad_source, grad_weight, grad_mask = backward_operator(
            grad, x, source, weight, mask, *ctx.geometry, *needs, points, ctx.eps
        )
        return (
            grad_x if need_x else None,
            grad_source if need_source else None,
            grad_weight if need_weight else None,
            grad.sum((0, 2, 3)) if need_bias else None,
            grad_mask if need_mask else None,
            *[None] * 6,
        )

    operator.register_autograd(backward, setup_context=setup_context)
    registered = torch.ops.timm_metricconv
    register_flops(getattr(registered, name), getattr(registered, f"{name}_backward"))

    def function(
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
        arguments = weight, bias, mask, stride, padding, dilation, groups
        if isinstance(samples, Tensor):
            return operator(x, samples, *arguments)
        return operator(x, samples.fields, *arguments, samples.points.flatten(0, -2), samples.eps)

    return function
