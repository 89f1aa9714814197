"""A page where one clicks a pixel and sees what each convolution samples there: python demo/app.py.

`--model local-dir:runs/mine/model` (once or several times) shows trained networks in the place of the example's.
"""

import functools
import os
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Sequence, Tuple

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read by gradio's import: nothing here calls home

import gradio as gr
import numpy as np
import timm
import torch
from PIL.Image import Image
from torch import nn

from timm_metricconv import viz
from timm_metricconv.layers import BallConv2d
from timm_metricconv.recipes.config import ConfigError, RecipeError, main, option
from timm_metricconv.recipes.network import create_model
from timm_metricconv.recipes.visualise import as_input, load_image, to_picture

Networks = Dict[str, nn.Module]

FAMILIES = {"shifted": "shifted", "deformable": "deform", "metric": "metric"}
PICTURES = ["coffee", "camera", "chelsea", "coins", "brick", "astronaut", "rocket", "page"]  # in scikit-image's wheel
SIDE = 320  # shorter side of the image as it is shown, in pixels
DPI = 100

INTRODUCTION = """
# Where does a convolution look?

A standard 3×3 convolution reads nine fixed neighbours of each pixel. The convolutions here choose for each pixel where
they read. A **shifted** one moves all nine together, and a **deformable** one moves each on its own. A **metric** one
spreads them over the unit ball of a metric: an ellipse that can stretch in one direction and lean to one side
([Dagès, Lindenbaum, Bruckstein, ICCV 2025](https://arxiv.org/abs/2406.05400)).
"""
UNTRAINED = """
**These networks are untrained.** They are tiny ResNets (`test_resnet_*`) with random weights, the same in each but for
the predictors, which say where to read. So the samples show what each convolution *can* do, and Grad-CAM shows nothing
that was learned. To see a network that you have trained, start the page with `--model local-dir:runs/mine/model`.
"""
SAMPLES = """
## 1. Where does a layer read for this pixel?

**Click into the coloured image.** The blue dots are the places that the layer reads, and the orange area is their hull.
The red line is the metric ball nearest to them; the dashed one is that ball enlarged to the kernel's corners. Above a
close-up stands how long the ball is for its width (anisotropy), how far it leans (asymmetry), and how badly any such
ball describes the samples (residual: 0 is exact). The pixels of a deep layer are coarse: its samples lie far apart.
"""
BALLS = """
## 2. A metric without a network

The same kind of balls, made from the image's gradient alone. Where the image is flat a ball is a disk. At an edge,
*anisotropy* stretches it along the edge, and *drift* moves it off its pixel (black dot) towards the darker side; a
negative drift moves it towards the brighter side.
"""
GRAD_CAM = """
## 3. Which parts of the image speak for the class?

Grad-CAM: bright regions raise the score of the class that each network ranks first.
"""


def example_networks() -> Networks:
    """A tiny network of each family: random weights from one seed, so that the predictors alone differ."""
    networks = {}
    with torch.random.fork_rng(devices=[]):
        for label, family in FAMILIES.items():
            torch.manual_seed(0)
            networks[label] = timm.create_model(f"test_resnet_{family}", num_classes=10, zero_init_last=False).eval()
            for module in networks[label].modules():
                if isinstance(module, BallConv2d):
                    nn.init.normal_(module.predictor.weight, std=0.15)
    return networks


def load_networks(names: List[str]) -> Networks:
    """Networks by their timm names (`hf-hub:` and `local-dir:` too), with weights. A run is called as its folder is."""
    labels = [name.removeprefix("local-dir:").removesuffix("/model").rpartition("/")[2] for name in names]
    labels = names if len(set(labels)) < len(names) else labels
    return {label: create_model(name, {}, pretrained=True).eval() for label, name in zip(labels, names, strict=True)}


def layers_of(networks: Networks) -> List[str]:
    """Names of the adaptive layers that all networks have.

    Raises:
        ConfigError: There are none.
    """
    found = [[n for n, module in m.named_modules() if isinstance(module, BallConv2d)] for m in networks.values()]
    shared = [name for name in found[0] if all(name in names for names in found)]
    if not shared:
        raise ConfigError(f"model: {', '.join(networks)} share no metric, deformable or shifted layer to look at.")
    return shared


