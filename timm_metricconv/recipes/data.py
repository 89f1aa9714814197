"""Data sets: an image folder, every name of timm's `create_dataset`, and two that scikit packages carry."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence, Tuple

import numpy as np
from PIL import Image
from pydantic import NonNegativeInt, PositiveInt
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader, Dataset

from .config import ConfigError, option

CIFAR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@dataclass
class DataConfig:
    """What the images are and how they are shown to a network."""

    data: str = option("digits", "digits[/FIRST-LAST], textures, cifar10, cifar100, a folder, or a timm dataset name")
    data_dir: str = option("data", "root that timm and torchvision download to and read from")
    num_classes: NonNegativeInt = option(0, "number of classes; 0 asks the data set")
    input_size: NonNegativeInt = option(0, "images are resized to this; 0 takes the model's own size")
    mean: List[float] = option([], "by default the data set's (CIFAR) or the model's")
    std: List[float] = option([], "likewise")
    scale: List[float] = option([0.08, 1.0], "area range of RandomResizedCrop")
    ratio: List[float] = option([0.75, 1.3333], "aspect range of RandomResizedCrop")
    hflip: float = option(0.5, "probability of a horizontal flip")
    color_jitter: float = option(0.0, "strength of colour jitter")
    auto_augment: Optional[str] = option(None, "timm's auto-augment policy, e.g. rand-m9-mstd0.5-inc1")
    re_prob: float = option(0.0, "probability of random erasing")
    crop_pct: Optional[float] = option(None, "centre crop of the validation images; by default the model's own")
    interpolation: Optional[str] = option(None, "resizing; by default the model's own, in training random")
    batch_size: PositiveInt = option(128, "images in a batch, on each device")
    workers: NonNegativeInt = option(2, "loader processes; 0 loads in the training process")


class ArrayDataset(Dataset):
    """Images `[N, H, W]` or `[N, H, W, 3]` uint8 and labels; timm's loader sets `transform`."""

    def __init__(self, images: np.ndarray, labels: Sequence[int], classes: int):
        self.images, self.labels, self.classes = images, list(labels), list(range(classes))
        self.transform: Optional[Callable] = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert("RGB")
        return (self.transform(image) if self.transform else image), self.labels[index]


def _digits(classes: str, train: bool) -> ArrayDataset:
    """scikit-learn's 1797 digits at 8×8; every fourth image is for validation. `classes` is "" or "FIRST-LAST"."""
    from sklearn.datasets import load_digits

    try:
        first, last = (int(part) for part in (classes or "0-9").split("-"))
    except ValueError:
        raise ConfigError(f"data: expected digits or digits/FIRST-LAST, got 'digits/{classes}'.") from None
    digits = load_digits()
    keep = (digits.target >= first) & (digits.target <= last)
    images, labels = (digits.images[keep] * 255 / 16).astype(np.uint8), digits.target[keep] - first
    split = (np.arange(len(labels)) % 4 != 3) == train
    return ArrayDataset(images[split], labels[split], last - first + 1)


def _textures(train: bool, size: int = 32) -> ArrayDataset:
    """32×32 patches of scikit-image's brick, grass and gravel; training and validation patches come from other regions.

    The left three quarters of each 512×512 picture train and the right quarter validates, a patch's width apart; no two
    patches overlap.
    """
    from skimage import data

    images, labels = [], []
    for label, picture in enumerate((data.brick(), data.grass(), data.gravel())):
        border = 3 * picture.shape[1] // 4
        first, last = (0, border - size) if train else (border, picture.shape[1])
        for top in range(0, picture.shape[0] - size + 1, size):
            for left in range(first, last - size + 1, size):
                images.append(picture[top : top + size, left : left + size])
                labels.append(label)
    return ArrayDataset(np.stack(images), labels, 3)


