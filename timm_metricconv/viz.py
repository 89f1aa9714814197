"""Pictures of what a convolution sees: unit balls and samples over an image, fields, maps, Grad-CAM side by side.

Everything is drawn in pixels of the image, x to the right and y down. Needs the extra `recipes`. The functions return
matplotlib figures and know no global state, so they work without a display.
"""

from __future__ import annotations

import copy
import importlib
import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from .geometry import (
    Metric,
    anisotropy,
    asymmetry,
    fit_randers,
    geodesic_positions,
    image_metric,
    randers,
    star_hull,
    unit_ball,
    zermelo_ellipse,
)
from .geometry.metrics import Root, whitened_drift
from .layers import BallConv2d, MetricConv2d

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ANISOTROPY = "anisotropy  $\\sqrt{\\lambda_{max}/\\lambda_{min}}$"
# Okabe and Ito's colours, which colour-blind readers tell apart.
ORANGE, SKY, VERMILION = "#E69F00", "#56B4E9", "#D55E00"
# Geodesics of a picture are long, and there are few.
GEODESIC_STEPS = 12
TURN = torch.linspace(0, 2 * torch.pi, 181)
Pair = Tuple[float, float]


def need(module: str, package: str) -> Any:
    """An optional dependency, or an error that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'pictures need {package} ({error}): pip install "timm_metricconv[recipes]"') from error


def _figure(width: float, height: float) -> Figure:
    return need("matplotlib.figure", "matplotlib").Figure(figsize=(width, height), layout="constrained")


def _panels(count: int, image: np.ndarray, width: float = 3.0) -> Tuple[Figure, List[Axes]]:
    """Panels of an image's shape: beside each other, or below each other where the image is wide."""
    aspect = image.shape[1] / image.shape[0]
    if aspect > 1.8:
        figure = _figure(2.6 * width, count * (2.2 * width / aspect + 0.35))
        return figure, list(figure.subplots(count, 1, squeeze=False)[:, 0])
    figure = _figure(count * (width * aspect**0.5 + 0.5), width / aspect**0.5 + 0.5)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


# ---------------------------------------------------------------- layers inside networks


@dataclass(frozen=True)
class LayerView:
    """A layer at work: its input, and where the pixels of that input lie in the image.

    Attributes:
        layer: Any convolution of the family.
        input: What it got, `[1, C, H, W]`.
        step: Image pixels in one pixel of the input, (x, y).
        origin: Where the input's pixel (0, 0) lies in the image, (x, y).
    """

    layer: BallConv2d
    input: Tensor
    step: Pair
    origin: Pair

    @torch.no_grad()
    def positions(self) -> Tensor:
        """Of the first metric group: `[1, K, 2, H_out, W_out]` in pixels of the layer's input."""
        return self.layer.positions(self.input)[:, : len(self.radii)]

    @property
    def radii(self) -> Tensor:
        """Radius of each pattern point, `[K]`."""
        return self.layer.points.norm(dim=-1).flatten()

    def centres(self) -> Tuple[Tensor, Tensor]:
        """The centres of the output's columns and rows in the image: x `[W_out]`, y `[H_out]`."""
        x, y = (centres.float().cpu() for centres in self.layer.centres(self.input))
        return self.origin[0] + self.step[0] * x, self.origin[1] + self.step[1] * y


def _window(module: nn.Module) -> List[Tuple[int, int]]:
    """(kernel size, stride, padding, dilation) of a convolution or pooling, each (vertical, horizontal)."""
    values = (module.kernel_size, module.stride, module.padding, getattr(module, "dilation", 1))
    return [(0, 0) if isinstance(value, str) else tuple(_pair(value)) for value in values]


