"""Images to denoise: one, or BSDS300, Pascal VOC 2012 and scikit-image's pictures; grey, with noise of their own."""

import functools
import zlib
from pathlib import Path
from typing import List, Tuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .config import ConfigError
from .visualise import load_image

# What scikit-image's wheel carries, so that nothing is downloaded.
PICTURES = {
    "train": ("astronaut", "brick", "cell", "chelsea", "clock", "coffee", "coins", "gravel", "moon", "page", "rocket"),
    "test": ("camera", "grass", "hubble_deep_field", "text"),
}


def to_grey(picture: np.ndarray, size: int) -> Tensor:
    """`[H, W]` or `[H, W, 3]` uint8 → `[1, size, size]` in [0, 1]: luma, shorter side resized, centre cropped."""
    image = Image.fromarray(picture).convert("L")
    factor = size / min(image.size)
    image = image.resize([max(size, round(side * factor)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


def add_noise(image: Tensor, sigma: float, seed: int, name: str) -> Tensor:
    """White Gaussian noise that depends on the seed and on the image's name only, on any machine."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return image + sigma * torch.randn(image.shape, generator=generator)


class NoisyImages(Dataset):
    """(noisy, clean) pairs `[1, size, size]`: each image has its own noise, the same in every epoch."""

    def __init__(self, paths: List[str], size: int, sigma: float, seed: int):
        self.paths, self.size, self.sigma, self.seed = paths, size, sigma, seed

    def __len__(self) -> int:
        return len(self.paths)

    @functools.cache  # noqa: B019 (the data sets live as long as the program)
    def _clean(self, index: int) -> Tensor:
        return to_grey(load_image(self.paths[index]), self.size)

    def __getitem__(self, index: int) -> Tuple[Tensor, Tensor]:
        clean = self._clean(index)
        return add_noise(clean, self.sigma, self.seed, Path(self.paths[index]).name), clean


def _found(data: str, data_dir: str, inner: str) -> Path:
    """The data set's folder, `data_dir` itself or inside it."""
    parts = Path(inner).parts
    for start in range(len(parts) + 1):
        folder = Path(data_dir, *parts[start:])
        if (folder / ("images" if data == "bsds300" else "JPEGImages")).is_dir():
            return folder
    source = {
        "bsds300": (
            "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/BSDS300-images.tgz",
            "BSDS300/images/train/*.jpg and BSDS300/images/test/*.jpg",
        ),
        "voc2012": (
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            "VOCdevkit/VOC2012/JPEGImages/*.jpg and VOCdevkit/VOC2012/ImageSets/Main/{train,val}.txt",
        ),
    }[data]
    raise ConfigError(
        f"data: there is no {inner} in data_dir={data_dir!r}. Download {source[0]} and unpack it there, so that "
        f"there are {source[1]}; or take --data skimage, which needs no download."
    )


def image_paths(data: str, data_dir: str, train: bool) -> List[str]:
    """Files (or names of scikit-image's pictures) of a data set's training or test part.

    VOC's lists are those of `ImageSets/Main`: denoising needs no labels, and they name all the images.

    Raises:
        ConfigError: The data is not there; the message says where to get it and where to put it.
    """
    if data == "skimage":
        return list(PICTURES["train" if train else "test"])
    if data == "bsds300":
        folder = _found(data, data_dir, "BSDS300") / "images" / ("train" if train else "test")
        paths = sorted(folder.glob("*.jpg"))
    else:
        folder = _found(data, data_dir, "VOCdevkit/VOC2012")
        names = folder / "ImageSets" / "Main" / ("train.txt" if train else "val.txt")
        if not names.is_file():
            raise ConfigError(f"data: {names} is missing; it is part of VOCtrainval_11-May-2012.tar.")
        paths = [folder / "JPEGImages" / f"{name}.jpg" for name in names.read_text().split()]
        absent = [path for path in paths if not path.is_file()]
        if absent:
            raise ConfigError(f"data: {names} names {len(absent)} images that are missing, {absent[0]} for one.")
    if not paths:
        raise ConfigError(f"data: there are no images in {folder}.")
    return list(map(str, paths))
