"""Where a convolution reads (the lead's file replaces this one)."""

from typing import NamedTuple

from torch import Tensor


class Samples(NamedTuple):
    """y_j = p_j / (F(û_j) + eps)."""

    fields: Tensor
    points: Tensor
    eps: float
