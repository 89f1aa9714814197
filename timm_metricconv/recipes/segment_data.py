"""Images with masks: a folder of them, and thin curves over real textures."""

from functools import lru_cache
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from .config import ConfigError
from .data import SUFFIXES, check_batch_size, image_size, normalisation, read_image, textures
from .settings import TrainConfig

# The value of a mask's pixels that count nowhere, as in Pascal VOC.
IGNORED = 255
# Training and validation images of the curves.
CURVES = {"train": 192, "val": 96}
CURVE_SIZE = 64


class MaskDataset(Dataset):
    """Images with masks; a loader sets `transform`, which sees both.

    Args:
        count: Number of images.
        classes: Number of classes, the background (0) among them.
    """

    def __init__(self, count: int, classes: int):
        self.indices: Sequence[int] = range(count)
        self.classes = range(classes)
        self.transform: Optional[Callable] = None

    def read(self, index: int) -> Tuple[Image.Image, np.ndarray]:
        """An RGB picture, and its mask `[H, W]` of class numbers, `IGNORED` where it does not matter."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tuple[Tensor, Tensor]:
        picture, numbers = self.read(self.indices[index])
        image, mask = tv_tensors.Image(picture), tv_tensors.Mask(numbers)
        if self.transform is not None:
            image, mask = self.transform(image, mask)
        # plain tensors: what is computed from them is neither
        return image.as_subclass(Tensor), mask.as_subclass(Tensor).long()


def _curve(random: np.random.Generator, size: int) -> np.ndarray:
    """How much of each pixel a thin curve covers, `[size, size]` in [0, 1]: a cubic Bézier curve from side to side."""
    fine = 4 * size
    ends = np.array([[0, random.uniform(0.1, 0.9)], [1, random.uniform(0.1, 0.9)]])
    points = np.insert(ends, 1, random.uniform(0, 1, (2, 2)), 0)
    if random.random() < 0.5:
        points = points[:, ::-1]
    t = np.linspace(0, 1, 65)[:, None]
    weights = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    line = fine * weights @ points
    canvas = Image.new("L", (fine, fine))
    width = round(4 * random.uniform(1.5, 2.5))
    ImageDraw.Draw(canvas).line([tuple(point) for point in line], fill=255, width=width, joint="curve")
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX)) / 255


def draw_curves(texture: np.ndarray, random: np.random.Generator) -> Tuple[Image.Image, np.ndarray]:
    """One to three thin curves over a texture, each brighter or darker than what it covers.

    The step is 1.5 to 2.5 standard deviations of the texture, which has such pixels of its own.

    Args:
        texture: `[S, S]` uint8.
        random: Draws all.

    Returns:
        The picture, and its mask `[S, S]` uint8, 1 where a curve covers half of a pixel or more.
    """
    pixels, mask = texture.astype(float), np.zeros(texture.shape, np.uint8)
    for _ in range(random.integers(1, 4)):
        cover = _curve(random, len(texture))
        pixels += cover * random.choice((-1, 1)) * random.uniform(1.5, 2.5) * texture.std()
        mask |= cover >= 0.5
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB"), mask


class CurveDataset(MaskDataset):
    """Curves over brick, grass and gravel. Image i of a split is drawn by (split, i); its texture is of that split."""

    def __init__(self, split: str):
        super().__init__(CURVES[split], 2)
        self.split = split
        self.regions = [region for region, _ in textures(split == "train")]

    def read(self, index: int) -> Tuple[Image.Image, np.ndarray]:
        """See `draw_curves`; `CURVE_SIZE` pixels a side."""
        random = np.random.default_rng((self.split == "val", index))
        region = self.regions[random.integers(len(self.regions))]
        top, left = (random.integers(edge - CURVE_SIZE + 1) for edge in region.shape)
        return draw_curves(region[top : top + CURVE_SIZE, left : left + CURVE_SIZE], random)


def _files(folder: Path) -> Dict[str, Path]:
    if not folder.is_dir():
        raise ConfigError(f"data: there is no folder {folder}; expected train/ and val/ with images/ and masks/ each.")
    files: Dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            if path.stem in files:
                raise ConfigError(f"data: {files[path.stem]} and {path.name} have one name; keep one of them.")
            files[path.stem] = path
    if not files:
        raise ConfigError(f"data: there is no image in {str(folder)!r}.")
    return files


def _mask(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        if image.mode not in ("1", "L", "P", "I", "I;16"):
            raise ValueError(f"{path} is in colour ({image.mode}); a mask's pixels are class numbers.")
        if image.format == "JPEG":
            raise ValueError(f"{path} is a JPEG file, which changes class numbers; save masks as PNG files.")
        return np.asarray(ImageOps.exif_transpose(image)).astype(np.int64)


@lru_cache
def _pairs(root: str, split: str) -> Tuple[Tuple[Path, Path, Tuple[int, ...]], ...]:
    """(image, mask, values of the mask) of a split, all looked at."""
    images, masks = (_files(Path(root) / split / kind) for kind in ("images", "masks"))
    alone = sorted(images.keys() ^ masks.keys())
    if alone:
        kind, other = ("image", "mask") if alone[0] in images else ("mask", "image")
        more = f" ({len(alone) - 1} more have none either)" if len(alone) > 1 else ""
        raise ConfigError(f"data: {split}/{kind}s: {alone[0]!r} has no {other} of that name in {split}/{other}s{more}.")
    pairs = []
    for name, image in images.items():
        try:
            mask, size = _mask(masks[name]), read_image(image).size
        except Exception as error:  # each of Pillow's decoders has exceptions of its own
            raise ConfigError(f"data: {split}: {name!r} cannot be used; remove it or put it right: {error}") from None
        if size != mask.shape[::-1]:
            sizes = f"{size[0]}×{size[1]}, its mask {mask.shape[1]}×{mask.shape[0]} pixels"
            raise ConfigError(f"data: {image} is {sizes} (each turned as its EXIF orientation says).")
        pairs.append((image, masks[name], tuple(np.unique(mask).tolist())))
    return tuple(pairs)


class FolderDataset(MaskDataset):
    """Pairs of files; where `binary` is set, all of a mask that is not 0 is class 1."""

    def __init__(self, pairs: Sequence[Tuple[Path, Path, Tuple[int, ...]]], classes: int, binary: bool):
        super().__init__(len(pairs), classes)
        self.pairs, self.binary = pairs, binary

    def read(self, index: int) -> Tuple[Image.Image, np.ndarray]:
        """The picture and the mask of two files, each turned as its EXIF orientation says."""
        image, mask, _ = self.pairs[index]
        numbers = _mask(mask)
        return read_image(image), (numbers > 0).astype(np.int64) if self.binary else numbers


def _folder(config: TrainConfig) -> List[MaskDataset]:
    """`train/` and `val/`, each with `images/` and `masks/`; a mask has its image's name and any suffix."""
    splits = [_pairs(config.data, split) for split in ("train", "val")]
    values = {value for split in splits for _, _, found in split for value in found}
    # the usual way to store one class: were 255 to be ignored, there would be nothing to learn
    binary = values <= {0, IGNORED}
    classes = config.num_classes or (2 if binary else max(values - {IGNORED}) + 1)
    pairs = [pair for split in splits for pair in split]
    if not (binary or config.num_classes) and (classes == IGNORED or not values >= set(range(classes))):
        # an antialiased mask among those of 0 and 255 has any of them, and what is 255 would be ignored
        _, mask, found = max(pairs, key=lambda pair: len(pair[2]))
        shown = ", ".join(map(str, found[:5])) + (f", … ({len(found)} values)" if len(found) > 5 else "")
        raise ConfigError(
            f"data: {mask} has the pixels {shown}: expected class numbers without a gap, or 0 and 255 alone. Save "
            "masks without smoothing; where a class is absent, say how many there are by num_classes."
        )
    for _, mask, found in pairs:
        beyond = [value for value in found if not 0 <= value < classes and value != IGNORED]
        if beyond:
            raise ConfigError(f"data: {mask} has the value {beyond[0]}, but num_classes={classes}.")
    return [FolderDataset(split, classes, binary) for split in splits]


