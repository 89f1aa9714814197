"""What a denoising experiment runs: its configuration, its rows, and the paper's learning rates and gaps for them."""

from typing import Annotated, Any, Dict, List, Literal, NamedTuple, Optional, Tuple

import torch
from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from ..geometry import image_metric
from .config import ConfigError, option
from .settings import RunConfig

Variant = Tuple[str, Optional[float]]
# Dagès, Lindenbaum, Bruckstein, Metric Convolutions (ICCV 2025): for each method and ε_ω, by k, SGD's learning rate for
# an image of 256×256 at σ = 0.3, and the generalisation gap (test − train) / train, a plain ratio.
PAPER_LR: Dict[Variant, Dict[int, float]] = {
    ("deform", None): {5: 1.5e6, 11: 7.4e6, 31: 6.0e7, 51: 1.9e8, 121: 9.8e8},
    ("metric", 0.9): {5: 1e4, 11: 1e4, 31: 1e4, 51: 1.2e5, 121: 1.4e5},
    ("metric", 0.1): {5: 1e4, 11: 1e4, 31: 1e4, 51: 1e4, 121: 1.1e5},
}
PAPER_GAP: Dict[Variant, Dict[int, float]] = {
    ("deform", None): {5: 265, 11: 74, 31: 28, 51: 18, 121: 6.6},
    ("metric", 0.9): {5: 1.1, 11: 0.9, 31: 1.1, 51: 0.8, 121: 1.2},
    ("metric", 0.1): {5: 1.3, 11: 1.1, 31: 1.3, 51: 1.4, 121: 1.5},
}
PAPER_PIXELS = 256 * 256
# Filters whose metric the image's gradient gives by a formula: a fit of no steps.
HEURISTICS = ("tangent", "geodesic")


def _odd(k: int) -> int:
    if k < 3 or k % 2 == 0:
        raise ValueError("odd numbers of at least 3")
    return k


Odd = Annotated[int, AfterValidator(_odd)]
Margin = Annotated[float, Field(gt=0, le=1)]


@dataclass
class DenoiseConfig(RunConfig):
    """A denoising experiment.

    Raises:
        ConfigError: A value is out of its range, a list is empty, or two settings do not fit each other.
    """

    name: str = option("denoise", "name of the experiment")
    data: Literal["image", "bsds300", "voc2012", "skimage"] = option("image", "one image, or a data set")
    image: str = option("camera", "data=image: a file, or the name of one of scikit-image's pictures")
    data_dir: str = option("data", "where BSDS300 or VOCdevkit lies")
    size: Annotated[int, Field(ge=8)] = option(256, "edge of the square grey images; others are resized and cropped")
    method: List[Literal["deform", "metric", "tangent", "geodesic"]] = option(
        ["deform", "metric"], "deform, metric: fitted; tangent, geodesic: balls of a metric from the image's gradient"
    )
    eps_omega: List[Margin] = option([0.9, 0.1], "margins ε_ω of the metric's drift, a row each")
    kernel: List[Literal["fixed", "learnable"]] = option(["fixed"], "uniform weights (FKW), or learned ones (LKW)")
    k: List[Odd] = option([5, 11, 31], "kernel sizes, odd")
    sigma: List[NonNegativeFloat] = option([0.3], "standard deviations of the noise; images are in [0, 1]")
    centre: bool = option(False, "one more sample, in the centre")
    metric: Dict[str, Any] = option({}, "tangent, geodesic: arguments of geometry.image_metric")
    geodesic_steps: PositiveInt = option(4, "geodesic: see geometry.geodesic_positions")
    lr_deform: Optional[PositiveFloat] = option(None, "learning rate; by default the paper's for its k, or 1e-4")
    lr_metric: Optional[PositiveFloat] = option(None, "likewise")
    steps: PositiveInt = option(100, "data=image: steps of SGD")
    epochs: PositiveInt = option(50, "data sets: epochs of Adam")
    batch_size: PositiveInt = option(8, "data sets: images in a batch")
    workers: NonNegativeInt = option(0, "data sets: loader processes")
    seed: int = option(0, "of the noise, and of the predictor")

    def __post_init__(self) -> None:
        for key in ("k", "sigma", "method", "kernel"):
            if not getattr(self, key):
                raise ConfigError(f"{key}: the list is empty, there is nothing to do.")
        if "metric" in self.method and not self.eps_omega:
            raise ConfigError("eps_omega: the list is empty; method metric needs a margin.")
        if self.data == "image" and self.kernel != ["fixed"]:
            raise ConfigError("kernel: with data=image the geometry is what is fitted, the kernel is fixed.")
        heuristics = [method for method in self.method if method in HEURISTICS]
        if heuristics and self.data != "image":
            raise ConfigError(
                f"method: {', '.join(heuristics)} need data=image; on a data set they have nothing to train."
            )
        try:
            image_metric(torch.zeros(1, 1, 1, 1), **self.metric)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"metric: {error}") from None
        known = PAPER_LR["deform", None]
        missing = [k for k in self.k if k not in known]
        for method in self.method:
            if self.data == "image" and method not in HEURISTICS and missing and learning_rate(self, method) is None:
                rates = f"the paper gives learning rates for k = {', '.join(map(str, known))}"
                raise ConfigError(f"lr_{method}: {rates}; for k = {', '.join(map(str, missing))} set it.")


class Cell(NamedTuple):
    """A row of the table."""

    method: str
    eps_omega: Optional[float]
    kernel: str
    k: int
    sigma: float

    @property
    def variant(self) -> Variant:
        """What the paper's tables are indexed by."""
        return self.method, self.eps_omega

    @property
    def title(self) -> str:
        """Method and ε_ω."""
        return self.method if self.eps_omega is None else f"{self.method} ε_ω = {self.eps_omega:g}"

    @property
    def label(self) -> str:
        """Name of its file."""
        epsilon = "" if self.eps_omega is None else f"-e{self.eps_omega:g}"
        return f"{self.method}{epsilon}-{self.kernel}-k{self.k}-s{self.sigma:g}"


def make_cells(config: DenoiseConfig) -> List[Cell]:
    """The rows of an experiment."""
    variants: List[Variant] = [("deform", None)] if "deform" in config.method else []
    variants += [("metric", epsilon) for epsilon in config.eps_omega] if "metric" in config.method else []
    variants += [(method, None) for method in HEURISTICS if method in config.method]
    kernels = config.kernel
    return [Cell(*v, kernel, k, s) for s in config.sigma for kernel in kernels for k in config.k for v in variants]


def learning_rate(config: DenoiseConfig, method: str) -> Optional[float]:
    """The configured learning rate of a method."""
    return config.lr_deform if method == "deform" else config.lr_metric
