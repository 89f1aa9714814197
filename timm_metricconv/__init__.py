"""Metric, deformable and shifted convolutions for timm: importing this package registers the models."""

from . import geometry, layers, models, ops
from .layers import (
    LAYERS,
    ActiveConv2d,
    AffineConv2d,
    BallConv2d,
    DeformConv2d,
    MetricConv2d,
    ShiftedConv2d,
)
from .models import PAPER, convert

__version__ = "0.3.0"

__all__ = [
    "LAYERS",
    "PAPER",
    "ActiveConv2d",
    "AffineConv2d",
    "BallConv2d",
    "DeformConv2d",
    "MetricConv2d",
    "ShiftedConv2d",
    "convert",
    "geometry",
    "layers",
    "models",
    "ops",
]
