"""The convolutions: each is a ball and the one op."""

from typing import Dict, Type

from .ball_conv import BallConv2d
from .metric import MetricConv2d
from .offsets import ActiveConv2d, AffineConv2d, DeformConv2d, ShiftedConv2d

# The names that `convert`, the models and the recipes take.
LAYERS: Dict[str, Type[BallConv2d]] = {
    "metric": MetricConv2d,
    "deform": DeformConv2d,
    "shifted": ShiftedConv2d,
    "active": ActiveConv2d,
    "affine": AffineConv2d,
}

__all__ = [
    "LAYERS",
    "ActiveConv2d",
    "AffineConv2d",
    "BallConv2d",
    "DeformConv2d",
    "MetricConv2d",
    "ShiftedConv2d",
]
