"""One op, `ball_conv2d`, and its backends. They know positions and affine samples; this folder imports nothing of ours."""

from .dispatch import BACKENDS, Backend, ball_conv2d
from .samples import Samples, place

__all__ = ["BACKENDS", "Backend", "Samples", "ball_conv2d", "place"]
