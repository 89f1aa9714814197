"""Metric convolution: the unit tangent ball, or the unit geodesic ball, of an explicit Randers metric."""

import math
from typing import Optional, Tuple, Union

import torch
from torch import Tensor, nn

from ..geometry import (
    DRIFTS,
    PARAMETRIZATIONS,
    PATTERNS,
    Metric,
    Navigation,
    Parametrization,
    Root,
    affine_fields,
    frame_of,
    geodesic_positions,
    navigation_of,
    randers_of,
    ray_positions,
)
from ..geometry.drifts import within_the_disk
from ..geometry.navigation import frame_root
from ..geometry.parametrizations import FRAME_BOUND
from ..ops import Samples
from .ball_conv import BallConv2d, IntPair, _choice

# float32 cannot tell 1 − ε_ω from 1 below some 1e-7, and a ball would be infinite; from here on `max_radius` holds to
# 2e-4.
MIN_EPS_OMEGA = 1e-4


def check_ball(ball: str, steps: int) -> Tuple[str, int]:
    """Refuses another ball than a tangent or a geodesic one, or a number of steps that is none."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r}: expected a positive integer.")
    return _choice("ball", ball, ("tangent", "geodesic")), steps


class MetricConv2d(BallConv2d):
    """A convolution whose samples are the unit ball of a metric that a small convolution predicts at each pixel.

    Source: Dagès, Lindenbaum, Bruckstein, Metric Convolutions: A Unifying Theory to Adaptive Image Convolutions (ICCV
    2025, arXiv 2406.05400), section 4. Navigation, `frame`, `logspd`, `whitened` and the way to the geodesic ball are
    this package's own; `PAPER` has the paper's choices.

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
        drift: Raw channels → ω: a name from `geometry.DRIFTS`; of `frame` it gives the wind w.
        sampling: How the tangent ball is sampled. "navigation": a frame bends the pattern and a wind carries it, y =
            B(p + ρw), ρ = dilation for `lattice` and 1 for the others. "rays" (the paper's): y = p / F(û).
        pattern: Points that the ball bends: a name from `geometry.PATTERNS`.
        eps_omega: ε_ω from 1e-4 to 1, the margin of the drift: ‖ω‖_{M⁻¹} < 1 − ε_ω. 1 means no drift (Riemannian).
        scale: (s_min, s_max) of `spectral_scale` and `spectral_scale_ratio`.
        ball: "tangent" (the metric of the pixel alone) or "geodesic" (the metrics on the way from it, the paper's UGB).
        steps: Of a geodesic, see `geometry.geodesic_positions`.
        metric_groups: See `BallConv2d`.
        modulated: See `BallConv2d`.
        separable_predictor: See `BallConv2d`.
        fixed_kernel: See `BallConv2d`.
        init: See `BallConv2d`.
        backend: See `BallConv2d`.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        max_radius: No sample is farther from its centre than this, in pixels; infinite unless the parametrization is
            bounded (`frame` and `logspd` with `whitened`).

    Raises:
        ValueError: An argument is out of its range; the message names it.

    Example:
        >>> layer, x = MetricConv2d(8, 16, 3), torch.randn(2, 8, 32, 32)
        >>> layer(x).shape
        torch.Size([2, 16, 32, 32])
        >>> layer.positions(x).shape  # where each of the 9 taps reads
        torch.Size([2, 9, 2, 32, 32])
        >>> M, omega = layer.metric(x)  # [2, 2, 2, 32, 32] and [2, 2, 32, 32]
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
        parametrization: str = "frame",
        drift: str = "whitened",
        sampling: str = "navigation",
        pattern: str = "lattice",
        eps_omega: float = 0.1,
        scale: Tuple[float, float] = (0.1, 1.5),
        ball: str = "tangent",
        steps: int = 1,
        metric_groups: int = 1,
        modulated: Union[bool, str] = False,
        separable_predictor: bool = False,
        fixed_kernel: bool = False,
        init: str = "identity",
        backend: Optional[str] = None,
        device=None,
        dtype=None,
    ):
        row = PARAMETRIZATIONS[_choice("parametrization", parametrization, list(PARAMETRIZATIONS))]
        if not isinstance(eps_omega, (int, float)) or not MIN_EPS_OMEGA <= eps_omega <= 1:
            raise ValueError(f"eps_omega={eps_omega!r}: expected a number from {MIN_EPS_OMEGA} to 1.")
        numbers = isinstance(scale, (tuple, list)) and all(isinstance(s, (int, float)) for s in scale)
        if not numbers or len(scale) != 2 or not 0 < scale[0] <= scale[1] < math.inf:
            raise ValueError(f"scale={scale}: expected (s_min, s_max) with 0 < s_min ≤ s_max.")
        # before the base class finishes the construction, which needs them
        self.parametrization, self.drift = parametrization, _choice("drift", drift, list(DRIFTS))
        self.sampling = _choice("sampling", sampling, ("navigation", "rays"))
        self.pattern = _choice("pattern", pattern, list(PATTERNS))
        self.eps_omega, self.scale = float(eps_omega), (float(scale[0]), float(scale[1]))
        self.channels, self.eps = row.channels, row.eps
        self.ball, self.steps = check_ball(ball, steps)
        # plain functions, so that TorchScript can compile them
        self._to_root, self._to_drift = row.function, DRIFTS[drift]
        self._framed, self._whitened = parametrization == "frame", drift == "whitened"
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
        step = [float(d) if pattern == "lattice" else 1.0 for d in self.dilation]
        self.wind_step = (step[1], step[0])
        if row.least and self._whitened:
            self.max_radius = self._reach(1 / row.least)

    def _reach(self, semi_axis: float) -> float:
        """The distance that no sample exceeds, where no axis of the ball without drift does `semi_axis`."""
        points = PATTERNS[self.pattern](self.kernel_size[0], self.dilation)
        farthest, size = float(torch.linalg.vector_norm(points, dim=-1).max()), 1 - self.eps_omega
        navigated = self.sampling == "navigation" and self.ball == "tangent"
        if navigated:
            farthest += size * max(self.wind_step)
        if self._framed and self.ball == "tangent":
            # ‖B(d + w)‖ with ‖B‖ ≤ 1 + β
            return (1 + FRAME_BOUND) * (farthest if navigated else farthest * (1 + size))
        # ‖B‖ ≤ ‖A⁻¹‖ / λ; and F ≥ (1 − ‖v‖)·‖A·û‖
        return farthest * semi_axis / (1 - size * size if navigated else 1 - size)

    @property
    def predicted(self) -> int:
        """The parametrization's channels and two of the drift."""
        return self.channels

    def reset_predictor(self) -> None:
        """Identity: weight zero, and the bias for which M = I, ω = 0. Paper: the authors' rows, bias zero.

        The depthwise part of a separable predictor as in `BallConv2d.reset_predictor`.
        """
        super().reset_predictor()
        row, head = PARAMETRIZATIONS[self.parametrization], self.predictor_head()
        assert head is not None, "a metric is predicted"
        init_predictor(head, row, self.init, self.scale, self.metric_groups)

    def _channels(self, raw: Tensor) -> Tensor:
        """The raw channels of each metric group, `[B, H_out, W_out, G, channels]`."""
        batch, _, height, width = raw.shape
        raw = raw[:, : self.metric_groups * self.channels].contiguous()  # dense images for every channel
        # torch's older ONNX exporter fixes all sizes at an `unflatten`
        return raw.reshape(batch, self.metric_groups, self.channels, height, width).permute(0, 3, 4, 1, 2)

    def _drift(self, raw: Tensor, root: Root) -> Tuple[Tensor, Tensor]:
        if self.eps_omega == 1.0:
            return torch.zeros_like(root.a), torch.zeros_like(root.a)
        return self._to_drift(raw[..., self.channels - 2 :], root, self.eps_omega)

    def _predicted_frame(self, raw: Tensor) -> Navigation:
        """Channels of `frame` → the frames and the winds in them, components `[B, H_out, W_out, G]`."""
        b = frame_of(raw[..., : self.channels - 2])
        if self._whitened and self.eps_omega < 1.0:  # no root, which would be half of all that is computed here
            x, y = within_the_disk(raw[..., self.channels - 2 :], self.eps_omega)
        else:
            x, y = self._drift(raw, frame_root(b))
        return Navigation(b.xx, b.xy, b.yx, b.yy, x, y)

    def _predicted_metric(self, raw: Tensor) -> Metric:
        """Channels of the others → the metrics in whitened form, components `[B, H_out, W_out, G]`."""
        root = self._to_root(raw[..., : self.channels - 2], self.scale)
        x, y = self._drift(raw, root)
        return Metric(root.a, root.b, root.d, x, y)

    def _metric(self, raw: Tensor) -> Metric:
        return randers_of(self._predicted_frame(raw)) if self._framed else self._predicted_metric(raw)

    def samples(self, raw: Tensor) -> Union[Tensor, Samples]:
        """The unit balls: affine maps of the pattern, or positions on rays or on geodesics."""
        raw = self._channels(raw)
        if self.ball == "tangent" and self.sampling == "navigation":
            navigated = self._predicted_frame(raw) if self._framed else navigation_of(self._predicted_metric(raw))
            fields = affine_fields(navigated, self.wind_step)
            return Samples(fields.flatten(3).permute(0, 3, 1, 2), self.points.flatten(0, 1))
        metric = self._metric(raw)
        if self.ball == "tangent":
            return ray_positions(metric, self.points, self.eps)
        fields = torch.stack((metric.a, metric.b, metric.d, metric.x, metric.y), -1)  # [B, H_out, W_out, G, 5]
        fields = fields.permute(0, 3, 4, 1, 2).flatten(0, 1)
        spacing = (float(self.stride[0]), float(self.stride[1]))
        positions = geodesic_positions(fields, self.points, self.steps, spacing)
        taps = self.metric_groups * self.points.shape[0] * self.points.shape[1]
        return positions.reshape(raw.shape[0], taps, 2, raw.shape[1], raw.shape[2])

    @torch.jit.ignore
    def metric(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """The predicted metric.

        Args:
            x: Input `[B, C_in, H, W]`, or without B, as what is returned.

        Returns:
            M `[B, 2, 2, H_out, W_out]`, symmetric positive definite, and ω `[B, 2, H_out, W_out]`, as (x, y), in units
            of one over pixels. With `metric_groups` above 1 the groups are a dimension after B.
        """
        if x.dim() == 3:
            m, omega = self.metric(x[None])
            return m[0], omega[0]
        m, omega = self._metric(self._channels(self.predict(x))).tensors()
        m, omega = m.permute(0, 3, 4, 5, 1, 2), omega.permute(0, 3, 4, 1, 2)
        return (m[:, 0], omega[:, 0]) if self.metric_groups == 1 else (m, omega)

    def extra_repr(self) -> str:
        own = f"parametrization={self.parametrization!r}, drift={self.drift!r}, sampling={self.sampling!r}"
        own += f", pattern={self.pattern!r}"
        geodesic = f", ball='geodesic', steps={self.steps}" if self.ball == "geodesic" else ""
        return f"{super().extra_repr()}, {own}, eps_omega={self.eps_omega}{geodesic}"


@torch.no_grad()
def init_predictor(
    predictor: nn.Conv2d, row: Parametrization, init: str, scale: Tuple[float, float], metric_groups: int = 1
) -> None:
    """Initialises a predictor of metrics, and of masks after them; see `MetricConv2d.reset_predictor`."""
    assert predictor.bias is not None, "predictors have one"
    shape, device = predictor.weight.shape, predictor.weight.device
    dtype = torch.promote_types(predictor.bias.dtype, torch.float32)
    weight, bias = torch.zeros(shape, device=device), torch.zeros(shape[0], dtype=dtype, device=device)
    if init == "identity":
        values = torch.tensor(row.identity(scale), dtype=bias.dtype, device="cpu")
        bias[: metric_groups * row.channels].view(metric_groups, row.channels)[:, : row.channels - 2] = values.to(bias)
    else:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # as nn.Conv2d
        for number, channel in enumerate(weight):
            kind = number % row.channels if number < metric_groups * row.channels else -1
            if kind in row.uniform_rows:
                channel.fill_(1 / channel.numel())
            elif kind not in row.default_rows:
                channel.fill_(1e-6)
    for parameter, new in ((predictor.weight, weight), (predictor.bias, bias)):
        if hasattr(parameter, "device_mesh"):  # a shard of FSDP2 takes no plain tensor
            from torch.distributed.tensor import distribute_tensor

            new = distribute_tensor(new, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
        parameter.copy_(new)
