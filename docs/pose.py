"""Shapes of known pose: does the geometry that a network predicts turn with the shape?

python docs/pose.py make FOLDER draws the shapes (`pip install ".[data]"`), as an image folder whose classes are shapes;
python docs/pose.py measure RUN... CSV reads how each layer of trained networks answers;
python docs/pose.py draw RUN PICTURE.png draws how the layer that answers best does.
"""

import csv
import math
import sys
from pathlib import Path

import torch

from timm_metricconv.geometry import fit_frame
from timm_metricconv.layers import BallConv2d
from timm_metricconv.recipes.config import build, read_yaml
from timm_metricconv.recipes.data import make_datasets, make_loader
from timm_metricconv.recipes.network import create_model
from timm_metricconv.recipes.settings import TrainConfig


def make(folder, classes=8, count=50, size=32):
    """`folder`/{train,val}/SHAPE/NUMBER_DEGREES.png: idsprites' shapes, half as wide as high before they are turned."""
    import numpy as np
    from idsprites import Factors, InfiniteDSprites
    from PIL import Image

    np.random.seed(0)
    sprites = InfiniteDSprites(img_size=size, shapes=classes, orientation_marker=False, background_color="black")
    for split in ("train", "val"):
        for number in range(classes * count):
            label = number % classes
            angle, scale, x, y = np.random.uniform((0, 1, 0.35, 0.35), (2 * math.pi, 1.6, 0.65, 0.65))
            shape = sprites.shapes[label] * [[0.5], [1]]
            image = sprites.draw(Factors(shape, (1, 1, 1), label, scale, angle, x, y), channels_first=False)
            path = Path(folder, split, f"shape{label}", f"{number:04d}_{math.degrees(angle):.1f}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((255 * image).astype("uint8")).save(path)


@torch.no_grad()
def axes(model, images):
    """By layer: the long axis of each image's samples as r·exp(2iφ) `[N]`, the mean over pixels of log anisotropy."""
    found = {}

    def look(layer, name, x):
        positions, points = layer.positions(x), layer.points.flatten(0, 1)
        linear = fit_frame(positions, points).linear.double()
        square = linear @ linear.mT
        # of a symmetric matrix (p + q, r; r, p − q) the long axis is at half the angle of (q, r)
        q, r = (square[..., 0, 0] - square[..., 1, 1]) / 2, square[..., 0, 1]
        long, p = torch.hypot(q, r), (square[..., 0, 0] + square[..., 1, 1]) / 2
        size = torch.atanh((long / p).clamp(max=1 - 1e-9))
        found[name] = torch.polar(size, torch.atan2(r, q)).mean((-2, -1))

    handles = [
        module.register_forward_pre_hook(lambda layer, inputs, name=name: look(layer, name, inputs[0]))
        for name, module in model.named_modules()
        if isinstance(module, BallConv2d)
    ]
    model.eval()(images)
    for handle in handles:
        handle.remove()
    return found


def alignment(axis, angles, labels):
    """How far the axes turn with the shapes: 1 where every axis turns as its shape does, near 0 where none does."""
    turned = axis * torch.polar(torch.ones_like(angles), -2 * angles)
    resultants = [turned[labels == label].sum().abs() / axis[labels == label].abs().sum() for label in labels.unique()]
    return float(torch.stack(resultants).mean())


def answers(run):
    """Of a run's network: its configuration, the images and what they show, and the axes that each layer answers."""
    config = build(TrainConfig, read_yaml(Path(run, "config.yaml")))
    model = create_model(f"local-dir:{run}/model", {}, pretrained=True)
    dataset = make_datasets(config)[1]
    loader = make_loader(config, dataset, model.pretrained_cfg, train=False)
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    degrees = [float(Path(file).stem.split("_")[1]) for file in dataset.files]
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    found = axes(model, images)
    return config, images, labels, angles, found


def measure(*runs, output):
    """A row for each run and layer: the alignment, and what shuffled angles give in 19 of 20 cases at the most."""
    rows = []
    for run in runs:
        config, _, labels, angles, found = answers(run)
        generator = torch.Generator().manual_seed(0)
        for layer, axis in found.items():
            anisotropy, axis = math.exp(float(axis.abs().mean())), axis - axis.mean()  # a fixed axis is no answer
            chance = [
                alignment(axis, angles[torch.randperm(len(angles), generator=generator)], labels) for _ in range(200)
            ]
            rows.append(
                {
                    "conv": Path(run).name.split("-scratch")[0],
                    "seed": config.seed,
                    "layer": layer,
                    "alignment": alignment(axis, angles, labels),
                    "chance": sorted(chance)[189],
                    "anisotropy": anisotropy,
                }
            )
    with open(output, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw(run, path, shapes=4, of_each=6):
    """The layer's axis over some pictures of each shape, and in all of them against the shape's angle."""
    import matplotlib.pyplot as plt

    _, images, labels, angles, found = answers(run)
    moving = {layer: axis - axis.mean() for layer, axis in found.items()}
    layer = max(moving, key=lambda layer: alignment(moving[layer], angles, labels))
    axis, half = moving[layer].angle() / 2, images.shape[-1] / 2
    figure = plt.figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(of_each, 6))
    grid, plot = left.subplots(shapes, of_each), right.subplots()
    for label, row in enumerate(grid):
        shown = (labels == label).nonzero()[:, 0]
        for i, picture in zip(shown, row, strict=False):
            picture.imshow(images[i].mean(0), cmap="gray")
            x, y = 0.6 * half * torch.cos(axis[i]), 0.6 * half * torch.sin(axis[i])
            picture.plot((half - x, half + x), (half - y, half + y), color="#d55e00", linewidth=2)
            picture.axis("off")
        plot.scatter(angles[shown].rad2deg() % 180, axis[shown].rad2deg() % 180, s=12, label=f"shape {label + 1}")
    left.suptitle(f"axes of {layer}")
    plot.set(xlabel="angle of the shape, degrees (mod 180)", ylabel="angle of the axis, degrees (mod 180)")
    plot.legend()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "make":
        make(*arguments)
    elif command == "draw":
        draw(*arguments)
    else:
        measure(*arguments[:-1], output=arguments[-1])
