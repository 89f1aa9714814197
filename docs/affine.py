"""What have trained deformable layers learned? python docs/affine.py OUTPUT.csv PICTURE.png TASK=RUN,RUN... TASK=RUN...

Of the squares of all displacements of a layer's samples, the parts that a shift, a stretch, a turn and none of them
explain (`geometry.fit_frame`), over the validation images of runs of a task that differ in their seed. Displacements at
random have 11 % in the shift, 17 % in the stretch, 6 % in the turn and 67 % in the rest at 3×3: 2, 3, 1 and 12 of 18.
Of K samples 6 of 2K numbers are affine. That is the chance: a third at 3×3, 6 % at 7×7.
"""

import csv
import sys
from pathlib import Path

import torch

from timm_metricconv.geometry import fit_frame
from timm_metricconv.layers import BallConv2d
from timm_metricconv.recipes.config import build, read_yaml
from timm_metricconv.recipes.data import make_datasets, make_loader
from timm_metricconv.recipes.network import create_model
from timm_metricconv.recipes.settings import TrainConfig

PARTS = ("shift", "stretch", "turn", "rest")


@torch.no_grad()
def moved(model, loader):
    """By layer `[5]`: mean squares in pixel² of the parts, over images, pixels and samples, and the affine's chance."""
    found = {}

    def look(layer, name, x):
        positions = layer.positions(x).double().unflatten(1, (layer.metric_groups, -1)).flatten(0, 1)
        fit = fit_frame(positions, layer.points.flatten(0, 1))
        change = fit.linear - torch.eye(2, dtype=torch.float64)
        turn = (change[..., 0, 1] - change[..., 1, 0]).square() / 2 / change.square().sum((-2, -1)).clamp(min=1e-30)
        shift, linear, rest = fit.moved.unbind(-1)
        chance = torch.full_like(rest, 3 / positions.shape[1])
        parts = torch.stack((shift, linear * (1 - turn), linear * turn, rest, chance), -1)
        found.setdefault(name, []).append(parts.mean((1, 2)))

    handles = [
        module.register_forward_pre_hook(lambda layer, inputs, name=name: look(layer, name, inputs[0]))
        for name, module in model.named_modules()
        if isinstance(module, BallConv2d)
    ]
    model.eval()
    for images, _ in loader:
        model(images)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).mean(0) for name, parts in found.items()}


def of_run(run):
    """`moved` of a run's network on its validation images."""
    config = build(TrainConfig, read_yaml(Path(run, "config.yaml")))
    model = create_model(f"local-dir:{run}/model", {}, pretrained=True)
    return moved(model, make_loader(config, make_datasets(config)[1], model.pretrained_cfg, train=False))


def draw(rows, path):
    """Bars of shares, a row for each task and layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.8 + 0.26 * len(rows)), layout="constrained")
    axes, left = figure.subplots(), [0.0] * len(rows)
    for part, colour in zip(PARTS, ("#0072B2", "#009E73", "#E69F00", "#BBBBBB"), strict=True):
        widths = [100 * row[part] for row in rows]
        axes.barh(range(len(rows)), widths, left=left, label=part, color=colour)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for number, row in enumerate(rows):
        axes.plot(2 * [100 * row["chance"]], [number - 0.4, number + 0.4], "k", lw=1)
    axes.set_yticks(range(len(rows)), [f"{row['task']}: {row['layer']}" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("share of the squared displacements, %; black: chance")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=110)


def main(output, picture, *tasks):
    """A row for each task and layer: the shares, and the root of the mean square of the displacement in pixels."""
    rows = []
    for task, _, runs in (text.partition("=") for text in tasks):
        found = [of_run(run) for run in runs.split(",")]
        for layer in found[0]:
            parts = torch.stack([run[layer] for run in found]).mean(0)
            shares = dict(zip(PARTS, (parts[:4] / parts[:4].sum()).tolist(), strict=True))
            row = {"task": task, "runs": len(found), "layer": layer, "displacement": float(parts[:4].sum().sqrt())}
            rows.append({**row, **shares, "affine": 1 - shares["rest"], "chance": float(parts[4])})
    with open(output, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