def _dataset(config: DataConfig, train: bool) -> Dataset:
    name, _, part = config.data.partition("/")
    if name == "digits":
        return _digits(part, train)
    if config.data == "textures":
        return _textures(train)
    split = "train" if train else "validation"
    if Path(config.data).is_dir():
        folders = [f for f in ("train", "val", "validation") if (Path(config.data) / f).is_dir()]
        if "train" not in folders or len(folders) < 2:
            raise ConfigError(f"data: {config.data!r} needs the folders train/ and val/, each with a folder per class.")
        return create_dataset("", root=config.data, split=split)
    known = config.data in CIFAR_STATISTICS
    if (not known and "/" not in config.data) or config.data.startswith((".", "/")):
        raise ConfigError(
            f"data: there is no folder {config.data!r}, and it is no data set of ours (digits, textures, cifar10, "
            "cifar100). A data set of timm's create_dataset has a prefix: torch/…, hfds/…, hfids/…, wds/…, tfds/…"
        )
    os.makedirs(config.data_dir, exist_ok=True)
    try:
        return create_dataset(
            f"torch/{config.data}" if known else config.data,
            root=config.data_dir,
            split=split,
            is_training=train,
            download=True,
            batch_size=config.batch_size,
        )
    except Exception as error:  # every source has exceptions of its own
        raise ConfigError(
            f"data: {config.data!r} could not be read from or downloaded to data_dir={config.data_dir!r}: {error} "
            "Where there is no network, put its files there by hand."
        ) from error


def class_count(config: DataConfig, dataset: Dataset) -> int:
    """`num_classes`, or what the data set knows."""
    if config.num_classes:
        return config.num_classes
    reader = getattr(dataset, "reader", None)
    classes = getattr(dataset, "classes", None) or getattr(reader, "class_to_idx", None)
    if not classes:
        raise ConfigError(f"num_classes: {config.data!r} does not tell how many classes it has; set it.")
    return len(classes)


def normalisation(config: DataConfig, pretrained_cfg: dict) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
    """(mean, std): the configured, else CIFAR's, else the model's."""
    theirs = CIFAR_STATISTICS.get(config.data, (pretrained_cfg["mean"], pretrained_cfg["std"]))
    return tuple(config.mean or theirs[0]), tuple(config.std or theirs[1])


def evaluation_crop(config: DataConfig, pretrained_cfg: dict) -> Tuple[float, str]:
    """(crop_pct, interpolation) of validation images: the configured, else the model's own."""
    return config.crop_pct or pretrained_cfg["crop_pct"], config.interpolation or pretrained_cfg["interpolation"]


def image_size(config: DataConfig, pretrained_cfg: dict) -> int:
    """Edge of the input images: the configured, else the model's."""
    return config.input_size or pretrained_cfg["input_size"][-1]


def make_datasets(config: DataConfig) -> Tuple[Dataset, Dataset]:
    """(training, validation) data sets.

    Raises:
        ConfigError: The data cannot be had; the message says what to do.
    """
    return _dataset(config, True), _dataset(config, False)


def make_loader(config: DataConfig, dataset: Dataset, pretrained_cfg: dict, train: bool) -> DataLoader:
    """timm's loader, with its training augmentation or its validation transform."""
    if train and hasattr(dataset, "__len__") and len(dataset) < config.batch_size:
        raise ConfigError(f"batch_size={config.batch_size} is more than the {len(dataset)} training images.")
    mean, std = normalisation(config, pretrained_cfg)
    size, (crop, interpolation) = image_size(config, pretrained_cfg), evaluation_crop(config, pretrained_cfg)
    return create_loader(
        dataset,
        input_size=(3, size, size),
        batch_size=config.batch_size,
        is_training=train,
        scale=tuple(config.scale),
        ratio=tuple(config.ratio),
        hflip=config.hflip,
        color_jitter=config.color_jitter,
        auto_augment=config.auto_augment,
        re_prob=config.re_prob if train else 0.0,
        mean=mean,
        std=std,
        num_workers=config.workers,
        crop_pct=crop,
        interpolation=config.interpolation or "random" if train else interpolation,
        # accelerate moves the batches
        use_prefetcher=False,
        persistent_workers=False,
    )
