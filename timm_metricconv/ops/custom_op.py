"""What a backend of its own kernels needs to be an operator of torch: schema, fake tensors, autograd, vmap and flops.

The samples come from a `source`: positions `[B, G·K, 2, H_out, W_out]`, or, with the pattern's `points` `[K, 2]`, the
fields `[B, G·6, H_out, W_out]` of `Samples`.

Where a graph of the backward pass is asked for (`create_graph=True`) the gradients are those of the reference, which
has derivatives of any order; the kernels have the first ones. Where `torch.func` differentiates, the reference
computes.
"""

import math
from typing import Any, Callable, List, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.utils.flop_counter import register_flop_formula

from .reference import ball_conv2d_reference
from .samples import FIELDS, Samples


class Arguments(NamedTuple):
    """What an operator takes; see `ball_conv2d` and `Samples`."""

    x: Tensor
    source: Tensor
    weight: Tensor
    bias: Optional[Tensor]
    mask: Optional[Tensor]
    stride: List[int]
    padding: List[int]
    dilation: List[int]
    groups: int
    points: Optional[Tensor] = None

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


_SCHEMA = (
    "Tensor x, Tensor source, Tensor weight, Tensor? bias, Tensor? mask, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, Tensor? points=None"
)


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


def empty_output(arguments: Arguments) -> Tensor:
    """`[B, C_out, H_out, W_out]`, channels-last."""
    x, source, weight = arguments[:3]
    return _empty(x, x.shape[0], weight.shape[0], source.shape[-2], source.shape[-1])


def empty_gradients(
    arguments: Arguments, need_x: bool, need_source: bool, need_weight: bool
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of x, source, weight and mask; an empty tensor for what is not needed."""
    x, source, weight, _, mask = arguments[:5]
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
    x, source, weight, _, mask, stride, padding, dilation, groups, points = arguments

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


def _macs(x_shape, source_shape, weight_shape) -> Tuple[int, int]:
    """Multiply-adds of the gather, four for each sample and channel, and of the matrix product."""
    samples = source_shape[0] * math.prod(weight_shape[2:]) * source_shape[-2] * source_shape[-1]
    return 4 * samples * x_shape[1], samples * weight_shape[0] * weight_shape[1]


def _flops(x_shape, source_shape, weight_shape, *others, **out_shape) -> int:
    return 2 * sum(_macs(x_shape, source_shape, weight_shape))


def _backward_flops(grad_shape, need_x, need_source, need_weight, *shapes, **out_shape) -> int:
    # two products, and the gather three times: again, against the gradient, and transposed
    gather, product = _macs(*shapes[:3])
    return 2 * (3 * gather + 2 * product)


def define(name: str, forward: Callable, gradients: Callable, device_types: Optional[str] = None) -> Callable:
    """Registers `timm_metricconv::<name>` and `timm_metricconv::<name>_backward`.

    Args:
        name: Of the operator.
        forward: (arguments, out) sets `out` `[B, C_out, H_out, W_out]`, whose `by_pixels` is contiguous.
        gradients: (arguments, grad, into) sets the `Gradients`, their `by_pixels` contiguous too; not called for a
            batch of 0.
        device_types: The devices that it runs on; by default any.

    Returns:
        The backend's function, with the arguments of `ball_conv2d_reference`.
    """
    kind: Any = {"mutates_args": (), "device_types": device_types}

    @torch.library.custom_op(f"timm_metricconv::{name}", schema=f"({_SCHEMA}) -> Tensor", **kind)
    def operator(*inputs):
        arguments = Arguments(*inputs)
        out = empty_output(arguments)
        if out.numel():
            forward(arguments, out)
        return out

    @operator.register_fake
    def _(*inputs):
        return empty_output(Arguments(*inputs))

    schema = (
        f"(Tensor grad, bool need_x, bool need_source, bool need_weight, {_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"
    )

    @torch.library.custom_op(f"timm_metricconv::{name}_backward", schema=schema, **kind)
    def backward_operator(grad, need_x, need_source, need_weight, *inputs):
        arguments = Arguments(*inputs)
        results = empty_gradients(arguments, need_x, need_source, need_weight)
        if grad.numel():
            gradients(arguments, grad, Gradients(*(t if t.numel() else None for t in results)))
        else:
            for result in results:
                result.zero_()
        return results

    @backward_operator.register_fake
    def _(grad, need_x, need_source, need_weight, *inputs):
        return empty_gradients(Arguments(*inputs), need_x, need_source, need_weight)

    def setup_context(ctx, inputs, output):
        x, source, weight, _, mask, *ctx.geometry, points = inputs
        ctx.save_for_backward(x, source, weight, mask, points)

    def backward(ctx, grad):
        x, source, weight, mask, points = ctx.saved_tensors
        need_x, need_source, need_weight, need_bias, need_mask = ctx.needs_input_grad[:5]
        arguments = Arguments(x, source, weight, None, mask, *ctx.geometry, points)
        if torch.is_grad_enabled():
            results = _of_the_reference(arguments, grad)
        else:
            results = backward_operator(grad, need_x, need_source or need_mask, need_weight, *arguments)
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
    register_flop_formula(getattr(torch.ops.timm_metricconv, name))(_flops)
    register_flop_formula(getattr(torch.ops.timm_metricconv, f"{name}_backward"))(_backward_flops)

    def function(x: Tensor, samples: Union[Tensor, Samples], *others: Any) -> Tensor:
        if _differentiates():
            return ball_conv2d_reference(x, samples, *others)
        source = samples if isinstance(samples, Tensor) else samples.fields
        points = None if isinstance(samples, Tensor) else samples.points.to(source.dtype)
        if torch.compiler.is_compiling():
            # Inductor cannot keep a view for the backward pass where sizes are symbols; it fuses this copy away.
            source = source.clone()
        return operator(x, source, *others, points)

    return function
