"""Image filters: one metric or deformable convolution of any size, computed in slices of its kernel.

A filter of k = 121 reads 14641 samples at a pixel. Here a few taps at a time are placed, read and summed, and the
backward pass places them again, so that memory depends on the image and not on k. The geometry may come from the image
by a formula (`ImageMetricFilter2d`), be a free parameter at every pixel (`size=`), or be predicted by a convolution.
"""

from typing import Callable, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..geometry import PATTERNS, image_metric, randers
from ..geometry.parametrizations import EPS_L
from ..ops import ball_conv2d
from .ball_conv import BallConv2d, _choice
from .metric import MetricConv2d
from .offsets import DeformConv2d

# Samples (taps × pixels × images) that are in memory at once: a dozen tensors of this many float32 numbers.
SLICE_SAMPLES = 2**20
# With this many channels or fewer, reading planes beats a channels-last gather.
FEW_CHANNELS = 16

# The indices of n taps, and a function of tensors that returns their positions [B, n, 2, H, W].
Slice = Tuple[Tensor, Callable[..., Tensor]]


def _term(part: Slice, x: Tensor, weight: Tensor, *tensors: Tensor) -> Tensor:
    taps, place = part
    backend = "grid_sample" if x.shape[1] <= FEW_CHANNELS else None
    with torch.autocast(x.device.type, enabled=False):
        return ball_conv2d(x, place(*tensors), weight[:, :, taps], groups=x.shape[1], backend=backend)


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


def _ranges(total: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, total)) for i in range(0, total, max(1, step)))


