"""A depthwise `ball_conv2d` of very many taps: a slice of the kernel at a time, so that memory does not grow with k."""

from typing import Callable, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import ball_conv2d

# The indices of n taps, and a function of the geometry's tensors that returns their positions.
Slice = Tuple[Tensor, Callable[..., Tensor]]


def _term(part: Slice, x: Tensor, weight: Tensor, *tensors: Tensor) -> Tensor:
    taps, ball = part
    positions = ball(*tensors)
    # of few channels, reading planes beats a channels-last gather
    backend = "grid_sample" if x.shape[1] <= 16 else None
    with torch.autocast(x.device.type, enabled=False):
        return ball_conv2d(x, positions, weight[:, :, taps], groups=x.shape[1], backend=backend)


class _SumOfSlices(torch.autograd.Function):
    """Σ of the slices' terms. One node for all: a checkpoint each leaves small objects that fragment the heap."""

    @staticmethod
    def forward(ctx, slices, x, weight, *tensors):
        ctx.slices = slices
        ctx.save_for_backward(x, weight, *tensors)
        out = torch.zeros_like(x)
        for part in slices:
            out += _term(part, x, weight, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        needed = ctx.needs_input_grad[1:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
        wanted = [t for t in inputs if t.requires_grad]
        totals = [torch.zeros_like(t) for t in wanted]
        for part in ctx.slices:
            with torch.enable_grad():
                term = _term(part, *inputs)
            for total, share in zip(totals, torch.autograd.grad(term, wanted, grad), strict=True):
                total += share
        return None, *(totals.pop(0) if need else None for need in needed)


def sliced_conv2d(x: Tensor, weight: Tensor, slices: Sequence[Slice], *tensors: Tensor) -> Tensor:
    """`ball_conv2d` of free taps, each channel by itself, a slice of the kernel at a time.

    Args:
        x: Image `[B, C, H, W]`.
        weight: `[C, 1, K]`.
        slices: For each slice the indices of its n taps and a function of `tensors` that returns the taps' positions
            `[B, n, 2, H, W]`.
        *tensors: The geometry. Nothing else is kept for the backward pass, which can be taken once.

    Returns:
        `[B, C, H, W]`.
    """
    return _SumOfSlices.apply(slices, x, weight, *tensors)
