"""What the geometry of a trained network does, layer by layer: it did not adapt, it adapted, or it ran away."""

import itertools
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.data import DataLoader

from ..geometry import anisotropy, asymmetry, fit_frame, fit_randers
from ..layers import BallConv2d, MetricConv2d

# Pixels a side of a feature map that the fit of implicit metrics looks at.
FITTED = 8
# Samples have left a layer's image where so many more of them than at rest are outside.
STRAYED = 0.25
# Of a displacement, see `geometry.FrameFit`.
PARTS = ("shift", "linear", "rest")
# What is drawn, with its label.
QUANTITIES = {
    "displacement": "displacement (px)",
    "outside": "share outside the image",
    "anisotropy": "anisotropy",
    "asymmetry": "asymmetry",
    "residual": "implicit-metric residual",
    "rest": "share that is not affine",
}

Diagnosis = Dict[str, Dict[str, float]]


def sample_images(loader: DataLoader, count: int = 32) -> Tensor:
    """`count` images of a loader's data set, spread evenly (they are often sorted by class): `[count, C, H, W]`."""
    dataset = loader.dataset
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return torch.stack([image for image, _ in itertools.islice(iter(dataset), count)])
    indices = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().long().tolist()
    return torch.stack([dataset[index][0] for index in indices])


def _summarise(name: str, values: Tensor) -> Dict[str, float]:
    values = values.cpu().double()  # some devices have no float64
    return {name: values.mean().item(), f"{name}_std": values.std(correction=0).item()}


def _outside(layer: BallConv2d, x: Tensor, positions: Tensor) -> float:
    """Share of positions `[B, K, 2, H_out, W_out]` beyond the edge of the image, half a pixel from its last centres."""
    x_of, y_of = layer.centres(x)
    columns, rows = positions[:, :, 0] + x_of, positions[:, :, 1] + y_of[:, None]
    height, width = x.shape[2:]
    inside = (columns >= -0.5) & (columns <= width - 0.5) & (rows >= -0.5) & (rows <= height - 0.5)
    return 1 - inside.cpu().double().mean().item()


def _shape(layer: MetricConv2d, x: Tensor) -> Dict[str, float]:
    """Anisotropy and asymmetry over images, pixels and metric groups."""
    metric, omega = (tensor.cpu().double() for tensor in layer.metric(x))
    metric, omega = metric.movedim((-4, -3), (-2, -1)), omega.movedim(-3, -1)
    return {**_summarise("anisotropy", anisotropy(metric)), **_summarise("asymmetry", asymmetry(metric, omega))}