def metric_slices(
    directions: Tensor, points: Tensor, pixels: int, *, eps_omega: float, eps: float = 0.0, samples: int = SLICE_SAMPLES
) -> List[Slice]:
    """The unit ball of a metric for `sliced_conv2d`, whose tensors are (a, b, d, s) `[B, H, W]` and ω `[B, H, W, 2]`.

    Args:
        directions: û of the pattern, `[D, 2]`.
        points: r·û of the pattern, `[R, D, 2]` in pixels.
        pixels: B·H·W.
        eps_omega: Margin of the drift, see `geometry.randers`.
        eps: y = r·û / (F(û) + eps).
        samples: Bound on taps × pixels × images of a slice.
    """
    count = max(1, samples // max(1, pixels))
    rows = min(count, points.shape[0])
    index = torch.arange(points.shape[0] * points.shape[1], device=points.device).view(points.shape[:2])

    def part(ring: slice, columns: slice) -> Slice:
        def place(*geometry: Tensor) -> Tensor:
            a, b, d, s, omega = geometry
            stretch = 1 / (randers(directions[columns], (a, b, d, s), omega, eps_omega) + eps)
            # A matrix product of inner size 1: its gradient is one too, with no temporary of the size of the positions.
            rays = points[ring, columns].transpose(0, 1).flatten(1)[:, :, None]
            positions = torch.bmm(rays, stretch.permute(3, 0, 1, 2).flatten(1)[:, None])
            return positions.view(-1, 2, *stretch.shape[:3]).permute(2, 0, 1, 3, 4)

        return index[ring, columns].t().flatten(), place

    return [part(r, c) for c in _ranges(points.shape[1], count // rows) for r in _ranges(points.shape[0], rows)]


class _Filter(BallConv2d):
    """What the filters share: k odd, the image's size kept, each channel filtered by itself, no bias."""

    def _setup(self, size: Optional[Sequence[int]], centre: bool, samples: int) -> None:
        if self.kernel_size[0] % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size[0]}: a filter needs an odd one, to sit on its pixel.")
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"size={size}: expected (height, width).")
        self.size, self.samples = size if size is None else tuple(size), samples
        self.centre = None
        if centre:
            taps = self.weight[0].numel() + 1
            with torch.no_grad():
                self.weight.mul_((taps - 1) / taps)
            self.centre = nn.Parameter(
                torch.full_like(self.weight[:, 0, 0, 0], 1 / taps), requires_grad=not self.fixed_kernel
            )

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"input: expected [B, {self.in_channels}, H, W], got {tuple(x.shape)}.")
        if self.size is not None and tuple(x.shape[2:]) != self.size:
            raise ValueError(f"input: the geometry is one for images of {self.size}, got {tuple(x.shape[2:])}.")

    def _filter(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → `[B, C, H, W]`."""
        self._check(x)
        out = self._filter(x, self.weight.flatten(2))
        return out if self.centre is None else out + self.centre[:, None, None] * x

    def positions_at(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """`positions` of the n pixels (rows, columns) alone, `[B, K, 2, n]`, without the centre sample."""
        return self.ball(self.predict(x)[:, :, rows, columns][:, :, None])[:, :, :, 0]


class MetricFilter2d(_Filter, MetricConv2d):
    """A metric convolution as an image filter; the paper's choices are the defaults.

    Args:
        channels: Each is filtered by itself, at the same places.
        kernel_size: k, odd.
        size: (height, width) for a geometry that is a free parameter at every pixel of images of this size (parameter
            `raw`); by default a convolution predicts it, as `MetricConv2d` does.
        centre: One more sample, in the centre.
        samples: Bound on the samples in memory at once.
        parametrization: See `MetricConv2d`.
        drift: See `MetricConv2d`.
        pattern: See `MetricConv2d`.
        eps_omega: See `MetricConv2d`.
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
        samples: int = SLICE_SAMPLES,
        parametrization: str = "cholesky",
        drift: str = "sigmoid_norm",
        pattern: str = "polar",
        eps_omega: float = 0.5,
        fixed_kernel: bool = True,
    ):
        self._free = size is not None
        super().__init__(
            channels,
            channels,
            kernel_size,
            groups=channels,
            bias=False,
            parametrization=parametrization,
            drift=drift,
            pattern=pattern,
            eps_omega=eps_omega,
            fixed_kernel=fixed_kernel,
            init="paper",
        )
        self._setup(size, centre, samples)
        if size is not None:
            self.raw = nn.Parameter(torch.zeros(1, self.channels, *size))

    def _make_predictor(self, channels: int, dd: dict) -> Optional[nn.Conv2d]:
        return None if self._free else super()._make_predictor(channels, dd)

    def reset_predictor(self) -> None:
        """As `MetricConv2d`; a free geometry waits for `init_from_image`."""
        if self.predictor is not None:
            super().reset_predictor()

    @torch.no_grad()
    def init_from_image(self, x: Tensor) -> None:
        """Starts the free geometry at `image_metric(x)`, without drift. x: `[1, C, H, W]`.

        Raises:
            ValueError: The geometry is predicted, or its parametrization is not `cholesky`.
        """
        if self.size is None or self.parametrization != "cholesky":
            raise ValueError("init_from_image: needs a free geometry (size=) in the parametrization 'cholesky'.")
        self._check(x)
        (a, b, _, s), _ = image_metric(x.mean(1, keepdim=True))
        l0 = a.sqrt()
        self.raw[:, :3] = torch.stack((l0 - EPS_L, b / l0, s / l0 - EPS_L), 1)

    def predict(self, x: Tensor) -> Tensor:
        """Raw channels `[B, channels, H, W]`."""
        return super().predict(x) if self.size is None else self.raw.expand(x.shape[0], -1, -1, -1)

    def _filter(self, x: Tensor, weight: Tensor) -> Tensor:
        metric, omega = self._randers(self.predict(x))
        margins = {"eps_omega": self.eps_omega, "eps": self._eps, "samples": self.samples}
        slices = metric_slices(self.directions, self.points, metric[0].numel(), **margins)
        return sliced_conv2d(x, weight, slices, *metric, omega)