@torch.no_grad()
def capture(model: nn.Module, layer: str, x: Tensor) -> LayerView:
    """Runs a network once and keeps the input of one layer.

    Where that input's pixels lie in the image follows from the convolutions and poolings that changed the resolution on
    the way; a resolution that something else made is taken to cover the image evenly.

    Args:
        model: A network; a copy of it runs in evaluation mode.
        layer: Name of a metric, deformable, ... layer in `model.named_modules()`.
        x: Image as the network takes it, `[1, C, H, W]`.

    Raises:
        ValueError: There is no such layer (those that exist are named), or the network does not run it.
    """
    model = copy.deepcopy(model).eval()  # its hooks and its mode go with it
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BallConv2d)}
    if layer not in layers:
        raise ValueError(f"layer={layer!r}: expected one of {', '.join(layers) or '(the network has no such layer)'}.")
    size = tuple(x.shape[2:])
    # A resolution of the network → (step, origin) of its pixels in the image, each (vertical, horizontal)
    grids: Dict[Tuple[int, ...], Tuple[Pair, Pair]] = {size: ((1.0, 1.0), (0.0, 0.0))}
    inputs: List[Tensor] = []

    def trace(module: nn.Module, args: Tuple[Any, ...], output: Any) -> None:
        if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and output.dim() == 4):
            return
        before, after = tuple(args[0].shape[2:]), tuple(output.shape[2:])
        if before in grids and after not in grids:
            step, origin = grids[before]
            kernel, stride, padding, dilation = _window(module)
            first = [dilation[i] * (kernel[i] - 1) / 2 - padding[i] for i in (0, 1)]
            grids[after] = (
                (step[0] * stride[0], step[1] * stride[1]),
                (origin[0] + step[0] * first[0], origin[1] + step[1] * first[1]),
            )

    layers[layer].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    for module in model.modules():
        if all(hasattr(module, name) for name in ("kernel_size", "stride", "padding")):
            module.register_forward_hook(trace)
    model(x)
    if not inputs:
        raise ValueError(f"layer={layer!r}: the network did not run it.")
    here = tuple(inputs[0].shape[2:])
    even = (size[0] / here[0], size[1] / here[1])
    step, origin = grids.get(here, (even, ((even[0] - 1) / 2, (even[1] - 1) / 2)))
    return LayerView(layers[layer], inputs[0], (step[1], step[0]), (origin[1], origin[0]))


# ---------------------------------------------------------------- fields of metrics


@dataclass(frozen=True)
class BallField:
    """A metric at every pixel of a grid that lies in an image.

    Attributes:
        metric: M `[H, W, 2, 2]`.
        omega: Drift `[H, W, 2]`.
        x: Centres of the columns in the image, `[W]`.
        y: Centres of the rows, `[H]`.
        step: Image pixels in one unit of the metric, (x, y).
        residual: Misfit of an implicit metric `[H, W]`; None where the metric is explicit.
    """

    metric: Tensor
    omega: Tensor
    x: Tensor
    y: Tensor
    step: Pair = (1.0, 1.0)
    residual: Optional[Tensor] = None

    def outlines(self, rows: Tensor, columns: Tensor, magnified: float = 1.0) -> Tensor:
        """The unit balls of some pixels as polygons in the image, `[N, 181, 2]`."""
        radius = unit_ball(self.metric[rows, columns], self.omega[rows, columns], TURN)
        centre = torch.stack((self.x[columns], self.y[rows]), -1)
        circle = torch.stack((TURN.cos(), TURN.sin()), -1)
        return centre[:, None] + magnified * radius[..., None] * circle * torch.tensor(self.step)

    def spread(self, row: int, column: int, radii: Tensor, directions: int = 64) -> Tuple[Tensor, Tensor]:
        """Straight rays and geodesics from a pixel: where they are in the image after each distance of `radii` `[R]`.

        Returns:
            Points of the tangent balls and of the geodesic ones, `[R, directions, 2]` each.
        """
        fields = torch.stack(tuple(Metric.from_tensors(self.metric, self.omega)))[None]
        here = Metric(*fields[0, :, row, column])
        turn = 2 * torch.pi / directions * torch.arange(directions, dtype=fields.dtype)
        # even in the directions of z = A·u, so that a long ball's ends get as many as its sides
        x, y = whitened_drift(Root(here.a, here.b, here.d, here.a * here.d - here.b**2), turn.cos(), turn.sin())
        rays = F.normalize(torch.stack((x, y), -1), dim=-1)
        tangent = radii.to(rays)[:, None, None] * rays / randers(rays, here)[:, None]
        step = torch.tensor(self.step).to(rays)
        axes = zip((self.y, self.x), self.step[::-1], strict=True)
        grid = [float(axis[1] - axis[0]) / size if len(axis) > 1 else 1.0 for axis, size in axes]
        geodesic = tangent.new_zeros(())
        margin = 1.2 * float(tangent.abs().max())
        while True:
            rows, columns = (math.ceil(margin / spacing) + 2 for spacing in grid)
            top, left = max(0, row - rows), max(0, column - columns)
            part = fields[:, :, top : row + rows + 1, left : column + columns + 1]
            ball = geodesic_positions(part, radii.to(rays)[:, None, None] * rays, GEODESIC_STEPS, (grid[0], grid[1]))
            geodesic = ball[0, :, :, row - top, column - left].view(len(radii), directions, 2)
            # a path that stays in the part is that of the whole field
            if geodesic.abs().max() <= margin or part.shape == fields.shape:
                break
            margin *= 2
        centre = torch.stack((self.x[column], self.y[row])).to(rays)
        return centre + tangent * step, centre + geodesic * step


