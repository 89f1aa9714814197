"""The rivals, whose balls are the lattice plus offsets: deformable, shifted, active and affine convolution."""

from typing import Optional

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .ball_conv import BallConv2d, IntPair, _int_pair


class _OffsetConv2d(BallConv2d):
    """A subclass says how many channels it predicts for K taps, and what its ball is."""

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
        modulated: bool = False,
        fixed_kernel: bool = False,
        init: str = "identity",
        backend: Optional[str] = None,
        device=None,
        dtype=None,
    ):
        k = _int_pair("kernel_size", kernel_size, 1)[0]
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            predicted=self._predicted(k * k),
            modulated=modulated,
            fixed_kernel=fixed_kernel,
            init=init,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self._tabulate()
        self.reset_parameters()

    @staticmethod
    def _predicted(taps: int) -> int:
        raise NotImplementedError


@register_notrace_module
class DeformConv2d(_OffsetConv2d):
    """Deformable convolution (Dai et al., ICCV 2017; with `modulated` DCNv2, Zhu et al., CVPR 2019).

    The predictor gives 2K channels in torchvision's order, (dy, dx) for each tap, and with `modulated` K more. The
    arguments are those of `BallConv2d`.
    """

    @staticmethod
    def _predicted(taps: int) -> int:
        return 2 * taps

    def ball(self, raw: Tensor) -> Tensor:
        """The lattice plus K offsets."""
        taps = self.kernel_size[0] * self.kernel_size[1]
        offsets = raw[:, : 2 * taps].permute(0, 2, 3, 1).unflatten(-1, (taps, 2)).flip(-1)
        return (offsets + self.points[0]).permute(0, 3, 4, 1, 2)


@register_notrace_module
class ShiftedConv2d(_OffsetConv2d):
    """Shifted ("entire deformable") convolution: the lattice plus one offset, predicted as (dy, dx).

    The arguments are those of `BallConv2d`.
    """

    @staticmethod
    def _predicted(taps: int) -> int:
        return 2

    def ball(self, raw: Tensor) -> Tensor:
        """The lattice plus one offset."""
        offset = raw[:, :2].permute(0, 2, 3, 1).flip(-1)
        return (offset[:, :, :, None] + self.points[0]).permute(0, 3, 4, 1, 2)


@register_notrace_module
class ActiveConv2d(_OffsetConv2d):
    """Active convolution (Jeon, Kim, CVPR 2017): one learned set of offsets `[K, 2]` as (x, y) for all pixels.

    Nothing is predicted, unless `modulated`. The arguments are those of `BallConv2d`.
    """

    @staticmethod
    def _predicted(taps: int) -> int:
        return 0

    def reset_parameters(self) -> None:
        self.offset = nn.Parameter(torch.zeros_like(self.points[0], dtype=self.weight.dtype))
        super().reset_parameters()

    def predict(self, x: Tensor) -> Tensor:
        """The masks' raw channels, or zero channels: `[B, K or 0, H_out, W_out]`."""
        if self.predictor is None:
            size = self.out_size(x)
            return self.points.new_empty((x.shape[0], 0, size[0], size[1]))
        raw = self.predictor(x)
        return raw.to(self.points.dtype)

    def ball(self, raw: Tensor) -> Tensor:
        """The lattice plus the learned offsets, the same at every pixel."""
        points = (self.points[0] + self.offset.to(self.points.dtype))[None, :, :, None, None]
        return points.expand(raw.shape[0], -1, -1, raw.shape[2], raw.shape[3])


@register_notrace_module
class AffineConv2d(_OffsetConv2d):
    """The lattice under one affine map for each image, as a spatial transformer (Jaderberg et al., NeurIPS 2015).

    The predictor is a 1×1 convolution of the image's mean: A − I (row-major) and a shift (x, y). The arguments are
    those of `BallConv2d`.
    """

    @staticmethod
    def _predicted(taps: int) -> int:
        return 6

    def _make_predictor(self, channels: int, dd: dict) -> nn.Conv2d:
        return nn.Conv2d(self.in_channels, channels, 1, bias=True, **dd)

    def predict(self, x: Tensor) -> Tensor:
        """Raw channels of the image, the same at every pixel."""
        size = self.out_size(x)
        raw = self.predictor(x.mean((2, 3), keepdim=True))
        return raw.to(self.points.dtype).expand(-1, -1, size[0], size[1])

    def ball(self, raw: Tensor) -> Tensor:
        """A·p + t."""
        raw = raw[:, :6].permute(0, 2, 3, 1)[..., None, :]
        x, y = self.points[0, :, 0], self.points[0, :, 1]
        mapped_x = x + raw[..., 0] * x + raw[..., 1] * y + raw[..., 4]
        mapped_y = y + raw[..., 2] * x + raw[..., 3] * y + raw[..., 5]
        return torch.stack((mapped_x, mapped_y), -1).permute(0, 3, 4, 1, 2)
