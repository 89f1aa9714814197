"""Metric convolution: the unit tangent ball of an explicit Randers metric."""

import math
from typing import Optional, Tuple

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..geometry import DRIFTS, PARAMETRIZATIONS, PATTERNS, Metric, conditioned, drift_norm, max_stretch, randers
from ..ops import fuses_metric, metric_conv2d
from .ball_conv import BallConv2d, IntPair, _choice

# float32 cannot tell 1 − ε_ω from 1 below some 1e-7, and a ball would be infinite; from here on `max_radius` holds to
# 2e-4.
MIN_EPS_OMEGA = 1e-4


@register_notrace_module
class MetricConv2d(BallConv2d):
    """A convolution whose samples are the unit ball of a metric that a small convolution predicts at each pixel.

    Source: Dagès, Lindenbaum, Bruckstein, Metric Convolutions: A Unifying Theory to Adaptive Image Convolutions (ICCV
    2025, arXiv 2406.05400), section 4. `logspd` and `whitened` are this package's own.

    Args:
        in_channels: As `nn.Conv2d`; see `BallConv2d` for all that is not named here.
        out_channels: As `nn.Conv2d`.
        kernel_size: k.
        stride: As `nn.Conv2d`.
        padding: By default dilation·(k // 2).
        dilation: As `nn.Conv2d`; the patterns `onion` and `polar` ignore it, the predictor does not.
        groups: As `nn.Conv2d`.
        bias: As `nn.Conv2d`.
        parametrization: Raw channels → M: a name from `geometry.PARAMETRIZATIONS`.
        drift: Raw channels → ω: a name from `geometry.DRIFTS`.
        pattern: Points that the ball bends: a name from `geometry.PATTERNS`.
        eps_omega: ε_ω from 1e-4 to 1, the margin of the drift: ‖ω‖_{M⁻¹} < 1 − ε_ω. 1 means no drift (Riemannian).
        scale: (s_min, s_max) of `spectral_scale` and `spectral_scale_ratio`.
        modulated: See `BallConv2d`.
        fixed_kernel: See `BallConv2d`.
        init: See `BallConv2d`.
        backend: See `BallConv2d`.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        max_radius: No sample is farther from its centre than this, in pixels; infinite unless M is bounded (`logspd`).

    Raises:
        ValueError: An argument is out of its range; the message names it.
    """

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
        parametrization: str = "logspd",
        drift: str = "whitened",
        pattern: str = "lattice",
        eps_omega: float = 0.5,
        scale: Tuple[float, float] = (0.1, 1.5),
        modulated: bool = False,
        fixed_kernel: bool = False,
        init: str = "identity",
        backend: Optional[str] = None,
        device=None,
        dtype=None,
    ):
        row = PARAMETRIZATIONS[_choice("parametrization", parametrization, list(PARAMETRIZATIONS))]
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            predicted=row.channels,
            modulated=modulated,
            fixed_kernel=fixed_kernel,
            init=init,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        if not isinstance(eps_omega, (int, float)) or not MIN_EPS_OMEGA <= eps_omega <= 1:
            raise ValueError(f"eps_omega={eps_omega!r}: expected a number from {MIN_EPS_OMEGA} to 1.")
        numbers = isinstance(scale, (tuple, list)) and all(isinstance(s, (int, float)) for s in scale)
        if not numbers or len(scale) != 2 or not 0 < scale[0] <= scale[1] < math.inf:
            raise ValueError(f"scale={scale}: expected (s_min, s_max) with 0 < s_min ≤ s_max.")
        self.parametrization, self.drift = parametrization, _choice("drift", drift, list(DRIFTS))
        self.pattern = _choice("pattern", pattern, list(PATTERNS))
        self.eps_omega, self.scale = float(eps_omega), (float(scale[0]), float(scale[1]))
        self.channels = row.channels
        # plain functions, so that TorchScript can compile them
        self._to_metric, self._to_drift = row.function, DRIFTS[drift]
        self._bounded = math.isfinite(row.log_bound)
        # The paper divides by F + ε; a bounded metric has F far above zero.
        self._eps = 0.0 if self._bounded else 1e-6
        self._tabulate()
        radius = float(torch.linalg.vector_norm(PATTERNS[pattern](self.kernel_size[0], self.dilation)[0], dim=-1).max())
        radius *= float(PATTERNS[pattern](self.kernel_size[0], self.dilation)[1].max())
        self.max_radius = radius * max_stretch(row.log_bound, self.eps_omega) if self._bounded else math.inf
        self.reset_parameters()

    def reset_predictor(self) -> None:
        """Identity: weight zero, and the bias for which M = I, ω = 0. Paper: the authors' rows, bias zero."""
        row = PARAMETRIZATIONS[self.parametrization]
        weight, bias = self.predictor.weight, self.predictor.bias
        if self.init == "identity":
            nn.init.zeros_(weight)
            values = torch.zeros(len(bias), dtype=torch.float64, device="cpu")
            values[: row.channels - 2] = torch.tensor(row.identity(self.scale), dtype=torch.float64, device="cpu")
            with torch.no_grad():
                bias.copy_(values)
            return
        self.predictor.reset_parameters()
        with torch.no_grad():
            bias.zero_()
            for channel in range(len(weight)):
                if channel in row.uniform_rows:
                    weight[channel] = 1 / weight[channel].numel()
                elif channel not in row.default_rows:
                    weight[channel] = 1e-6

    def _randers(self, raw: Tensor) -> Tuple[Metric, Tensor]:
        """Raw channels → the metric's components `[B, H_out, W_out]` and ω `[B, H_out, W_out, 2]`."""
        raw = raw.contiguous().permute(0, 2, 3, 1)  # dense images for every channel
        metric = self._to_metric(raw[..., : self.channels - 2], self.scale)
        if not self._bounded:
            metric = conditioned(metric)
        if self.eps_omega == 1.0:
            return metric, torch.zeros_like(raw[..., :2])
        omega = self._to_drift(raw[..., self.channels - 2 : self.channels], metric, self.eps_omega)
        if not self._bounded:
            # The ε inside the paper's norm underestimates it for small metrics, and the law ‖ω‖ < 1 comes first.
            omega = omega * ((1 - 0.5 * self.eps_omega) / drift_norm(omega, metric)).clamp(max=1)[..., None]
        return metric, omega

    def ball(self, raw: Tensor) -> Tensor:
        """y_j = r_j·û_j / F(û_j)."""
        metric, omega = self._randers(raw)
        value = randers(self.directions, metric, omega, self.eps_omega, self._bounded)
        if not self._bounded:
            value = value + self._eps
        stretch = value.reciprocal()[:, :, :, None]
        # [2, B, H_out, W_out, R, D]: a plane for x and one for y, a trailing dimension of 2 would be slow
        planes = torch.stack((stretch * self.points[..., 0], stretch * self.points[..., 1]))
        return planes.flatten(4).permute(1, 4, 0, 2, 3)

    @torch.jit.unused
    def _convolve(self, x: Tensor, raw: Tensor, mask: Optional[Tensor]) -> Tensor:
        # a subclass may have a ball of its own, which is then what counts
        if type(self).ball is not MetricConv2d.ball or not fuses_metric(x, self.weight, self.backend):
            return super()._convolve(x, raw, mask)
        (a, b, d, _), omega = self._randers(raw)
        fields = torch.stack((a, b, d, omega[..., 0], omega[..., 1]), -1).permute(0, 3, 1, 2)
        geometry = self.stride, self.padding, self.dilation, self.groups
        points = self.points.flatten(0, 1)
        arguments = x, fields, points, self.weight, self.bias, mask, *geometry, self.eps_omega, self._eps
        return metric_conv2d(*arguments, self.backend)

    @torch.jit.ignore
    def metric(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """The predicted metric.

        Args:
            x: Input `[B, C_in, H, W]`.

        Returns:
            M `[B, 2, 2, H_out, W_out]`, symmetric positive definite, and ω `[B, 2, H_out, W_out]`, as (x, y), in units
            of one over pixels.
        """
        (a, b, d, _), omega = self._randers(self.predict(x))
        return torch.stack((torch.stack((a, b), 1), torch.stack((b, d), 1)), 1), omega.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        own = f"parametrization={self.parametrization!r}, drift={self.drift!r}, pattern={self.pattern!r}"
        return f"{super().extra_repr()}, {own}, eps_omega={self.eps_omega}"
