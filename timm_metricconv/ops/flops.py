"""Flop formulas of the custom ops, the gather counted, for `torch.utils.flop_counter` and all that builds on it."""

import math

from torch.utils.flop_counter import register_flop_formula

# A bilinear sample is four multiply-adds a channel.
CORNERS = 4


def _macs(x_shape, source_shape, weight_shape) -> tuple:
    """Multiply-adds of (the gather, the matrix product)."""
    samples = source_shape[0] * math.prod(weight_shape[2:]) * source_shape[-2] * source_shape[-1]
    return CORNERS * samples * x_shape[1], samples * weight_shape[0] * weight_shape[1]


def register_flops(forward, backward) -> None:
    """Tells the flop counter what a backend's forward and backward op cost."""

    @register_flop_formula(forward)
    def _forward(x_shape, source_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        return 2 * sum(_macs(x_shape, source_shape, weight_shape))

    @register_flop_formula(backward)
    def _backward(grad_shape, x_shape, source_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        # two products, and the gather three times: again, against the gradient, and transposed
        gather, product = _macs(x_shape, source_shape, weight_shape)
        return 2 * (3 * gather + 2 * product)
