"""Pictures of one image and of a network's layers: unit balls, samples, maps, Grad-CAM."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Dict, List, Optional

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torchvision.transforms import v2

from ..layers import BallConv2d
from ..viz import (
    capture,
    image_field,
    layer_field,
    need,
    plot_field,
    plot_geodesics,
    plot_grad_cam,
    plot_maps,
    plot_samples,
    strong_edges,
)
from .config import ConfigError, option
from .data import DataConfig, normalisation, read_image
from .network import create_model, randomise_predictors
from .report import write_atomic
from .settings import RunConfig

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from PIL.Image import Image

# A picture that is longer for its width would be enlarged to many thousands of pixels, and hardly be seen.
LONGEST = 8
Point = Annotated[List[float], Field(min_length=2, max_length=2)]


@dataclass
class VisualiseConfig(RunConfig):
    """Pictures of one image and, where a model is named, of its layers."""

    name: str = option("visualise", "name of the run")
    image: str = option("coffee", "a file, or pictures of scikit-image side by side: coffee, brick+grass, ...")
    size: NonNegativeInt = option(384, "shorter side of the image in pixels; 0 keeps its own")
    metric: Dict[str, Any] = option({}, "the metric built from the image: arguments of geometry.image_metric")
    smoothing: NonNegativeFloat = option(2.0, "Gaussian before the image's gradient, standard deviation in pixels")
    spacing: PositiveFloat = option(24.0, "distance between two balls in pixels of the image")
    points: List[Point] = option([], "[x, y] of the pixels in close-up; by default three strong edges")
    model: Optional[str] = option(None, "any timm model name, hf-hub: or local-dir:")
    model_args: Dict[str, Any] = option({}, "arguments of the model")
    pretrained: Optional[bool] = option(None, "load the model's weights; by default those of hf-hub: and local-dir:")
    random: float = option(0.0, "size of random raw channels that untrained predictors give; 0 keeps the predictors")
    layers: List[str] = option([], "names of its layers; by default the first that is metric, deformable, ...")
    cam: Dict[str, str] = option({}, "label: model name; networks whose Grad-CAM stand side by side")
    dpi: PositiveFloat = option(110.0, "resolution of the pictures")
    cam_class: Optional[int] = option(None, "class that Grad-CAM explains; by default each network's first choice")


def load_image(name: str, size: int = 0) -> "np.ndarray":
    """A picture as `[H, W, 3]` uint8.

    Args:
        name: A file, or names of scikit-image's pictures, joined by "+" to stand side by side.
        size: Its shorter side; 0 keeps its own.

    Raises:
        ConfigError: There is neither such a file nor such a picture, or the file is no image.
    """
    numpy, pillow = need("numpy", "numpy"), need("PIL.Image", "pillow")
    if Path(name).is_file():
        try:
            picture = read_image(name)
        except Exception as error:  # each of Pillow's decoders has exceptions of its own
            raise ConfigError(f"image: {name!r} is no image that Pillow can read ({error}).") from None
    else:
        library, parts = need("skimage.data", "scikit-image"), []
        for part in name.split("+"):
            try:
                parts.append(numpy.asarray(pillow.fromarray(getattr(library, part)()).convert("RGB")))
            except Exception as error:  # no such name, not a picture, or one that has to be downloaded first
                raise ConfigError(f"image: {part!r} is no file and no picture of scikit-image ({error}).") from None
        if len({part.shape[0] for part in parts}) > 1:
            raise ConfigError(f"image: {name!r}: pictures side by side need the same height.")
        picture = pillow.fromarray(numpy.concatenate(parts, 1))
    width, height = picture.size
    if max(width, height) > LONGEST * min(width, height):
        what = f"expected a longer side of at most {LONGEST} times the shorter"
        raise ConfigError(f"image: {name!r} is {width}×{height} pixels; {what}: crop it.")
    if size:
        factor = size / min(picture.size)
        picture = picture.resize([round(side * factor) for side in picture.size], pillow.Resampling.LANCZOS)
    return numpy.asarray(picture)


def _network(name: str, config: VisualiseConfig, arguments: Dict[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # an untrained network is the same every time
        return create_model(name, arguments, pretrained=config.pretrained).eval()


def as_input(model: nn.Module, image: "np.ndarray") -> Tensor:
    """The picture as a timm model takes it, `[1, C, H, W]`; for one of fixed input size it is squashed to that."""
    mean, std = normalisation(DataConfig(), model.pretrained_cfg)
    picture = need("PIL.Image", "pillow").fromarray(image).convert("RGB" if len(mean) == 3 else "L")
    if model.pretrained_cfg.get("fixed_input_size"):
        picture = picture.resize(model.pretrained_cfg["input_size"][:0:-1])
    pixels = v2.functional.to_dtype(v2.functional.pil_to_tensor(picture), torch.float32, scale=True)
    return v2.functional.normalize(pixels, mean, std)[None]


def to_picture(figure: "Figure", dpi: float) -> "Image":
    """A figure as it looks, without the margin around it."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, bbox_inches="tight")
    return need("PIL.Image", "pillow").open(drawn).convert("RGB")


