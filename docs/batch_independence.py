"""Does a network whose metrics were mixed across the batch in training need the mixing afterwards?

python docs/batch_independence.py [epochs] [seeds] trains small networks and evaluates them both ways.
"""

import statistics
import sys

import torch

from timm_metricconv import PAPER, MetricConv2d
from timm_metricconv.ops import place
from timm_metricconv.recipes.config import build, read_yaml
from timm_metricconv.recipes.data import make_datasets, make_loader
from timm_metricconv.recipes.network import adaptive_layers, create_model
from timm_metricconv.recipes.report import print_table
from timm_metricconv.recipes.train import TrainConfig, train

DATA = {"digits": {}, "textures": {"data": "textures", "input_size": 32, "scale": [0.5, 1.0], "hflip": 0.5}}
# a bounded metric on the paper's rays, whose samples lie at their distance
OURS = {"parametrization": "logspd", "sampling": "rays", "eps_omega": 0.5}
THEIRS = {**PAPER["conv_cfg"], "scale": [0.1, 1.5]}  # a run's config.yaml has lists
CONV_CFGS = {"logspd": OURS, "paper": THEIRS, "paper FKW": {**THEIRS, "fixed_kernel": True}}
# data, layers, whether they are mixed in training
CASES = (
    ("digits", "logspd", True),
    ("digits", "paper", True),
    ("digits", "paper FKW", True),
    ("textures", "logspd", True),
    ("textures", "logspd", False),
    ("textures", "paper FKW", True),
)


class MixedConv2d(MetricConv2d):
    """The sample of image b and direction j is read from the metric of image (b·K + j) mod B."""

    def samples(self, raw):
        own = place(super().samples(raw))
        images, taps = own.shape[:2]
        n = torch.arange(images * taps, device=own.device).view(images, taps)
        mixed = own[n % images, torch.arange(taps, device=own.device)]
        self.moved = float((mixed - own).detach().norm(dim=2).median())
        return mixed


class PlainConv2d(MetricConv2d):
    """The pattern itself, no metric: shows how much the metrics matter at all."""

    def samples(self, raw):
        return self.points.flatten(0, 1)[None, :, :, None, None].expand_as(place(super().samples(raw)))


def set_ball(model, kind):
    """Makes all metric layers layers of this class."""
    for layer in adaptive_layers(model):
        layer.__class__ = kind


@torch.no_grad()
def classes(model, images, order, batch_size, kind):
    """The class that each image gets when the images come in this order, in batches of this size."""
    set_ball(model, kind)
    found = torch.empty(len(images), dtype=torch.long)
    for part in order.split(batch_size):
        found[part] = model(images[part]).argmax(-1)
    return found


def evaluate(model, images, labels):
    """Top-1 (%), images (%) whose class changes with their company, and pixels by which mixing moves samples."""
    first, *others = (torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)) for seed in range(4))
    found = {
        "own metrics": classes(model, images, first, 128, MetricConv2d),
        "mixed, 128": classes(model, images, first, 128, MixedConv2d),
        "mixed, 2": classes(model, images, first, 2, MixedConv2d),
        "mixed, sorted": classes(model, images, labels.argsort(stable=True), 128, MixedConv2d),
        "no metric": classes(model, images, first, 128, PlainConv2d),
    }
    again = [classes(model, images, order, 128, MixedConv2d) for order in others]
    changed = torch.stack([one != found["mixed, 128"] for one in again]).any(0)
    result = {name: 100 * float((value == labels).float().mean()) for name, value in found.items()}
    moved = statistics.mean(layer.moved for layer in adaptive_layers(model))
    return {**result, "class changes": 100 * float(changed.float().mean()), "mixing moves (px)": moved}


def run(data, conv_cfg, mixed, epochs, seed, folder):
    """Trains as configs/digits.yaml does, but with one learning rate as in the paper, and evaluates."""
    values = read_yaml("configs/digits.yaml")
    values["model_args"] |= {"conv_cfg": conv_cfg}
    values |= {**DATA[data], "epochs": epochs, "seed": seed, "output": folder, "predictor_lr": 1.0}
    config = build(TrainConfig, values)
    train(config, quiet=True, prepare=lambda model: set_ball(model, MixedConv2d if mixed else MetricConv2d))
    model = create_model(f"local-dir:{folder}/model", {}, pretrained=True).eval()
    loader = make_loader(config, make_datasets(config)[1], model.pretrained_cfg, train=False)
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    return evaluate(model, images, labels)


def main(epochs=8, seeds=3):
    """Mean ± standard deviation over the seeds; a row for each way to configure the layers."""
    rows = []
    for data, layers, mixed in CASES:
        label = f"{data}-{layers}{'' if mixed else '-own'}-{epochs}"
        results = [
            run(data, CONV_CFGS[layers], mixed, epochs, seed, f"runs/batch_independence/{label}-{seed}")
            for seed in range(seeds)
        ]
        row = {"data": data, "layers": layers, "trained": "mixed" if mixed else "own"}
        for key in results[0]:
            values = [result[key] for result in results]
            row[key] = f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if seeds > 1 else 0:.2f}"
        rows.append(row)
        print(row, flush=True)
    print_table(rows, f"{epochs} epochs, {seeds} seeds: top-1 (%) evaluated with")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