def draw_samples(networks: Networks, image: np.ndarray, layer: str, point: Sequence[float]) -> Image:
    """Where each network's layer reads for the output pixel nearest to `point`, (x, y) in the image."""
    views = {label: viz.capture(model, layer, as_input(model, image)) for label, model in networks.items()}
    return to_picture(viz.plot_samples(views, image, [point], f"what {layer} reads for one pixel"), DPI)


def draw_balls(image: np.ndarray, anisotropy: float, drift: float) -> Image:
    """Balls of the metric that the image's gradient gives."""
    field = viz.image_field(image, smoothing=3.0, scale=0.03, anisotropy=anisotropy, tau=drift)
    return to_picture(viz.plot_field(field, image, spacing=19), DPI)


def draw_grad_cam(networks: Networks, image: np.ndarray) -> Image:
    """Grad-CAM of each network."""
    inputs = {label: as_input(model, image) for label, model in networks.items()}
    return to_picture(viz.plot_grad_cam(networks, inputs, image), DPI)


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose refusals the page shows."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        try:
            return function(*args)
        except (RecipeError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from None

    return run


def build(networks: Networks, note: str = "") -> gr.Blocks:
    """The page, with `note` under its introduction."""
    layers = layers_of(networks)

    def read(file: str) -> Tuple[np.ndarray, Sequence[float]]:
        """The image, and a pixel of its strongest edge to look at first."""
        image = load_image(file, SIDE)
        return image, viz.strong_edges(image, 1)[0]

    def clicked(event: gr.SelectData) -> Sequence[float]:
        return event.index

    # png: the image that the page sends back is the one that it got, without loss
    plain: Dict[str, Any] = {"show_label": False, "interactive": False, "format": "png", "buttons": []}
    with gr.Blocks(title="Where does a convolution look?", analytics_enabled=False, fill_width=True) as page:
        point = gr.State()
        gr.Markdown(INTRODUCTION)
        gr.Markdown(note, container=True, visible=bool(note))
        gr.Markdown(SAMPLES)
        with gr.Row():
            example = gr.Radio(PICTURES, value=PICTURES[0], label="Image", scale=4, elem_id="example")
            upload = gr.UploadButton("Upload your own image", file_types=["image"], scale=1, elem_id="upload")
            layer = gr.Dropdown(layers, label="Layer, from shallow to deep", scale=2, elem_id="layer")
        with gr.Row():
            image = gr.Image(scale=2, elem_id="image", **plain)
            samples = gr.Image(scale=7, elem_id="samples", **plain)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                gr.Markdown(BALLS)
                anisotropy = gr.Slider(0, 30, 10, step=1, label="Anisotropy", elem_id="anisotropy")
                drift = gr.Slider(-0.95, 0.95, 0.8, step=0.05, label="Drift τ", elem_id="drift")
            balls = gr.Image(scale=5, elem_id="balls", **plain)
        gr.Markdown(GRAD_CAM)
        cams = gr.Image(elem_id="cams", **plain)

        # hooks are set on the networks while they run: one event at a time, and of many clicks the last
        one = {"concurrency_id": "networks", "concurrency_limit": 1, "trigger_mode": "always_last"}
        gr.on([page.load, example.input], told(read), example, [image, point], **one)
        upload.upload(told(read), upload, [image, point], **one)
        image.select(clicked, None, point, **one)
        look = told(functools.partial(draw_samples, networks))
        gr.on([point.change, layer.input], look, [image, layer, point], samples, **one)
        gr.on([image.change, anisotropy.change, drift.change], draw_balls, [image, anisotropy, drift], balls, **one)
        image.change(functools.partial(draw_grad_cam, networks), image, cams, **one)
    return page


@dataclass
class DemoConfig:
    """What the page shows."""

    model: List[str] = option([], "timm model names, local-dir: or hf-hub:; by default untrained examples")


def serve(config: DemoConfig) -> None:
    """Builds the page and serves it until interrupted."""
    networks = load_networks(config.model) if config.model else example_networks()
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no font from elsewhere
    build(networks, "" if config.model else UNTRAINED).launch(theme=theme)


if __name__ == "__main__":
    main(serve, DemoConfig, __doc__)
