"""Metrics, parametrizations, drifts and patterns: pure tensor functions, no modules."""

from .drifts import DRIFTS
from .geodesics import geodesic_positions
from .image_metric import image_metric
from .implicit import RandersFit, anisotropy, asymmetry, fit_randers, star_hull, unit_ball
from .metrics import Metric, Root, randers, square_root, zermelo_ellipse
from .parametrizations import PARAMETRIZATIONS, Parametrization
from .patterns import PATTERNS

__all__ = [
    "DRIFTS",
    "PARAMETRIZATIONS",
    "PATTERNS",
    "Metric",
    "Parametrization",
    "RandersFit",
    "Root",
    "anisotropy",
    "asymmetry",
    "fit_randers",
    "geodesic_positions",
    "image_metric",
    "randers",
    "square_root",
    "star_hull",
    "unit_ball",
    "zermelo_ellipse",
]