@torch.no_grad()
def layer_field(view: LayerView) -> BallField:
    """The metric of a layer (of its first metric group): its own, or else the one that fits its positions best."""
    x, y = view.centres()
    if isinstance(view.layer, MetricConv2d):
        m, omega = (t[0] if view.layer.metric_groups == 1 else t[0, 0] for t in view.layer.metric(view.input))
        return BallField(m.permute(2, 3, 0, 1).float().cpu(), omega.permute(1, 2, 0).float().cpu(), x, y, view.step)
    fit = fit_randers(view.positions(), view.radii)
    m, omega, residual = (t[0].float().cpu() for t in fit)
    return BallField(m, omega, x, y, view.step, residual)


def image_field(image: np.ndarray, smoothing: float = 0.0, **metric: Any) -> BallField:
    """The metric that `geometry.image_metric` builds from an image, without a network.

    Args:
        image: `[H, W]` or `[H, W, 3]`.
        smoothing: Standard deviation of the Gaussian, in pixels, that the image passes before its derivative is taken.
        **metric: Arguments of `geometry.image_metric`.
    """
    smooth = need("scipy.ndimage", "scipy").gaussian_filter(_grey(image), smoothing, mode="nearest")
    grey = torch.as_tensor(smooth)[None, None].float()
    m, omega = image_metric(grey, **metric).tensors()
    height, width = grey.shape[2:]
    return BallField(m[0], omega[0], torch.arange(width).float(), torch.arange(height).float())


def strong_edges(image: np.ndarray, count: int = 3, smoothing: float = 2.0) -> List[List[float]]:
    """(x, y) of the image's strongest edges, a fifth of its shorter side apart from each other and from the border."""
    ratio = anisotropy(image_field(image, smoothing).metric)
    height, width = ratio.shape
    apart, points = min(height, width) // 5, []
    margin = apart // 2
    inner = F.pad(ratio[margin : height - margin, margin : width - margin], [margin] * 4)
    for _ in range(count):
        y, x = divmod(int(inner.argmax()), width)
        points.append([float(x), float(y)])
        inner[max(0, y - apart) : y + apart + 1, max(0, x - apart) : x + apart + 1] = 0
    return points


# ---------------------------------------------------------------- drawing


def _grey(image: np.ndarray) -> np.ndarray:
    """Luma in [0, 1] of uint8 or of numbers in [0, 1]."""
    scaled = image / 255.0 if image.dtype.kind in "iu" else image
    return scaled if scaled.ndim == 2 else scaled[..., :3] @ [0.299, 0.587, 0.114]


