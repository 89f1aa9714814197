"""Pictures of a denoising experiment: error over steps, and the images with their balls about an edge."""

import math
from typing import Any, Dict

import numpy as np
from torch import Tensor

from .denoise_cells import Cell
from .denoise_fit import BALLS, SPACING


def plot_curves(done: Dict[Cell, Dict[str, Any]], unit: str):
    """Train (dashed) and test (solid) error: a panel for each kernel size, noise and kernel kind."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((cell.sigma, cell.kernel, cell.k) for cell in done))
    figure = Figure(figsize=(3.6 * min(4, len(panels)), 3.2 * math.ceil(len(panels) / 4)), layout="constrained")
    axes = figure.subplots(math.ceil(len(panels) / 4), min(4, len(panels)), squeeze=False, sharey=True).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    titles = list(dict.fromkeys(cell.title for cell in done))
    colours = dict(zip(titles, ("#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7") * len(titles), strict=False))
    for axis, (sigma, kernel, k) in zip(axes, panels, strict=False):
        axis.set(title=f"k = {k}, σ = {sigma:g}, {kernel} kernel", xlabel=unit, yscale="log")
        axis.grid(alpha=0.3)
        for cell, result in done.items():
            if (cell.sigma, cell.kernel, cell.k) == (sigma, kernel, k):
                steps, train, test = zip(*result["curve"], strict=True)
                axis.plot(steps, train, color=colours[cell.title], linestyle="--")
                marker = "o" if len(steps) == 1 else None
                axis.plot(steps, test, color=colours[cell.title], label=cell.title, marker=marker)
    axes[0].set_ylabel("MSE (dashed: train, solid: test)")
    axes[0].legend(fontsize=8)
    return figure


def _zoom(axis, image: Tensor, result: Dict[str, Any], deform: bool) -> None:
    """The image about an edge, and where pixels read it: outermost samples joined, all samples of the middle one."""
    centres, middle = result["centres"], BALLS**2 // 2
    x, y = centres[middle].tolist()
    reach = SPACING * (BALLS // 2) + 6
    axis.imshow(image, cmap="gray", vmin=0, vmax=1, alpha=0.75)
    # the rings of deformable's offsets cross each other's: one is enough to see
    for number in [middle] if deform else range(len(centres)):
        ring = (centres[number] + result["rings"][number]).numpy()
        axis.plot(*np.concatenate((ring, ring[:1])).T, color="#D55E00", linewidth=1.0)
    samples = (centres[middle] + result["samples"]).numpy()
    axis.plot(*samples.T, ".", color="#0072B2", markersize=2.5 if len(samples) < 200 else 1.0)
    axis.plot(*centres.T.numpy(), "+", color="black", markersize=4)
    axis.set(xlim=(x - reach, x + reach), ylim=(y + reach, y - reach))


def plot_results(done: Dict[Cell, Dict[str, Any]], clean: Tensor):
    """Two rows for each (σ, kernel, k): clean, noisy and the results; below each what is about an edge, with balls."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    groups = list(dict.fromkeys((cell.sigma, cell.kernel, cell.k) for cell in done))
    columns = 2 + len({cell.title for cell in done})
    figure = Figure(figsize=(2.6 * columns, 5.6 * len(groups)), layout="constrained")
    grid = figure.subplots(2 * len(groups), columns, squeeze=False)
    for axis in grid.flatten():
        axis.set(xticks=[], yticks=[])
    for number, group in enumerate(groups):
        above, below = grid[2 * number : 2 * number + 2]
        cells = [cell for cell in done if (cell.sigma, cell.kernel, cell.k) == group]
        first = done[cells[0]]
        x, y = first["centres"][BALLS**2 // 2].tolist()
        reach = SPACING * (BALLS // 2) + 6
        sigma, kernel, k = group
        above[0].set_ylabel(f"k = {k}, σ = {sigma:g}, {kernel} kernel", fontsize=9)
        for axis, low, image, title in zip(above, below, (clean, first["noisy"]), ("clean", "noisy"), strict=False):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set_title(title, fontsize=9)
            corner, edge = (x - reach, y - reach), 2 * reach
            axis.add_patch(Rectangle(corner, edge, edge, fill=False, edgecolor="#E69F00", linewidth=1.5))
            low.imshow(image, cmap="gray", vmin=0, vmax=1)
            low.set(xlim=(x - reach, x + reach), ylim=(y + reach, y - reach))
        for axis, low, cell in zip(above[2:], below[2:], cells, strict=False):
            record = done[cell]["record"]
            axis.imshow(done[cell]["result"], cmap="gray", vmin=0, vmax=1)
            axis.set_title(f"{cell.title}\n{record['psnr']:.2f} dB, gap {record['gap']:.3g}", fontsize=9)
            _zoom(low, clean, done[cell], cell.method == "deform")
    return figure