def _explained(points: Tensor, positions: Tensor) -> Dict[str, float]:
    """How far the samples are from those of any metric, and what of their displacement is affine, at some pixels.

    Nothing for a kernel of one tap.
    """
    radii = torch.linalg.vector_norm(points, dim=-1)
    if not radii.any():
        return {}
    steps = [-(-size // FITTED) for size in positions.shape[3:]]
    thin = positions[..., :: steps[0], :: steps[1]].unflatten(1, (-1, len(radii))).flatten(0, 1).cpu()
    moved = fit_frame(thin, points).moved.double().mean((0, 1, 2))
    shares = (moved / moved.sum().clamp(min=1e-30)).tolist()
    return _summarise("residual", fit_randers(thin, radii).residual) | dict(zip(PARTS, shares, strict=True))


@torch.no_grad()
def diagnose(model: nn.Module, images: Tensor) -> Dict[str, Dict[str, float]]:
    """Geometry of every adaptive layer on some images.

    Args:
        model: Any network; it is run once, in evaluation mode.
        images: `[B, C, H, W]`, as the network gets them.

    Returns:
        For each adaptive layer, in the order in which they run, by its name:

        - `displacement`, `displacement_std`: distance of the samples from the pattern at rest (of a lattice: from the
          standard convolution's taps), in pixels of the layer's input.
        - `outside`, `outside_at_rest`: share of the samples that lie beyond the edge of the layer's input, and that of
          the pattern at rest, which has some where the input is padded.
        - of metric layers `anisotropy` (≥ 1), `asymmetry` (in [0, 1)), each with `_std`: see `geometry`.
        - of the other layers `residual` (0 to 1), `residual_std`: what no Randers metric explains of the samples on its
          rays (`geometry.fit_randers`); and `shift`, `linear`, `rest`: the parts of the mean square displacement that a
          shift, a linear map and no affine map explain (`geometry.fit_frame`), which add up to one.

        Means and spreads are over images, pixels and samples. Empty for a network without adaptive layers.
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, BallConv2d)}
    report: Diagnosis = {}

    def look(layer: nn.Module, inputs: Tuple[Tensor, ...]) -> None:
        if layer not in names:
            return
        x, points = inputs[0], layer.points.reshape(-1, 2).cpu()
        positions = layer.positions(x)
        rest = points.repeat(positions.shape[1] // len(points), 1)[None, :, :, None, None].to(positions)
        report[names[layer]] = {
            **_summarise("displacement", torch.linalg.vector_norm(positions - rest, dim=2)),
            "outside": _outside(layer, x, positions),
            "outside_at_rest": _outside(layer, x, rest.expand_as(positions)),
            **(_shape(layer, x) if isinstance(layer, MetricConv2d) else _explained(points, positions)),
        }

    training = model.training
    with register_module_forward_pre_hook(look):
        model.eval()(images.to(next(model.parameters()).device))
    model.train(training)
    return report


def strayed(model: nn.Module, report: Diagnosis) -> Optional[str]:
    """One line on the layer whose samples have left the image most; None where all have stayed.

    Args:
        model: The network.
        report: What `diagnose` says of it.
    """
    left = {name: numbers["outside"] - numbers["outside_at_rest"] for name, numbers in report.items()}
    worst = max(left, key=left.__getitem__, default="")
    if not left or left[worst] < STRAYED:
        return None
    bounded, numbers = hasattr(model.get_submodule(worst), "max_offset"), report[worst]
    return (
        f"{worst}: {numbers['outside']:.0%} of its samples are outside the image ({numbers['outside_at_rest']:.0%} at "
        f"rest), {numbers['displacement']:.1f} pixels from their places. A lower --predictor_lr slows them"
        + (", and --model_args.conv_cfg.max_offset bounds them." if bounded else ".")
    )


@torch.no_grad()
def first_not_finite(model: nn.Module, images: Tensor) -> Optional[str]:
    """The name of the first layer in whose output a value is no finite number, None where all are."""
    names, found = {module: name for name, module in model.named_modules()}, list[str]()

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(names[module])

    with register_module_forward_hook(look):
        model(images)
    return found[0] if found else None


def mean_diagnosis(reports: List[Diagnosis]) -> Diagnosis:
    """The mean of several networks' diagnoses, layer by layer (of one architecture, from several seeds)."""
    return {
        layer: {key: sum(report[layer][key] for report in reports) / len(reports) for key in numbers}
        for layer, numbers in (reports[0] if reports else {}).items()
    }


def plot_geometry(diagnoses: Mapping[Tuple[str, str], Diagnosis], colours: Mapping[str, str]):
    """A column for each setting, a row for each quantity, a line for each convolution over the layers as they run.

    A layer without displacement did not adapt. One far above the dotted line, a pixel, or whose samples lie outside the
    image much more than at rest (dashed), ran away. Bands are one standard deviation.

    Args:
        diagnoses: By (setting, convolution); a setting is a column's title. Empty ones are not drawn.
        colours: Of each convolution.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    shown = {key: report for key, report in diagnoses.items() if report}
    settings = list(dict.fromkeys(setting for setting, _ in shown)) or [""]
    known = {name for report in shown.values() for numbers in report.values() for name in numbers}
    rows = [name for name in QUANTITIES if name in known] or ["displacement"]
    figure = Figure(figsize=(1 + 4 * len(settings), 1 + 1.8 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(settings), squeeze=False, sharex="col", sharey="row")
    lines: Dict[str, Any] = {}
    for column, setting in enumerate(settings):
        reports = {conv: report for (name, conv), report in shown.items() if name == setting}
        layers = list(dict.fromkeys(layer for report in reports.values() for layer in report))
        panels[0][column].set_title(setting)
        for name, axes in zip(rows, panels[:, column], strict=True):
            for conv, report in reports.items():
                numbers = {layer: values for layer, values in report.items() if name in values}
                places = [layers.index(layer) for layer in numbers]
                means = torch.tensor([values[name] for values in numbers.values()])
                spread = torch.tensor([values.get(f"{name}_std", 0.0) for values in numbers.values()])
                colour = colours.get(conv)
                (lines[conv],) = axes.plot(places, means, marker="o", markersize=4, color=colour)
                axes.fill_between(places, (means - spread).clamp(min=0), means + spread, color=colour, alpha=0.15, lw=0)
                if name == "outside":
                    at_rest = [values["outside_at_rest"] for values in numbers.values()]
                    axes.plot(places, at_rest, color="black", linestyle="--", lw=1)
            if name == "displacement":
                axes.set_yscale("symlog", linthresh=0.1)
                axes.axhline(1, color="black", linestyle=":", lw=1)
            axes.set_xticks(range(len(layers)), layers, rotation=90)
            axes.grid(alpha=0.3)
    for name, axes in zip(rows, panels[:, 0], strict=True):
        axes.set_ylabel(QUANTITIES[name])
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=max(len(lines), 1))
    return figure
