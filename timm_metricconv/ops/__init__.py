"""One op, `ball_conv2d`, and its backends: they know positions and affine samples, and import nothing else of ours."""

from .dispatch import BACKENDS, Backend, ball_conv2d, why_not_on
from .samples import Samples, place

__all__ = ["BACKENDS", "Backend", "Samples", "ball_conv2d", "place", "why_not_on"]
