"""Metrics, parametrizations, drifts and patterns: pure tensor functions, no modules."""

from .drifts import DRIFTS
from .metrics import Metric, conditioned, drift_norm, max_stretch, randers, square_root, zermelo_ellipse
from .parametrizations import PARAMETRIZATIONS, Parametrization
from .patterns import PATTERNS

__all__ = [
    "DRIFTS",
    "PARAMETRIZATIONS",
    "PATTERNS",
    "Metric",
    "Parametrization",
    "conditioned",
    "drift_norm",
    "max_stretch",
    "randers",
    "square_root",
    "zermelo_ellipse",
]