def _show(ax: Axes, image: np.ndarray, faded: float = 0.0) -> None:
    """The image in grey, lightened by `faded`, so that colours are free to mean something."""
    ax.imshow(_grey(image) * (1 - faded) + faded, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5), xticks=[], yticks=[], aspect="equal")


def _colour_bar(ax: Axes, shown: Any, values: Tensor) -> Any:
    """A bar inside the figure's margin, so that panels with and without one keep the same size."""
    beyond = float(values.max()) > shown.norm.vmax
    return ax.figure.colorbar(shown, cax=ax.inset_axes([1.02, 0.1, 0.025, 0.8]), extend="max" if beyond else "neither")


def _upper(values: Tensor, least: float) -> float:
    """End of a colour scale: the 99th percentile, so that a few outliers do not hide the rest."""
    return max(float(values.double().quantile(0.99)), least)


def plot_field(field: BallField, image: np.ndarray, spacing: float = 24.0, title: str = "") -> Figure:
    """The balls and the drift of a field, on a regular grid over an image.

    A ball is coloured by its anisotropy and drawn in true size, or, where balls are small, so much larger (the title
    says how much) that most fill half of the spacing. A line leads from the pixel (dot) to the middle of its ball;
    where there is no drift it has no length.

    Args:
        field: From `layer_field` or `image_field`.
        image: `[H, W]` or `[H, W, 3]`.
        spacing: Least distance between two balls, in pixels of the image.
        title: Above the picture.
    """
    collections, colours = need("matplotlib.collections", "matplotlib"), need("matplotlib.colors", "matplotlib")
    edge = 7.0 if image.shape[1] < 2 * image.shape[0] else 11.0
    figure = _figure(edge + 0.9, edge * image.shape[0] / image.shape[1] + 0.5)
    ax = figure.subplots()
    _show(ax, image, faded=0.45)
    height, width = field.omega.shape[:2]
    every = [max(1, round(spacing / float(axis[1] - axis[0]))) if len(axis) > 1 else 1 for axis in (field.y, field.x)]
    starts = [(count - 1) % step // 2 for count, step in zip((height, width), every, strict=True)]
    rows, columns = torch.meshgrid(
        torch.arange(starts[0], height, every[0]), torch.arange(starts[1], width, every[1]), indexing="ij"
    )
    rows, columns = rows.flatten(), columns.flatten()
    metric, omega = field.metric[rows, columns], field.omega[rows, columns]
    ratio = anisotropy(metric)
    scale = colours.Normalize(1, _upper(ratio, 1.5))
    true = field.outlines(rows, columns)
    typical = float((true.amax(1) - true.amin(1)).amax(-1).median())
    magnified = max(1, int(0.5 * spacing / max(typical, 1e-3)))
    outlines = field.outlines(rows, columns, magnified)
    balls = collections.PolyCollection(outlines.numpy(), closed=True, linewidths=1.2)
    palette = importlib.import_module("matplotlib").colormaps["viridis"]
    tints = palette(scale(ratio.numpy()))
    balls.set_edgecolor(tints)
    balls.set_facecolor([(*tint[:3], 0.35) for tint in tints])
    ax.add_collection(balls)

    pixel = torch.stack((field.x[columns], field.y[rows]), -1)
    lean = zermelo_ellipse(Metric.from_tensors(metric, omega))[1] * torch.tensor(field.step) * magnified
    lines = torch.stack((pixel, pixel + lean), 1).numpy()
    ax.add_collection(collections.LineCollection(lines, colors="black", linewidths=1.3))
    ax.plot(*pixel.T.numpy(), linestyle="", marker="o", markersize=1.5, color="black")
    shown = importlib.import_module("matplotlib.cm").ScalarMappable(scale, palette)
    _colour_bar(ax, shown, ratio).set_label(ANISOTROPY)
    ax.set_title(title + (f" (balls drawn ×{magnified})" if magnified > 1 else ""), fontsize=10)
    return figure


def _draw_ball(ax: Axes, view: LayerView, positions: Tensor, row: int, column: int) -> None:
    """Hull, fitted ball and samples of one output pixel."""
    xs, ys = view.centres()
    centre, step = torch.stack((xs[column], ys[row])), torch.tensor(view.step)
    here = positions[:1, :, :, row : row + 1, column : column + 1].float().cpu()
    circle = torch.stack((TURN.cos(), TURN.sin()), -1)
    radii = view.radii.float().cpu()
    hull = centre + star_hull(here, radii, TURN)[0, 0, 0, :, None] * circle * step
    fit = fit_randers(here, radii)
    ball = centre + unit_ball(fit.metric, fit.omega, TURN)[0, 0, 0, :, None] * circle * step
    samples = centre + here[0, :, :, 0, 0] * step
    outer = ball + (radii.max() - 1) * (ball - centre)
    ax.fill(*hull.T.numpy(), facecolor=ORANGE, edgecolor=ORANGE, alpha=0.45, label="unit ball: hull of the samples")
    ax.plot(*ball.T.numpy(), color=VERMILION, linewidth=2.2, label="unit ball: nearest Randers metric")
    if radii.max() > 1:
        ax.plot(*outer.T.numpy(), color=VERMILION, linewidth=1.3, linestyle="--")
    edge = {"markeredgecolor": "black", "markeredgewidth": 0.8}
    ax.plot(*samples.T.numpy(), "o", color=SKY, markersize=6.5, label="samples", **edge)
    ax.plot(*centre.numpy(), "+", color="black", markersize=8, markeredgewidth=1.8, label="pixel")
    a, w = float(anisotropy(fit.metric)), float(asymmetry(fit.metric, fit.omega))
    ax.set_title(f"anisotropy {a:.2f}, asymmetry {w:.2f}\nresidual {float(fit.residual):.3f}", fontsize=9)


def plot_samples(
    views: Mapping[str, LayerView], image: np.ndarray, points: Sequence[Sequence[float]], title: str = ""
) -> Figure:
    """Where some pixels read: the samples, their star-shaped hull as a unit ball, and the Randers ball nearest to it.

    Args:
        views: Label → a layer of a network, from `capture`.
        image: The picture that the networks saw, `[H, W]` or `[H, W, 3]`.
        points: (x, y) in pixels of the image; each layer's output pixel nearest to each is shown.
        title: Above the picture.

    Returns:
        The whole image, and close-ups of the points, all in one scale. The dashed line is the ball of the outermost
        samples' radius.
    """
    if not points:
        raise ValueError("points: at least one (x, y) is needed.")
    close_ups = []
    for name, view in views.items():
        positions = view.positions()
        for number, point in enumerate(points, 1):
            label = name if name and len(points) == 1 else f"{name} {number}".strip()
            close_ups.append((label, view, positions, point))
    pixels, centres, reach = [], [], 0.0
    for _, view, positions, (x, y) in close_ups:
        xs, ys = view.centres()
        row, column = int((ys - y).abs().argmin()), int((xs - x).abs().argmin())
        pixels.append((row, column))
        centres.append((float(xs[column]), float(ys[row])))
        here = float(positions[0, :, :, row, column].abs().max())
        reach = max(reach, max(here, float(view.radii.max())) * max(view.step))
    count, half, aspect = len(close_ups), 1.35 * reach, image.shape[1] / image.shape[0]
    if aspect > 1.8:
        figure = _figure(3.0 * count, 3.0 * count / aspect + 3.9)
        grid = figure.add_gridspec(2, count, height_ratios=[3.0 * count / aspect, 3.3])
        axes = [figure.add_subplot(grid[0, :]), *(figure.add_subplot(grid[1, i]) for i in range(count))]
    else:
        figure = _figure(3.3 * aspect + 2.9 * count, 3.9)
        axes = list(figure.subplots(1, 1 + count, width_ratios=[1.15 * aspect, *[1.0] * count]))
    _show(axes[0], image)
    frame = need("matplotlib.patches", "matplotlib").Rectangle
    for ax, (label, view, positions, _), pixel, (x, y) in zip(axes[1:], close_ups, pixels, centres, strict=True):
        box = frame((x - half, y - half), 2 * half, 2 * half, fill=False, edgecolor=ORANGE, linewidth=1.8)
        axes[0].add_patch(box)
        if len(set(centres)) > 1:
            corner = {"backgroundcolor": ORANGE, "fontsize": 8, "va": "bottom"}
            axes[0].text(x + half, y - half, f" {label}", color="black", **corner)
        _show(ax, image, faded=0.25)
        _draw_ball(ax, view, positions, *pixel)
        ax.set(xlim=(x - half, x + half), ylim=(y + half, y - half), xlabel=f"{label}: x = {x:.0f}, y = {y:.0f}")
    axes[0].set_title(title, fontsize=10)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def plot_geodesics(
    field: BallField, image: np.ndarray, points: Sequence[Sequence[float]], radius: float = 1.5, title: str = ""
) -> Figure:
    """Tangent balls (above) of some pixels and geodesic ones (below), with the straight rays and the geodesics in them.

    Args:
        field: From `layer_field` or `image_field`.
        image: `[H, W]` or `[H, W, 3]`.
        points: (x, y) in pixels of the image; the field's pixel nearest to each is shown.
        radius: Of the outer ball; the filled one is the unit ball.
        title: Above the image.
    """
    if not points:
        raise ValueError("points: at least one (x, y) is needed.")
    patches, collections = need("matplotlib.patches", "matplotlib"), need("matplotlib.collections", "matplotlib")
    aspect, count = image.shape[1] / image.shape[0], len(points)
    figure = _figure(5.2 * aspect + 2.9 * count, 6.6)
    grid = figure.add_gridspec(2, 1 + count, width_ratios=[1.9 * aspect, *[1.0] * count])
    whole = figure.add_subplot(grid[:, 0])
    _show(whole, image)
    whole.set_title(title, fontsize=10)
    # ten places on the way to the unit ball, and then on to the outer one
    radii, unit = torch.cat((torch.arange(1, 10) / 10, torch.linspace(1, radius, 6))), 9
    for number, point in enumerate(points, 1):
        row, column = int((field.y - point[1]).abs().argmin()), int((field.x - point[0]).abs().argmin())
        x, y = float(field.x[column]), float(field.y[row])
        balls = field.spread(row, column, radii)
        half = 1.12 * float(max((ball - torch.tensor([x, y])).abs().max() for ball in balls))
        square = {"fill": False, "edgecolor": ORANGE, "linewidth": 1.8}
        whole.add_patch(patches.Rectangle((x - half, y - half), 2 * half, 2 * half, **square))
        whole.text(x + half, y - half, f" {number}", color="black", backgroundcolor=ORANGE, fontsize=8, va="bottom")
        for line, (name, ball) in enumerate(zip(("tangent", "geodesic"), balls, strict=True)):
            ax = figure.add_subplot(grid[line, number])
            _show(ax, image, faded=0.25)
            start = torch.tensor([x, y]).expand(1, ball.shape[1], 2)
            paths = torch.cat((start, ball))[:, ::4].transpose(0, 1).numpy()
            ax.fill(*ball[unit].T.numpy(), facecolor=ORANGE, alpha=0.45)
            lines = collections.LineCollection(paths, colors="#0072B2", linewidths=0.9)
            lines.set_label("straight rays (above), geodesics (below)")
            ax.add_collection(lines)
            for ring, width, label in ((unit, 2.2, "unit ball"), (len(radii) - 1, 1.2, f"ball of radius {radius:g}")):
                outline = torch.cat((ball[ring], ball[ring, :1]))
                ax.plot(*outline.T.numpy(), color=VERMILION, linewidth=width, label=label)
            ax.plot(x, y, "+", color="black", markersize=8, markeredgewidth=1.8, linestyle="", label="pixel")
            ax.set(xlim=(x - half, x + half), ylim=(y + half, y - half))
            ax.set_title(f"{number}: {name} ball", fontsize=10)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def plot_maps(field: BallField, image: np.ndarray, title: str = "") -> Figure:
    """Anisotropy and asymmetry over an image, and the residual where the metric is an implicit one.

    Args:
        field: From `layer_field` or `image_field`.
        image: `[H, W]` or `[H, W, 3]`.
        title: Above the first picture.
    """
    ratio, drift = anisotropy(field.metric), asymmetry(field.metric, field.omega)
    maps = [
        (ANISOTROPY, ratio, 1.0, _upper(ratio, 1.5), "viridis"),
        ("asymmetry  $\\|\\omega\\|_{M^{-1}}$", drift, 0.0, _upper(drift, 0.1), "magma"),
    ]
    if field.residual is not None:
        maps.append(("residual of the fit", field.residual, 0.0, _upper(field.residual, 0.1), "cividis"))
    figure, axes = _panels(1 + len(maps), image)
    _show(axes[0], image)
    axes[0].set_title(title, fontsize=10)
    half = [float(axis[1] - axis[0]) / 2 if len(axis) > 1 else 0.5 for axis in (field.x, field.y)]
    extent = [field.x[0] - half[0], field.x[-1] + half[0], field.y[-1] + half[1], field.y[0] - half[1]]
    for ax, (name, values, low, high, palette) in zip(axes[1:], maps, strict=True):
        _show(ax, image)
        shown = ax.imshow(values.numpy(), cmap=palette, vmin=low, vmax=high, extent=[float(e) for e in extent])
        ax.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
        ax.set_title(name, fontsize=10)
        _colour_bar(ax, shown, values)
    return figure


def plot_grad_cam(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Tensor],
    image: np.ndarray,
    target: Optional[int] = None,
) -> Figure:
    """Grad-CAM (Selvaraju et al., ICCV 2017) of several timm networks side by side, each at its last feature map.

    Args:
        models: Label → network, whose `feature_info` names its feature maps.
        inputs: Label → the image as that network takes it, `[1, C, H, W]`.
        image: The image as it is shown.
        target: Class to explain; by default each network's own first choice.

    Raises:
        ValueError: What a network gives there is no map.
    """
    grad_cam, targets = need("pytorch_grad_cam", "grad-cam"), need("pytorch_grad_cam.utils.model_targets", "grad-cam")
    figure, axes = _panels(1 + len(models), image)
    _show(axes[0], image)
    axes[0].set_title("image", fontsize=10)
    for ax, (label, model) in zip(axes[1:], models.items(), strict=True):
        name, channels = (model.feature_info[-1][key] for key in ("module", "num_chs"))
        module, given = model.get_submodule(name), list[Any]()
        with torch.no_grad(), module.register_forward_hook(lambda *call, given=given: given.append(call[2])):
            odds = model.eval()(inputs[label]).softmax(-1)[0]
        shape = list(getattr(given[-1], "shape", [])) if given else []
        if len(shape) != 4:
            raise ValueError(
                f"{label}: Grad-CAM needs feature maps [B, C, H, W]; what {name} gives is {shape or 'none'}."
            )
        # Swin and others have their channels last
        turned = operator.methodcaller("permute", 0, 3, 1, 2) if shape[1] != channels else None
        chosen = int(odds.argmax()) if target is None else target
        with grad_cam.GradCAM(model, [module], turned) as cam:
            heat = cam(input_tensor=inputs[label], targets=[targets.ClassifierOutputTarget(chosen)])[0]
        _show(ax, image)
        ax.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.6, extent=(*ax.get_xlim(), *ax.get_ylim()))
        ax.set_title(f"{label}: class {chosen}, p = {float(odds[chosen]):.2f}", fontsize=10)
    return figure
