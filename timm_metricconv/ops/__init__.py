"""One op, `ball_conv2d`, and its backends. Of ours this folder imports the law of F alone, from `geometry`."""

from .dispatch import BACKENDS, Backend, ball_conv2d
from .samples import Samples, place

__all__ = ["BACKENDS", "Backend", "Samples", "ball_conv2d", "place"]
