"""Image filters: one metric or deformable convolution of any size, computed in slices of its kernel.

A filter of k = 121 reads 14641 samples at a pixel. Here a few taps at a time are placed, read and summed, and the
backward pass places them again, so that memory depends on the image and not on k. The geometry may come from the image
by a formula (`ImageMetricFilter2d`), be a free parameter at every pixel (`size=`), or be predicted by a convolution.
"""

from typing import Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import DRIFTS, PARAMETRIZATIONS, PATTERNS, Metric, geodesic_positions, image_metric, ray_positions
from ..geometry.parametrizations import EPS_L
from ..layers.ball_conv import _choice
from ..layers.metric import check_ball, init_predictor
from .sliced import Slice, sliced_conv2d

# Samples (taps × pixels × images) that are in memory at once: a dozen tensors of this many float32 numbers.
SLICE_SIZE = 2**20


def _ranges(total: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(i, min(i + step, total)) for i in range(0, total, step))


def _steps(ball: str, steps: int) -> int:
    return {"tangent": 0, "geodesic": steps}[check_ball(ball, steps)[0]]


class _Filter(nn.Module):
    """What the filters share: k odd, the image's size kept, each channel filtered by itself, no bias.

    A subclass says how many channels its predictor has, what its free parameters are, and its geometry.
    """

    predicted = 0
    points: Tensor

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        size: Optional[Sequence[int]],
        centre: bool,
        slice_size: int,
        pattern: str,
        fixed_kernel: bool,
    ):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: a filter needs an odd one, to sit on its pixel.")
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"size={size}: expected (height, width).")
        points = PATTERNS[_choice("pattern", pattern, list(PATTERNS))](kernel_size)
        self.channels, self.kernel_size, self.pattern = channels, kernel_size, pattern
        self.size, self.slice_size = None if size is None else (size[0], size[1]), slice_size
        self.register_buffer("points", points.to(torch.get_default_dtype()), persistent=False)
        taps, learnt = kernel_size**2, not fixed_kernel
        share = 1 / (taps + centre)
        self.weight = nn.Parameter(torch.full((channels, 1, taps), share), requires_grad=learnt)
        self.centre = nn.Parameter(torch.full((channels,), share), requires_grad=learnt) if centre else None
        self.predictor = None
        if size is None and self.predicted:
            self.predictor = nn.Conv2d(channels, self.predicted, kernel_size, padding=kernel_size // 2)

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"input: expected [B, {self.channels}, H, W], got {tuple(x.shape)}.")
        if self.size is not None and tuple(x.shape[2:]) != self.size:
            raise ValueError(f"input: the geometry is one for images of {self.size}, got {tuple(x.shape[2:])}.")

    def _geometry(self, x: Tensor) -> Iterator[Tuple[List[Slice], Tuple[Tensor, ...]]]:
        """Slices of the kernel with the tensors that place them, as `sliced_conv2d` takes them."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → `[B, C, H, W]`."""
        self._check(x)
        out = torch.zeros_like(x) if self.centre is None else self.centre[:, None, None] * x
        for slices, tensors in self._geometry(x):
            out = out + sliced_conv2d(x, self.weight, slices, *tensors)
        return out

    def positions_at(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Positions at the n pixels (rows, columns), `[B, K, 2, n]`, without the centre sample."""
        parts = [(taps, ball(*tensors)) for slices, tensors in self._geometry(x) for taps, ball in slices]
        order = torch.cat([taps for taps, _ in parts]).argsort()
        return torch.cat([positions[..., rows, columns] for _, positions in parts], 1)[:, order]


class _MetricFilter(_Filter):
    """The unit balls of a metric: `steps` of a geodesic, 0 for tangent balls; `eps` is `geometry.ray_positions`'."""

    steps = 0
    eps = 0.0

    def metric(self, x: Tensor) -> Metric:
        """The metrics in whitened form, components `[B, H, W]`."""
        raise NotImplementedError

    def _geometry(self, x: Tensor) -> Iterator[Tuple[List[Slice], Tuple[Tensor, ...]]]:
        fields = torch.stack(tuple(self.metric(x)), 1)  # [B, 5, H, W]
        points, count = self.points, max(1, self.slice_size // max(1, fields[:, 0].numel()))
        # a geodesic is followed once, so all radii of a direction are in the same slice
        rows = points.shape[0] if self.steps else min(count, points.shape[0])
        index = torch.arange(points.shape[0] * points.shape[1], device=points.device).view(points.shape[:2])

        def part(rings: slice, rays: slice) -> Slice:
            def ball(fields: Tensor) -> Tensor:
                here = points[rings, rays].to(fields)
                if self.steps:
                    return geodesic_positions(fields, here, self.steps)
                return ray_positions(Metric(*fields[:, :, :, :, None].unbind(1)), here, self.eps)

            return index[rings, rays].flatten(), ball

        columns = list(_ranges(points.shape[1], count // rows))
        yield [part(r, c) for c in columns for r in _ranges(points.shape[0], rows)], (fields,)


class MetricFilter2d(_MetricFilter):
    """A metric convolution as an image filter; the paper's choices are the defaults.

    Args:
        channels: Each is filtered by itself, at the same places.
        kernel_size: k, odd.
        size: (height, width) for a geometry that is a free parameter at every pixel of images of this size (parameter
            `raw`); by default a convolution predicts it, as in `MetricConv2d`.
        centre: One more sample, in the centre.
        slice_size: Most taps × pixels × images that are in memory at once.
        parametrization: See `MetricConv2d`.
        drift: See `MetricConv2d`.
        pattern: See `MetricConv2d`.
        eps_omega: See `MetricConv2d`.
        ball: See `MetricConv2d`. The geodesics of one direction, with all its radii, are in memory at once.
        steps: See `MetricConv2d`.
        fixed_kernel: Uniform and without gradient (FKW), or learnable from uniform on (LKW).

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        size: Optional[Sequence[int]] = None,
        centre: bool = False,
        slice_size: int = SLICE_SIZE,
        parametrization: str = "cholesky",
        drift: str = "sigmoid_norm",
        pattern: str = "polar",
        eps_omega: float = 0.5,
        ball: str = "tangent",
        steps: int = 1,
        fixed_kernel: bool = True,
    ):
        # on rays there is no frame that could turn a pattern
        metrics = [name for name in PARAMETRIZATIONS if name != "frame"]
        row = PARAMETRIZATIONS[_choice("parametrization", parametrization, metrics)]
        self.parametrization, self.drift = parametrization, _choice("drift", drift, list(DRIFTS))
        if not 0 < eps_omega <= 1:
            raise ValueError(f"eps_omega={eps_omega!r}: expected a number above 0 and up to 1.")
        self.eps_omega, self.predicted, self.eps = eps_omega, row.channels, row.eps
        self.steps = _steps(ball, steps)
        super().__init__(channels, kernel_size, size, centre, slice_size, pattern, fixed_kernel)
        if self.predictor is not None:
            init_predictor(self.predictor, row, "paper", (0.1, 1.5))
        if self.size is not None:
            self.raw = nn.Parameter(torch.zeros(1, row.channels, *self.size))

    @torch.no_grad()
    def init_from_image(self, x: Tensor) -> None:
        """Starts the free geometry at `image_metric(x)`, without drift. x: `[1, C, H, W]`.

        Raises:
            ValueError: The geometry is predicted, or its parametrization is not `cholesky`.
        """
        if self.size is None or self.parametrization != "cholesky":
            raise ValueError("init_from_image: needs a free geometry (size=) in the parametrization 'cholesky'.")
        self._check(x)
        m, _ = image_metric(x.mean(1, keepdim=True)).tensors()
        factor = torch.linalg.cholesky(m)
        self.raw[:, :3] = torch.stack((factor[..., 0, 0] - EPS_L, factor[..., 1, 0], factor[..., 1, 1] - EPS_L), 1)

    def metric(self, x: Tensor) -> Metric:
        """The metrics in whitened form, components `[B, H, W]`."""
        raw = self.predictor(x) if self.predictor is not None else self.raw.expand(x.shape[0], -1, -1, -1)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32)).movedim(1, -1)
        root = PARAMETRIZATIONS[self.parametrization].function(raw[..., :-2], (0.1, 1.5))
        return Metric(root.a, root.b, root.d, *DRIFTS[self.drift](raw[..., -2:], root, self.eps_omega))


class ImageMetricFilter2d(_MetricFilter):
    """A metric filter that learns nothing: its metric is `geometry.image_metric` of the image, its kernel uniform.

    Args:
        channels: Each is filtered by itself; the metric is that of their mean.
        kernel_size: k, odd.
        pattern: Points that the ball bends: a name from `geometry.PATTERNS`.
        ball: "tangent" or "geodesic", see `MetricConv2d`.
        steps: Of a geodesic, see `geometry.geodesic_positions`.
        centre: One more sample, in the centre.
        slice_size: Most taps × pixels × images that are in memory at once.
        **metric: Arguments of `geometry.image_metric`: scale, anisotropy, tau (the drift's strength), along.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        pattern: str = "polar",
        ball: str = "tangent",
        steps: int = 1,
        centre: bool = False,
        slice_size: int = SLICE_SIZE,
        **metric,
    ):
        super().__init__(channels, kernel_size, None, centre, slice_size, pattern, fixed_kernel=True)
        self.arguments, self.steps = metric, _steps(ball, steps)

    def metric(self, x: Tensor) -> Metric:
        """As `MetricFilter2d.metric`."""
        return image_metric(x.mean(1, keepdim=True), **self.arguments)


class DeformFilter2d(_Filter):
    """A deformable convolution as an image filter.

    The free offsets are one parameter for each slice of the kernel, `[1, n, 2, H, W]` as (x, y): a training step that
    applies a gradient as soon as it is there (`Tensor.register_post_accumulate_grad_hook`) never holds all of it.

    Args:
        channels: Each is filtered by itself, at the same places.
        kernel_size: k, odd.
        size: (height, width) for offsets that are free parameters at every pixel of images of this size (`offsets`); by
            default a convolution predicts them, as in `DeformConv2d`, and slice by slice as well.
        centre: One more sample, in the centre.
        slice_size: Most taps × pixels × images that are in memory at once.
        fixed_kernel: Uniform and without gradient (FKW), or learnable from uniform on (LKW).

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        size: Optional[Sequence[int]] = None,
        centre: bool = False,
        slice_size: int = SLICE_SIZE,
        fixed_kernel: bool = True,
    ):
        self.predicted = 2 * kernel_size**2
        super().__init__(channels, kernel_size, size, centre, slice_size, "lattice", fixed_kernel)
        if self.predictor is not None:
            nn.init.constant_(self.predictor.weight, 1e-6)
            nn.init.constant_(self.predictor.bias, 0.0)  # type: ignore[arg-type]
        if self.size is not None:
            parts = _ranges(kernel_size**2, slice_size // (self.size[0] * self.size[1]))
            self.offsets = nn.ParameterList(torch.zeros(1, p.stop - p.start, 2, *self.size) for p in parts)

    def _geometry(self, x: Tensor) -> Iterator[Tuple[List[Slice], Tuple[Tensor, ...]]]:
        step = self.offsets[0].shape[1] if self.size else self.slice_size // max(1, x[:, 0].numel())
        for part in _ranges(self.kernel_size**2, step):
            points, taps = self.points[0, part, :, None, None], torch.arange(part.start, part.stop, device=x.device)
            if self.predictor is None:
                offsets = self.offsets[part.start // self.offsets[0].shape[1]]
                yield [(taps, lambda free, points=points: (free + points).expand(len(x), -1, -1, -1, -1))], (offsets,)
                continue

            def predicted(x: Tensor, kernel: Tensor, bias: Tensor, points: Tensor = points) -> Tensor:
                return F.conv2d(x, kernel, bias, padding=self.kernel_size // 2).unflatten(1, (-1, 2)).flip(2) + points

            rows = slice(2 * part.start, 2 * part.stop)
            yield [(taps, predicted)], (x, *(parameter[rows] for parameter in self.predictor.parameters()))