class ImageMetricFilter2d(nn.Module):
    """A metric filter without parameters: its metric is `geometry.image_metric` of the image, its kernel uniform.

    Args:
        kernel_size: k.
        pattern: Points that the ball bends: a name from `geometry.PATTERNS`.
        centre: One more sample, in the centre.
        samples: Bound on the samples in memory at once.
        **metric: Arguments of `geometry.image_metric`: scale, anisotropy, tau (the drift's strength), along.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        kernel_size: int,
        *,
        pattern: str = "polar",
        centre: bool = False,
        samples: int = SLICE_SAMPLES,
        **metric,
    ):
        super().__init__()
        directions, radii = PATTERNS[_choice("pattern", pattern, list(PATTERNS))](kernel_size, (1, 1))
        self.centre, self.samples, self.metric = centre, samples, metric
        self.register_buffer("directions", directions.float(), persistent=False)
        self.register_buffer("points", (radii[:, :, None] * directions).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → `[B, C, H, W]`; of several channels the metric reads the mean."""
        metric, omega = image_metric(x.mean(1, keepdim=True), **self.metric)
        directions, points = self.directions.to(omega), self.points.to(omega)
        # the drift reaches its bound τ at the strongest edge
        margin = 1 - abs(self.metric.get("tau", 0.0))
        slices = metric_slices(directions, points, metric[0].numel(), eps_omega=margin, samples=self.samples)
        taps = points.shape[0] * points.shape[1]
        weight = x.new_full((x.shape[1], 1, taps), 1 / (taps + self.centre))
        out = sliced_conv2d(x, weight, slices, *metric, omega)
        return out + x / (taps + 1) if self.centre else out


class DeformFilter2d(_Filter, DeformConv2d):
    """A deformable convolution as an image filter.

    The free offsets are one parameter for each slice of the kernel, `[1, n, 2, H, W]` as (x, y): a training step that
    applies a gradient as soon as it is there (`Tensor.register_post_accumulate_grad_hook`) never holds all of it.

    Args:
        channels: Each is filtered by itself, at the same places.
        kernel_size: k, odd.
        size: (height, width) for offsets that are free parameters at every pixel of images of this size (`offsets`); by
            default a convolution predicts them, as `DeformConv2d` does, and slice by slice as well.
        centre: One more sample, in the centre.
        samples: Bound on the samples in memory at once.
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
        samples: int = SLICE_SAMPLES,
        fixed_kernel: bool = True,
    ):
        self._free = size is not None
        super().__init__(
            channels, channels, kernel_size, groups=channels, bias=False, fixed_kernel=fixed_kernel, init="paper"
        )
        self._setup(size, centre, samples)
        if size is not None:
            step = max(1, samples // (size[0] * size[1]))
            counts = [part.stop - part.start for part in _ranges(self.points.shape[1], step)]
            self.offsets = nn.ParameterList(torch.zeros(1, count, 2, *size) for count in counts)

    def _make_predictor(self, channels: int, dd: dict) -> Optional[nn.Conv2d]:
        return None if self._free else super()._make_predictor(channels, dd)

    def predict(self, x: Tensor) -> Tensor:
        """All offsets at once in torchvision's order, `[B, 2K, H, W]`."""
        if self.size is None:
            return super().predict(x)
        return torch.cat(list(self.offsets), 1).flip(2).flatten(1, 2).expand(x.shape[0], -1, -1, -1)

    def positions_at(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """As `MetricFilter2d.positions_at`; free offsets are read at these pixels only."""
        if self.size is None:
            return super().positions_at(x, rows, columns)
        offsets = torch.cat([part[..., rows, columns] for part in self.offsets], 1)
        return (offsets + self.points[0, :, :, None]).expand(x.shape[0], -1, -1, -1)

    def _filter(self, x: Tensor, weight: Tensor) -> Tensor:
        points, out = self.points[0, :, :, None, None], torch.zeros_like(x)
        step = self.offsets[0].shape[1] if self.size else max(1, self.samples // max(1, x[:, 0].numel()))
        for number, part in enumerate(_ranges(len(points), step)):

            def free(offsets: Tensor, part=part) -> Tensor:
                return (offsets + points[part]).expand(x.shape[0], -1, -1, -1, -1)

            def predicted(x: Tensor, kernel: Tensor, bias: Tensor, part=part) -> Tensor:
                offsets = F.conv2d(x, kernel, bias, padding=self.padding)
                return offsets.unflatten(1, (-1, 2)).flip(2) + points[part]

            taps = torch.arange(part.start, part.stop, device=x.device)
            if self.size is not None:
                out = out + sliced_conv2d(x, weight, [(taps, free)], self.offsets[number])
            else:
                rows = slice(2 * part.start, 2 * part.stop)
                tensors = x, self.predictor.weight[rows], self.predictor.bias[rows]
                out = out + sliced_conv2d(x, weight, [(taps, predicted)], *tensors)
        return out
