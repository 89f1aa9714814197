"""What a backend of its own kernels needs to be an operator of torch: schema, fake tensors, autograd, vmap and flops.

The samples come from a `source`: positions `[B, G·K, 2, H_out, W_out]`, or, with the pattern's `points` `[K, 2]`, the
fields `[B, G·6, H_out, W_out]` of `Samples`.

Where a graph of the backward pass is asked for (`create_graph=True`) the gradients are those of the reference, which
has derivatives of any order; the kernels have the first ones. Where `torch.func` differentiates, the reference
computes.
"""

from typing import Any, Callable, List, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

from .flops import register_flops
from .reference import ball_conv2d_reference
from .samples import FIELDS, Samples


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

    @property
    def taps(self) -> int:
        """K."""
        return self.weight[0, 0].numel()

    @property
    def metric_groups(self) -> int:
        """G."""
        return self.source.shape[1] // (self.taps if self.points is None else FIELDS)


class Gradients(NamedTuple):
    """Where a backend puts the gradients; None for what is not wanted."""

    x: Optional[Tensor]
    source: Optional[Tensor]
    weight: Optional[Tensor]
    mask: Optional[Tensor]


def with_far_corners(x: Tensor) -> Tensor:
    """Images of fewer than two rows or columns with more, of zeros: a sample's far corner then always exists."""
    if x.shape[2] < 2 or x.shape[3] < 2:
        x = F.pad(x, (0, max(0, 2 - x.shape[3]), 0, max(0, 2 - x.shape[2])))
    return x


def by_pixels(t: Tensor) -> Tensor:
    """`[B, ..., H, W]` → `[B, H, W, ...]`: contiguous, and a view, of all that an operator here returns."""
    return t.permute(0, t.dim() - 2, t.dim() - 1, *range(1, t.dim() - 2))


def _empty(like: Tensor, *shape) -> Tensor:
    """`[B, ..., H, W]` whose `by_pixels` is contiguous; no view, behind which nothing could work in place."""
    strides, step = [0] * len(shape), 1
    for axis in (*range(len(shape) - 3, 0, -1), len(shape) - 1, len(shape) - 2, 0):
        strides[axis], step = step, step * shape[axis]
    return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)


