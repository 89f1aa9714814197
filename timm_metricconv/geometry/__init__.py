"""Metrics, parametrizations, drifts and patterns: pure tensor functions, no modules."""

from .drifts import DRIFTS
from .geodesics import geodesic_positions
from .image_metric import image_metric
from .implicit import FrameFit, RandersFit, anisotropy, asymmetry, fit_frame, fit_randers, star_hull, unit_ball
from .metrics import Metric, Root, randers, square_root, zermelo_ellipse
from .navigation import Frame, Navigation, affine_fields, navigation_of, randers_of
from .parametrizations import PARAMETRIZATIONS, Parametrization, frame_of
from .patterns import PATTERNS
from .rays import ray_positions

__all__ = [
    "DRIFTS",
    "PARAMETRIZATIONS",
    "PATTERNS",
    "Frame",
    "FrameFit",
    "Metric",
    "Navigation",
    "Parametrization",
    "RandersFit",
    "Root",
    "affine_fields",
    "anisotropy",
    "asymmetry",
    "fit_frame",
    "fit_randers",
    "frame_of",
    "geodesic_positions",
    "image_metric",
    "navigation_of",
    "randers",
    "randers_of",
    "ray_positions",
    "square_root",
    "star_hull",
    "unit_ball",
    "zermelo_ellipse",
]
