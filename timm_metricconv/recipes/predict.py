"""The class of each image in a folder, by any timm network."""

from pathlib import Path
from typing import Any, Dict, List

import torch
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from .config import ConfigError, Settings, option
from .data import Pictures, check_files, image_files, make_loader
from .network import create_model
from .report import console, csv_text, write_atomic
from .settings import DataConfig
from .train import make_accelerator


@dataclass
class PredictConfig(Settings):
    """A prediction."""

    model: str = option("resnet18", "any timm model name, hf-hub: or local-dir:, with its weights")
    model_args: Dict[str, Any] = option({}, "arguments of the model")
    images: str = option("images", "folder of images, at any depth")
    output: str = option("predictions.csv", "table of file, class and probability")
    batch_size: PositiveInt = option(32, "images in a batch")
    workers: NonNegativeInt = option(2, "loader processes; 0 loads in this process")


def _labels(model: nn.Module) -> List[str]:
    """The names of a network's classes: its own, ImageNet's, or numbers."""
    subset = infer_imagenet_subset(model)
    theirs = ImageNetInfo(subset).label_descriptions() if subset else [str(i) for i in range(model.num_classes)]
    return list(model.pretrained_cfg.get("label_names") or theirs)


@torch.no_grad()
def predict(config: PredictConfig) -> List[Dict[str, Any]]:
    """Predicts, and writes `config.output`.

    Returns:
        file (its path in the folder), class and probability of each image.

    Raises:
        ConfigError: The model cannot be had, or there is no image or one that cannot be read.
    """
    files = image_files(Path(config.images))
    if not files:
        raise ConfigError(f"images: there is no image in {config.images!r}.")
    paths = tuple(str(Path(config.images) / file) for file in files)
    check_files(paths)
    accelerator = make_accelerator("no")
    model = create_model(config.model, config.model_args, pretrained=True).eval()
    labels, data = _labels(model), DataConfig(batch_size=config.batch_size, workers=config.workers)
    loader = make_loader(data, Pictures(paths, [0] * len(paths), [""]), model.pretrained_cfg, train=False)
    model, loader = accelerator.prepare(model, loader)
    found = torch.cat([accelerator.gather_for_metrics(model(images).softmax(1)).cpu() for images, _ in loader]).max(1)
    rows = [
        {"file": file, "class": labels[number], "probability": round(share, 4)}
        for file, share, number in zip(files, *(part.tolist() for part in found), strict=True)
    ]
    write_atomic(config.output, csv_text(rows))
    console.print(f"{config.output}: the classes of {len(rows):,} images")
    return rows
