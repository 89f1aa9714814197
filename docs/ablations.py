"""Convolutions that the package does not have, each a question to the default one: python docs/ablations.py --config
configs/results_ablations.yaml is scripts/compare.py with them.

Which bounds hold a frame and its wind in place, and where between the metric's 6 numbers and the deformable one's 18
does the gain end?
"""

import torch
from timm.layers import LayerNorm2d
from torch import nn

from timm_metricconv import DeformConv2d, MetricConv2d
from timm_metricconv.geometry import affine_fields
from timm_metricconv.geometry.parametrizations import frame_of
from timm_metricconv.layers import LAYERS
from timm_metricconv.ops import Samples, place
from timm_metricconv.recipes import compare
from timm_metricconv.recipes.config import main


class WindConv2d(MetricConv2d):
    """The wind moves the pattern by at most `reach` steps of the lattice, whatever the frame, and not by B(ρ·w)."""

    reach: float

    def samples(self, raw):
        frame = self._predicted_frame(self._channels(raw))
        fields = affine_fields(frame, self.wind_step)
        wind = torch.stack([self.reach * step * w for step, w in zip(self.wind_step, frame[4:], strict=True)], -1)
        fields = torch.cat((fields[..., :4], wind), -1)
        return Samples(fields.flatten(3).permute(0, 3, 1, 2), self.points.flatten(0, 1))


class BoundConv2d(MetricConv2d):
    """B = I + N with ‖N‖ below `bound`, and a wind of B(ρ·w) as in the default.

    From 1 on B may become singular and mirror the pattern. At 0.32 the outermost taps of a 7×7 kernel move by the pixel
    that the default's 0.95 moves those of a 3×3 one.
    """

    bound: float

    def _predicted_frame(self, raw):
        own = super()._predicted_frame(raw)
        return own._replace(**frame_of(raw[..., :4], self.bound)._asdict())


class SymmetricConv2d(MetricConv2d):
    """The default's frame with N symmetric: it stretches within the same bound and does not turn."""

    def _predicted_frame(self, raw):
        a, b, c, d, *wind = raw.unbind(-1)
        return super()._predicted_frame(torch.stack((a, (b + c) / 2, (b + c) / 2, d, *wind), -1))


class HybridConv2d(MetricConv2d):
    """The default's ball, and an offset of each tap within `residual` pixels: 6 + 2K numbers."""

    residual: float

    @property
    def predicted(self):
        return self.channels + 2 * self.kernel_size[0] * self.kernel_size[1]

    def samples(self, raw):
        own = place(super().samples(raw[:, : self.channels]))
        offsets = raw[:, self.channels :].unflatten(1, (-1, 2))
        return own + self.residual * torch.tanh(offsets / self.residual)


class PolynomialConv2d(DeformConv2d):
    """Offsets within a pixel that are a polynomial of this degree in the tap's place: 6 numbers for 1, 12 for 2.

    Degree 1 is an affine map whose bound is on its samples and not on its frame.
    """

    degree: int

    @property
    def offsets(self):
        return (self.degree + 1) * (self.degree + 2) // 2

    def samples(self, raw):
        x, y = self.points.flatten(0, 1).T
        powers = [x**i * y**j for i in range(self.degree + 1) for j in range(self.degree + 1 - i)]
        basis = torch.linalg.qr(torch.stack(powers, 1)).Q * len(x) ** 0.5  # each moves a tap as far as one offset does
        offsets = torch.einsum("ki,bgidhw->bgkdhw", basis, self._predicted_offsets(raw))
        return (torch.tanh(offsets) + self.points.flatten(0, 1)[:, :, None, None]).flatten(1, 2)


class _NormedDepthwise(nn.Conv2d):
    def __init__(self, channels, *args, **kwargs):
        super().__init__(channels, *args, **kwargs)
        self.norm = LayerNorm2d(channels, device=kwargs["device"], dtype=kwargs["dtype"])

    def forward(self, x):
        return nn.functional.gelu(self.norm(super().forward(x)))


class NormedPredictor:
    """A separable predictor with a norm and an activation between its two convolutions, as DCNv3 has them."""

    def _make_predictor(self, channels, dd):
        self.separable_predictor = True
        depthwise, pointwise = super()._make_predictor(channels, dd)
        same = {name: getattr(depthwise, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups")}
        channels = depthwise.in_channels
        return nn.Sequential(_NormedDepthwise(channels, channels, **same, bias=False, **dd), pointwise)


class NormedMetricConv2d(NormedPredictor, MetricConv2d):
    """The metric convolution with that predictor."""


class NormedDeformConv2d(NormedPredictor, DeformConv2d):
    """The deformable convolution with that predictor."""


def with_(base, **attributes):
    return type(base.__name__, (base,), attributes)


LAYERS |= {
    "metric-normed": NormedMetricConv2d,
    "deform-normed": NormedDeformConv2d,
    "frame-symmetric": SymmetricConv2d,
    "frame-free": with_(BoundConv2d, bound=1e4),
    **{f"frame-{bound}": with_(BoundConv2d, bound=bound) for bound in (0.25, 0.32, 0.5, 2)},
    **{f"wind-{reach}": with_(WindConv2d, reach=reach) for reach in (0.5, 1, 2)},
    **{f"hybrid-{residual}": with_(HybridConv2d, residual=residual) for residual in (0.25, 1)},
    **{f"polynomial-{degree}": with_(PolynomialConv2d, degree=degree) for degree in (1, 2)},
}
compare.OTHERS += tuple(name for name in LAYERS if "-" in name)

if __name__ == "__main__":
    main(compare.compare, compare.CompareConfig, __doc__)