def _save(figure: "Figure", path: Path, dpi: float) -> None:
    """As PNG with a palette: a third of the size, and no difference to the eye."""
    packed, pillow = io.BytesIO(), need("PIL.Image", "pillow")
    # rare colours (the ends of a colour scale) keep a place in the palette, which k-means then fits to the rest
    picture = to_picture(figure, dpi).quantize(256, pillow.Quantize.MAXCOVERAGE, kmeans=3, dither=pillow.Dither.NONE)
    picture.save(packed, format="png", optimize=True)
    write_atomic(path, packed.getvalue())


def visualise(config: VisualiseConfig) -> List[Path]:
    """Makes the pictures that a configuration asks for.

    `unit_balls.png` (balls of a metric built from the image gradient), `geodesic_balls.png` (tangent and geodesic balls
    of that metric, in close-up), and for each layer of the model `<layer>-samples.png`, `<layer>-balls.png` and
    `<layer>-maps.png`; `grad_cam.png` where networks are named for it.

    Returns:
        The files written.

    Raises:
        ConfigError: The image, the model or a layer cannot be had; the message says what to do.
    """
    need("matplotlib", "matplotlib")
    image, figures = load_image(config.image, config.size), dict[str, Any]()
    height, width = image.shape[:2]
    for x, y in config.points:
        if not (0 <= x < width and 0 <= y < height):
            where = f"{config.image}, {width}×{height} pixels"
            raise ConfigError(f"points: {[x, y]} lies outside of {where}; --points [] takes edges.")

    try:
        field = image_field(image, config.smoothing, **config.metric)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"metric: {error}") from None
    title = "balls of a metric built from the image gradient (no training)"
    figures["unit_balls"] = plot_field(field, image, config.spacing, title)
    points = config.points or strong_edges(image)
    figures["geodesic_balls"] = plot_geodesics(field, image, points, title="metric built from the image gradient")

    if config.model:
        model = _network(config.model, config, config.model_args)
        if config.random:
            randomise_predictors(model, config.random)
        names = [name for name, module in model.named_modules() if isinstance(module, BallConv2d)]
        for name in config.layers or names[:1] or [""]:
            try:
                view = capture(model, name, as_input(model, image))
            except (AssertionError, RuntimeError, ValueError) as error:  # a network's own, of an image's size
                raise ConfigError(f"layers: {config.model}: {error}") from error
            field, kind = layer_field(view), type(view.layer).__name__
            lattice = view.layer.points.flatten(0, 1)[None, :, :, None, None]
            if (view.positions() - lattice).abs().max() < 1e-3:
                print(f"{name} samples the plain pattern everywhere: it is untrained, so its balls are disks.")
            figures[f"{name}-samples"] = plot_samples({"": view}, image, points, f"{name}: {kind}")
            whose = "its metric" if field.residual is None else "the metric that fits its samples best"
            title = f"{name}, {kind}: {whose}"
            figures[f"{name}-balls"] = plot_field(field, image, config.spacing, title)
            figures[f"{name}-maps"] = plot_maps(field, image, title=f"{name}, {kind}")

    if config.cam:
        models = {label: _network(name, config, {}) for label, name in config.cam.items()}
        inputs = {label: as_input(model, image) for label, model in models.items()}
        for label, model in models.items():
            if config.cam_class is not None and not 0 <= config.cam_class < model.num_classes:
                raise ConfigError(
                    f"cam_class: {label} has the classes 0 to {model.num_classes - 1}; got {config.cam_class}."
                )
        try:
            figures["grad_cam"] = plot_grad_cam(models, inputs, image, config.cam_class)
        except (AssertionError, AttributeError, RuntimeError, ValueError) as error:  # a network's own are among them
            raise ConfigError(f"cam: {error}") from error

    written = [config.folder / f"{name}.png" for name in figures]
    for path, figure in zip(written, figures.values(), strict=True):
        _save(figure, path, config.dpi)
        print(path)
    return written
