"""The rivals, whose samples are the lattice plus offsets: deformable, shifted, active and affine convolution."""

import math
from typing import Optional, Union

import torch
from torch import Tensor, nn

from ..geometry import PATTERNS
from ..ops import Samples
from .ball_conv import BallConv2d, IntPair


class _PredictedOffsets(BallConv2d):
    """The lattice plus predicted offsets: `offsets` of them, one for each tap or one for all."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: Optional[IntPair] = None,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        max_offset: Optional[float] = None,
        metric_groups: int = 1,
        modulated: Union[bool, str] = False,
        separable_predictor: bool = False,
        fixed_kernel: bool = False,
        init: str = "identity",
        backend: Optional[str] = None,
        device=None,
        dtype=None,
    ):
        number = isinstance(max_offset, (int, float)) and not isinstance(max_offset, bool)
        if max_offset is not None and not (number and 0 < max_offset < math.inf):
            raise ValueError(f"max_offset={max_offset!r}: expected a positive number of pixels, or None for no bound.")
        self.max_offset = None if max_offset is None else float(max_offset)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            metric_groups=metric_groups,
            modulated=modulated,
            separable_predictor=separable_predictor,
            fixed_kernel=fixed_kernel,
            init=init,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        if self.max_offset is not None:
            # each coordinate is bounded, so the farthest offset points into a corner
            farthest = PATTERNS[self.pattern](self.kernel_size[0], self.dilation).norm(dim=-1).max()
            self.max_radius = float(farthest) + math.sqrt(2) * self.max_offset

    @property
    def offsets(self) -> int:
        """Offsets of one metric group."""
        raise NotImplementedError

    @property
    def predicted(self) -> int:
        """(dy, dx) of each offset."""
        return 2 * self.offsets

    def _predicted_offsets(self, raw: Tensor) -> Tensor:
        """`[B, G, offsets, 2, H_out, W_out]` as (x, y)."""
        batch, _, height, width = raw.shape
        raw = raw[:, : 2 * self.metric_groups * self.offsets]
        # torch's older ONNX exporter fixes all sizes at an `unflatten`
        offsets = raw.reshape(batch, self.metric_groups, self.offsets, 2, height, width).flip(3)
        return offsets if self.max_offset is None else self.max_offset * torch.tanh(offsets / self.max_offset)

    def extra_repr(self) -> str:
        own = "" if self.max_offset is None else f", max_offset={self.max_offset}"
        return super().extra_repr() + own


class DeformConv2d(_PredictedOffsets):
    """Deformable convolution (Dai et al., ICCV 2017; with `modulated` DCNv2, Zhu et al., CVPR 2019).

    The predictor gives 2K channels for each metric group (torchvision's offset group) in torchvision's order, (dy, dx)
    for each tap, and with `modulated` K more for each. The arguments are those of `BallConv2d`, and:

    Args:
        max_offset: Bound in pixels on |dx| and |dy|, b·tanh(raw / b); None, as in the literature, for none.

    Raises:
        ValueError: An argument is out of its range; the message names it.
    """

    @property
    def offsets(self) -> int:
        """One for each of K taps."""
        return self.kernel_size[0] * self.kernel_size[1]

    def samples(self, raw: Tensor) -> Tensor:
        """The lattice plus the offsets."""
        return (self._predicted_offsets(raw) + self.points[0][:, :, None, None]).flatten(1, 2)


class ShiftedConv2d(_PredictedOffsets):
    """Shifted ("entire deformable") convolution: the lattice plus one offset, predicted as (dy, dx).

    The arguments are those of `DeformConv2d`.
    """

    @property
    def offsets(self) -> int:
        """One for all taps."""
        return 1

    def samples(self, raw: Tensor) -> Samples:
        """The lattice, shifted."""
        shift = self._predicted_offsets(raw)[:, :, 0]
        fields = torch.cat((_identity(shift), shift), 2)
        return Samples(fields.flatten(1, 2), self.points[0])


class ActiveConv2d(BallConv2d):
    """Active convolution (Jeon, Kim, CVPR 2017): one learned set of offsets `[G·K, 2]` as (x, y) for all pixels.

    Nothing is predicted, unless `modulated`. The arguments are those of `BallConv2d`.
    """

    @property
    def predicted(self) -> int:
        """Nothing."""
        return 0

    def reset_parameters(self) -> None:
        """Offsets start at zero; the rest as `BallConv2d`."""
        if not hasattr(self, "offset"):
            offset = self.points[0].repeat(self.metric_groups, 1)
            self.offset = nn.Parameter(torch.empty_like(offset, dtype=self.weight.dtype))
        nn.init.zeros_(self.offset)
        super().reset_parameters()

    def predict(self, x: Tensor) -> Tensor:
        """The masks' raw channels, or zero channels: `[B, G·K or 0, H_out, W_out]`."""
        if self.predictor is None:
            size = self.out_size(x)
            return self.points.new_empty((x.shape[0], 0, size[0], size[1]))
        raw = self.predictor(x)
        return raw.to(self.points.dtype)

    def samples(self, raw: Tensor) -> Tensor:
        """The lattice plus the learned offsets, the same at every pixel."""
        positions = self.points[0].repeat(self.metric_groups, 1) + self.offset.to(self.points.dtype)
        return positions[None, :, :, None, None].expand(raw.shape[0], -1, -1, raw.shape[2], raw.shape[3])


class AffineConv2d(BallConv2d):
    """The lattice under one affine map for each image, as a spatial transformer (Jaderberg et al., NeurIPS 2015).

    The predictor is a 1×1 convolution of the image's mean: A − I (row-major) and a shift (x, y). The arguments are
    those of `BallConv2d`.
    """

    @property
    def predicted(self) -> int:
        """A − I and a shift."""
        return 6

    def _make_predictor(self, channels: int, dd: dict) -> nn.Conv2d:
        return nn.Conv2d(self.in_channels, channels, 1, bias=True, **dd)

    def predict(self, x: Tensor) -> Tensor:
        """Raw channels of the image, the same at every pixel."""
        size = self.out_size(x)
        raw = self.predictor(x.mean((2, 3), keepdim=True))
        return raw.to(self.points.dtype).expand(-1, -1, size[0], size[1])

    def samples(self, raw: Tensor) -> Samples:
        """A·p + t."""
        batch, _, height, width = raw.shape
        maps = raw[:, : 6 * self.metric_groups].reshape(batch, self.metric_groups, 6, height, width)
        maps = torch.cat((maps[:, :, :4] + _identity(maps), maps[:, :, 4:]), 2)
        return Samples(maps.flatten(1, 2), self.points[0])


def _identity(maps: Tensor) -> Tensor:
    """The linear part of the identity for `[B, G, ..., H, W]`, as `[B, G, 4, H, W]`."""
    identity = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=maps.dtype, device=maps.device)[:, None, None]
    return identity.expand(maps.shape[0], maps.shape[1], 4, maps.shape[3], maps.shape[4])