def empty_output(x: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    """`[B, C_out, H_out, W_out]`, channels-last."""
    return _empty(x, x.shape[0], weight.shape[0], source.shape[-2], source.shape[-1])


def empty_gradients(
    x: Tensor,
    source: Tensor,
    weight: Tensor,
    mask: Optional[Tensor],
    need_x: bool,
    need_source: bool,
    need_weight: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of x, source, weight and mask; an empty tensor for what is not needed."""
    # the kernel's in the memory format in which autograd takes it over without a copy
    channels_last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return (
        _empty(x, *x.shape) if need_x else x.new_empty(0),
        _empty(source, *source.shape) if need_source else x.new_empty(0),
        torch.empty_like(weight, memory_format=layout) if need_weight else x.new_empty(0),
        _empty(mask, *mask.shape) if need_source and mask is not None else x.new_empty(0),
    )


def _of_the_reference(arguments: Arguments, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    """Gradients of x, source, weight and mask by differentiable operators."""
    x, source, weight, mask, stride, padding, dilation, groups, points = arguments

    def function(x: Tensor, source: Tensor, weight: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        samples = source if points is None else Samples(source, points)
        return ball_conv2d_reference(x, samples, weight, None, mask, stride, padding, dilation, groups)

    given = (x, source, weight) if mask is None else (x, source, weight, mask)
    gradients = torch.func.vjp(function, *given)[1](grad)
    return (*gradients, None) if mask is None else gradients


def _differentiates() -> bool:
    """Whether a transform of `torch.func` takes derivatives here; its operators cannot be ours, `torch.vmap`'s can."""
    if not torch._C._are_functorch_transforms_active():
        return False
    return any(i.key() != TransformType.Vmap for i in retrieve_all_functorch_interpreters())


def _one_by_one(operator: Callable) -> Callable:
    """The rule of `torch.vmap` that calls an operator for each slice."""

    def rule(info: Any, in_dims: tuple, *args) -> tuple:
        def slice_of(i: int) -> list:
            return [a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)]

        results = [operator(*slice_of(i)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


def define(name: str, forward: Callable, gradients: Callable, device_types: Optional[str] = None) -> Callable:
    """Registers `timm_metricconv::<name>` and `timm_metricconv::<name>_backward`.

    Args:
        name: Of the operator.
        forward: (arguments, bias, out) sets `out` `[B, C_out, H_out, W_out]`, whose `by_pixels` is contiguous.
        gradients: (arguments, grad, into) sets the `Gradients`, their `by_pixels` contiguous too; not called for a
            batch of 0.
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
    ) -> Tensor:
        out = empty_output(x, source, weight)
        if out.numel():
            forward(Arguments(x, source, weight, mask, stride, padding, dilation, groups, points), bias, out)
        return out

    @operator.register_fake
    def _(x, source, weight, *arguments):
        return empty_output(x, source, weight)

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
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        results = empty_gradients(x, source, weight, mask, need_x, need_source, need_weight)
        if grad.numel():
            needs = need_x, need_source, need_weight, need_source and mask is not None
            into = Gradients(*(t if need else None for t, need in zip(results, needs, strict=True)))
            gradients(Arguments(x, source, weight, mask, stride, padding, dilation, groups, points), grad, into)
        else:
            for result in results:
                result.zero_()
        return results

    @backward_operator.register_fake
    def _(grad, x, source, weight, mask, stride, padding, dilation, groups, need_x, need_source, need_weight, *points):
        return empty_gradients(x, source, weight, mask, need_x, need_source, need_weight)

    def setup_context(ctx, inputs, output):
        x, source, weight, _, mask, *ctx.geometry, points = inputs
        ctx.save_for_backward(x, source, weight, mask, points)

    def backward(ctx, grad):
        x, source, weight, mask, points = ctx.saved_tensors
        need_x, need_source, need_weight, need_bias, need_mask = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            results = _of_the_reference(Arguments(x, source, weight, mask, *ctx.geometry, points), grad)
        else:
            needs = need_x, need_source or need_mask, need_weight
            results = backward_operator(grad, x, source, weight, mask, *ctx.geometry, *needs, points)
        grad_x, grad_source, grad_weight, grad_mask = results
        return (
            grad_x if need_x else None,
            grad_source if need_source else None,
            grad_weight if need_weight else None,
            grad.sum((0, 2, 3)) if need_bias else None,
            grad_mask if need_mask else None,
            *[None] * 5,
        )

    operator.register_autograd(backward, setup_context=setup_context)

    @operator.register_vmap
    def _(info, in_dims, x, source, weight, bias, mask, *others):
        if (in_dims[2], in_dims[3], in_dims[-1]) != (None, None, None):
            return _one_by_one(operator)(info, in_dims, x, source, weight, bias, mask, *others)

        def folded(t: Optional[Tensor], dim: Optional[int]) -> Optional[Tensor]:
            if t is None:
                return None
            return (t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)).flatten(0, 1)

        x, source, mask = folded(x, in_dims[0]), folded(source, in_dims[1]), folded(mask, in_dims[4])
        return operator(x, source, weight, bias, mask, *others).unflatten(0, (info.batch_size, -1)), 0

    backward_operator.register_vmap(_one_by_one(backward_operator))
    register_flops(getattr(torch.ops.timm_metricconv, name), getattr(torch.ops.timm_metricconv, f"{name}_backward"))

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
        if _differentiates():
            return ball_conv2d_reference(x, samples, *arguments)
        source = samples if isinstance(samples, Tensor) else samples.fields
        points = None if isinstance(samples, Tensor) else samples.points.to(source.dtype)
        if torch.compiler.is_compiling():
            # Inductor cannot keep a view for the backward pass where sizes are symbols; it fuses this copy away.
            source = source.clone()
        return operator(x, source, *arguments, points)

    return function
