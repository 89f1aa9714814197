"""Random warps of pictures: rotation, scale, stretch along any axis, perspective and elastic deformation."""

import math
from typing import List

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic.dataclasses import dataclass
from torchvision.transforms import v2

from .config import ConfigError, Settings, option

# A grid of so many knots on a side bends a picture elastically.
KNOTS = 5


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _rotation(angle: float) -> np.ndarray:
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def _homography(points: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The eight numbers (a, …, h) of (ax + by + c, dx + ey + f) / (gx + hy + 1), which takes four points to theirs.

    torchvision fits them, which takes as long as all the rest of a warp.
    """
    (x, y), affine, nothing = images.T[..., None], np.column_stack((points, np.ones(4))), np.zeros((4, 3))
    rows = np.block([[affine, nothing, -x * points], [nothing, affine, -y * points]])
    return np.linalg.solve(rows, images.T.flatten())


@dataclass
class Warp(Settings):
    """A law of random warps; each call draws one from torch's default generator and applies it to a PIL picture.

    Rotation, scale, stretch and perspective make one homography, so that a picture is resampled once. The centre of the
    picture stays where it is, and what comes from outside of it is black. A warp that is left out draws nothing.

    Raises:
        ConfigError: A range is empty or out of bounds.
    """

    rotation: List[float] = option([0.0], "degrees to either side: the most, or the least and the most")
    scale: List[float] = option([1.0], "size, log-uniform between 1 and this, or between two numbers")
    stretch: List[float] = option([1.0], "ratio of the axes, area kept, along a random axis: the most, or a range")
    perspective: float = option(0.0, "each corner moves inwards by up to this share of half the width and height")
    elastic: float = option(0.0, "standard deviation of the knots of a 5×5 grid, as a share of the shorter edge")

    def __post_init__(self) -> None:
        for name, neutral, most in (("rotation", 0, 180.0), ("scale", 1, 100.0), ("stretch", 1, 100.0)):
            value, least = getattr(self, name), 0.01 if name == "scale" else neutral
            pair = sorted((neutral, *value)) if len(value) == 1 else value
            if len(pair) != 2 or not least <= pair[0] <= pair[1] <= most:
                raise ConfigError(
                    f"{name}: expected one number or [least, most] between {least} and {most}; got {value}."
                )
            setattr(self, name, [float(number) for number in pair])
        for name, most in (("perspective", 0.9), ("elastic", 0.2)):
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"{name}: expected a number from 0 to {most}; got {getattr(self, name)}.")

    @property
    def idle(self) -> bool:
        """Whether it leaves every picture as it is."""
        return not (self._moves or self.elastic)

    @property
    def _moves(self) -> bool:
        return self.rotation[1] > 0 or self.scale != [1, 1] or self.stretch[1] > 1 or self.perspective > 0

    def _linear(self) -> np.ndarray:
        """scale · R(angle) · (a stretch along a random axis), `[2, 2]`."""
        side = 1 if torch.rand(()) < 0.5 else -1
        angle = math.radians(side * _uniform(*self.rotation))
        size = math.exp(_uniform(*map(math.log, self.scale)))
        longer = math.exp(_uniform(*map(math.log, self.stretch)) / 2)
        axis = _rotation(_uniform(0, math.pi))
        return size * _rotation(angle) @ axis @ np.diag((longer, 1 / longer)) @ axis.T

    def __call__(self, image: Image.Image) -> Image.Image:
        """A picture, and the same picture warped, of the same size."""
        width, height = image.size
        if self._moves:
            # from edge to edge, not between pixel centres: a quarter turn of a square maps pixels to pixels
            corners = np.array([[0, 0], [width, 0], [width, height], [0, height]])
            centre = np.array([width, height]) / 2
            inwards = 1 - self.perspective * torch.rand(4, 2, dtype=torch.float64).numpy()
            moved = (corners - centre) * inwards @ self._linear().T + centre
            # PIL asks where a pixel of the new picture comes from
            coefficients = _homography(moved, corners).tolist()
            image = image.transform(image.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR)
        if self.elastic:
            # v2.ElasticTransform blurs white noise: 16 ms for 28×28 pixels and 10 s for a photograph
            knots = torch.randn(1, 2, KNOTS, KNOTS) * self.elastic * min(width, height)
            pixels = F.interpolate(knots, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
            image = v2.functional.elastic(image, pixels * 2 / torch.tensor([width, height]))
        return image