def make_mask_datasets(config: TrainConfig, seed: int = 0) -> Tuple[Dataset, Dataset]:
    """(training, validation) images with masks: `data` is "curves" or a folder.

    Args:
        config: The data, and how many images of it.
        seed: Draws the training subset (`train_images`).

    Raises:
        ConfigError: Images and masks do not fit each other, in one line that names the first that does not.
    """
    train, val = map(CurveDataset, CURVES) if config.data == "curves" else _folder(config)
    for key, dataset, draw in (("train_images", train, seed), ("val_images", val, 0)):
        count = getattr(config, key)
        if count > len(dataset):
            raise ConfigError(f"{key}: expected at most {len(dataset)}, or 0 for all; got {count}.")
        if count:
            dataset.indices = np.random.default_rng(draw).permutation(len(dataset))[:count].tolist()
    return train, val


def make_mask_loader(config: TrainConfig, dataset: MaskDataset, pretrained_cfg: dict, train: bool) -> DataLoader:
    """Batches of images `[B, C, S, S]` and masks `[B, S, S]`: cropped, flipped, jittered for training, else resized."""
    if train:
        check_batch_size(config, dataset)
    size, jitter = image_size(config, pretrained_cfg), config.color_jitter
    shown: List[Callable] = [v2.Resize((size, size), antialias=True)]
    if train:
        crop = v2.RandomResizedCrop(size, scale=tuple(config.scale), ratio=tuple(config.ratio), antialias=True)
        shown = [crop, v2.RandomHorizontalFlip(config.hflip), v2.ColorJitter(jitter, jitter, jitter)]
    mean, std = normalisation(config, pretrained_cfg)
    shown += [v2.Grayscale()] if len(mean) == 1 else []
    dataset.transform = v2.Compose([*shown, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    return DataLoader(dataset, batch_size=config.batch_size, shuffle=train, drop_last=train, num_workers=config.workers)
