"""Denoising with one adaptive layer: the paper's generalisation gap on a single image, and filters for a data set."""

import functools
import io
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Literal, NamedTuple, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..layers.filters import DeformFilter2d, MetricFilter2d
from ..viz import load_image, strong_edges
from .config import ConfigError, RecipeError, option, plain
from .report import console, print_table, save_figure, write_atomic, write_summary

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
EVALUATIONS = 20
# How many of a picture's pixels, in a square, get their balls drawn, and how far apart they are.
BALLS, SPACING = 3, 7

# What scikit-image's wheel carries, so that nothing is downloaded.
PICTURES = {
    "train": ("astronaut", "brick", "cell", "chelsea", "clock", "coffee", "coins", "gravel", "moon", "page", "rocket"),
    "test": ("camera", "grass", "hubble_deep_field", "text"),
}


@dataclass
class DenoiseConfig:
    """A denoising experiment."""

    name: str = option("denoise", "name of the experiment")
    output: Optional[str] = option(None, "folder; by default runs/<name>")
    data: Literal["image", "bsds300", "voc2012", "skimage"] = option("image", "one image, or a data set")
    image: str = option("camera", "data=image: a file, or the name of one of scikit-image's pictures")
    data_dir: str = option("data", "where BSDS300 or VOCdevkit lies")
    size: int = option(256, "edge of the square grey images; others are resized and cropped at their centre")
    method: List[Literal["deform", "metric"]] = option(["deform", "metric"], "which convolutions")
    eps_omega: List[float] = option([0.9, 0.1], "margins ε_ω of the metric's drift, a row each")
    kernel: List[Literal["fixed", "learnable"]] = option(["fixed"], "uniform weights (FKW), or learned ones (LKW)")
    k: List[int] = option([5, 11, 31], "kernel sizes, odd")
    sigma: List[float] = option([0.3], "standard deviations of the noise; images are in [0, 1]")
    centre: bool = option(False, "one more sample, in the centre")
    lr_deform: Optional[float] = option(None, "learning rate; by default the paper's for its k; data sets: 1e-4")
    lr_metric: Optional[float] = option(None, "likewise")
    steps: int = option(100, "data=image: steps of SGD")
    epochs: int = option(50, "data sets: epochs of Adam")
    batch_size: int = option(8, "data sets: images in a batch")
    workers: int = option(0, "data sets: loader processes")
    seed: int = option(0, "of the noise, and of the predictor")

    @property
    def folder(self) -> Path:
        """Where the experiment writes."""
        return Path(self.output or f"runs/{self.name}")


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


def _cells(config: DenoiseConfig) -> List[Cell]:
    variants: List[Variant] = [("deform", None)] if "deform" in config.method else []
    variants += [("metric", epsilon) for epsilon in config.eps_omega] if "metric" in config.method else []
    kernels = config.kernel
    return [Cell(*v, kernel, k, s) for s in config.sigma for kernel in kernels for k in config.k for v in variants]


def _lr(config: DenoiseConfig, method: str) -> Optional[float]:
    return config.lr_deform if method == "deform" else config.lr_metric


def _check(config: DenoiseConfig) -> None:
    """Refuses what cannot be run before anything runs."""
    for key, good, expected in (
        ("k", all(k >= 3 and k % 2 == 1 for k in config.k), "odd numbers of at least 3"),
        ("sigma", all(s >= 0 for s in config.sigma), "numbers of at least 0"),
        ("eps_omega", all(0 < e <= 1 for e in config.eps_omega), "numbers in (0, 1]"),
        ("size", config.size >= 8, "at least 8 pixels"),
        ("steps", config.steps >= 1, "at least 1"),
        ("epochs", config.epochs >= 1, "at least 1"),
        ("batch_size", config.batch_size >= 1, "at least 1"),
        ("workers", config.workers >= 0, "at least 0"),
        ("lr_deform", config.lr_deform is None or config.lr_deform > 0, "a number above 0"),
        ("lr_metric", config.lr_metric is None or config.lr_metric > 0, "a number above 0"),
    ):
        if not good:
            raise ConfigError(f"{key}: expected {expected}, got {getattr(config, key)}.")
    for key in ("k", "sigma", "method", "kernel"):
        if not getattr(config, key):
            raise ConfigError(f"{key}: the list is empty, there is nothing to do.")
    if config.data == "image" and config.kernel != ["fixed"]:
        raise ConfigError("kernel: with data=image the geometry is what is fitted, the kernel is fixed.")
    known = PAPER_LR["deform", None]
    missing = [k for k in config.k if k not in known]
    for method in config.method:
        if config.data == "image" and missing and _lr(config, method) is None:
            rates = f"the paper gives learning rates for k = {', '.join(map(str, known))}"
            raise ConfigError(f"lr_{method}: {rates}; for k = {', '.join(map(str, missing))} set it.")


# ---------------------------------------------------------------- images


def to_grey(picture: np.ndarray, size: int) -> Tensor:
    """`[H, W]` or `[H, W, 3]` uint8 → `[1, size, size]` in [0, 1]: luma, shorter side resized, centre cropped."""
    image = Image.fromarray(picture).convert("L")
    factor = size / min(image.size)
    image = image.resize([max(size, round(side * factor)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


def add_noise(image: Tensor, sigma: float, seed: int, name: str) -> Tensor:
    """White Gaussian noise that depends on the seed and on the image's name only, on any machine."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return image + sigma * torch.randn(image.shape, generator=generator)


class NoisyImages(Dataset):
    """(noisy, clean) pairs `[1, size, size]`: each image has its own noise, the same in every epoch."""

    def __init__(self, paths: List[str], size: int, sigma: float, seed: int):
        self.paths, self.size, self.sigma, self.seed = paths, size, sigma, seed

    def __len__(self) -> int:
        return len(self.paths)

    @functools.cache  # noqa: B019 (the data sets live as long as the program)
    def _clean(self, index: int) -> Tensor:
        return to_grey(load_image(self.paths[index]), self.size)

    def __getitem__(self, index: int) -> Tuple[Tensor, Tensor]:
        clean = self._clean(index)
        return add_noise(clean, self.sigma, self.seed, Path(self.paths[index]).name), clean


def _found(config: DenoiseConfig, inner: str) -> Path:
    """The data set's folder, `data_dir` itself or inside it."""
    parts = Path(inner).parts
    for start in range(len(parts) + 1):
        folder = Path(config.data_dir, *parts[start:])
        if (folder / ("images" if config.data == "bsds300" else "JPEGImages")).is_dir():
            return folder
    source = {
        "bsds300": (
            "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/BSDS300-images.tgz",
            "BSDS300/images/train/*.jpg and BSDS300/images/test/*.jpg",
        ),
        "voc2012": (
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            "VOCdevkit/VOC2012/JPEGImages/*.jpg and VOCdevkit/VOC2012/ImageSets/Main/{train,val}.txt",
        ),
    }[config.data]
    raise ConfigError(
        f"data: there is no {inner} in data_dir={config.data_dir!r}. Download {source[0]} and unpack it there, so that "
        f"there are {source[1]}; or take --data skimage, which needs no download."
    )


def image_paths(config: DenoiseConfig, train: bool) -> List[str]:
    """Files (or names of scikit-image's pictures) of a data set's training or test part.

    VOC's lists are those of `ImageSets/Main`: denoising needs no labels, and they name all the images.

    Raises:
        ConfigError: The data is not there; the message says where to get it and where to put it.
    """
    if config.data == "skimage":
        return list(PICTURES["train" if train else "test"])
    if config.data == "bsds300":
        folder = _found(config, "BSDS300") / "images" / ("train" if train else "test")
        paths = sorted(folder.glob("*.jpg"))
    else:
        folder = _found(config, "VOCdevkit/VOC2012")
        names = folder / "ImageSets" / "Main" / ("train.txt" if train else "val.txt")
        if not names.is_file():
            raise ConfigError(f"data: {names} is missing; it is part of VOCtrainval_11-May-2012.tar.")
        paths = [folder / "JPEGImages" / f"{name}.jpg" for name in names.read_text().split()]
        absent = [path for path in paths if not path.is_file()]
        if absent:
            raise ConfigError(f"data: {names} names {len(absent)} images that are missing, {absent[0]} for one.")
    if not paths:
        raise ConfigError(f"data: there are no images in {folder}.")
    return list(map(str, paths))


# ---------------------------------------------------------------- fitting


def _device() -> torch.device:
    # current_accelerator() also names one that the build knows and the machine lacks
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device or torch.device("cpu")


def _filter(cell: Cell, config: DenoiseConfig) -> nn.Module:
    torch.manual_seed(config.seed)
    free = {"size": (config.size, config.size)} if config.data == "image" else {}
    common = {**free, "centre": config.centre, "fixed_kernel": cell.kernel == "fixed"}
    if cell.method == "deform":
        return DeformFilter2d(1, cell.k, **common)
    return MetricFilter2d(1, cell.k, eps_omega=cell.eps_omega, **common)


def _psnr(mse: float) -> float:
    return 10 * math.log10(1 / max(mse, 1e-12))


def _finite(loss: float, cell: Cell, when: str) -> float:
    if not math.isfinite(loss):
        raise RecipeError(f"{cell.label}: the loss is {loss} in {when}; a lower --lr_{cell.method} may help.")
    return loss


@torch.no_grad()
def _descend(parameter: Tensor, lr: float) -> None:
    parameter.sub_(parameter.grad, alpha=lr)  # type: ignore[arg-type]
    parameter.grad = None


@torch.no_grad()
def _sample_balls(model: nn.Module, x: Tensor, point: Tuple[int, int]) -> Dict[str, Tensor]:
    """What a picture draws: pixels about `point` (x, y), their outermost samples, all samples of the middle one."""
    steps = (torch.arange(BALLS) - BALLS // 2) * SPACING
    rows, columns = (index.flatten() for index in torch.meshgrid(point[1] + steps, point[0] + steps, indexing="ij"))
    rows, columns = rows.clamp(0, x.shape[2] - 1).to(x.device), columns.clamp(0, x.shape[3] - 1).to(x.device)
    samples = model.positions_at(x, rows, columns)[0]
    k = model.kernel_size[0]
    if model.pattern == "polar":
        ring = torch.arange(k * k - k, k * k)
    else:
        square = torch.arange(k * k).view(k, k)
        ring = torch.cat((square[0], square[1:, -1], square[-1, :-1].flip(0), square[1:-1, 0].flip(0)))
    centres = torch.stack((columns, rows), -1)
    rings = samples[ring.to(x.device)].permute(2, 0, 1)
    balls = {"centres": centres, "rings": rings, "samples": samples[..., BALLS**2 // 2]}
    return {name: value.float().cpu() for name, value in balls.items()}


def fit_image(config: DenoiseConfig, cell: Cell, clean: Tensor, advance: Callable[[], None]) -> Dict[str, Any]:
    """Fits the geometry of every pixel to one noisy copy of an image, and tests it on another.

    The loss is the mean squared error to the clean image. A pixel's share of it, and so its gradient, is one over the
    number of pixels: the learning rates, the paper's for 256×256, are scaled by the number of pixels.

    Args:
        config: The experiment.
        cell: Its row.
        clean: `[1, 1, size, size]`.
        advance: Called after each step.

    Returns:
        `record`, `curve` (rows of step, train MSE, test MSE), `result` (of the test copy) and what a picture draws.
    """
    device = _device()
    noisy = {part: add_noise(clean, cell.sigma, config.seed, part).to(device) for part in ("train", "test")}
    target, model = clean.to(device), _filter(cell, config).to(device)
    if cell.method == "metric":
        model.init_from_image(noisy["train"])
    nearest = min((v for v in PAPER_LR if v[0] == cell.method), key=lambda v: abs((v[1] or 0) - (cell.eps_omega or 0)))
    lr = (_lr(config, cell.method) or PAPER_LR[nearest][cell.k]) * clean.numel() / PAPER_PIXELS
    # A step for each parameter as soon as its gradient is there: the gradients of 2k² offsets are never all in memory.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(functools.partial(_descend, lr=lr))
    every, curve = max(1, config.steps // EVALUATIONS), []
    for step in range(config.steps + 1):
        last = step == config.steps
        with torch.set_grad_enabled(not last):
            loss = F.mse_loss(model(noisy["train"]), target)
        train_mse = _finite(loss.item(), cell, f"step {step}")
        if last or step % every == 0:
            with torch.no_grad():
                result = model(noisy["test"])
            curve.append([step, train_mse, F.mse_loss(result, target).item()])
        if not last:
            loss.backward()
            advance()
    _, train_mse, test_mse = curve[-1]
    paper = PAPER_GAP.get(cell.variant, {}).get(cell.k) if cell.sigma == 0.3 else None
    record = {
        "method": cell.method,
        "eps_omega": cell.eps_omega,
        "k": cell.k,
        "sigma": cell.sigma,
        "train_mse": train_mse,
        "test_mse": test_mse,
        "psnr": _psnr(test_mse),
        "gap": (test_mse - train_mse) / train_mse,
        "paper_gap": paper,
    }
    balls = _sample_balls(model, noisy["test"], _edge(clean))
    return {"record": record, "curve": curve, "result": result[0, 0].cpu(), "noisy": noisy["test"][0, 0].cpu(), **balls}


@torch.no_grad()
def _evaluate(model: nn.Module, loader: DataLoader, device: torch.device) -> Tuple[float, float]:
    """Mean over the images of (MSE, PSNR)."""
    model.eval()
    errors = [(model(x.to(device)) - y.to(device)).square().mean((1, 2, 3)).cpu() for x, y in loader]
    values = torch.cat(errors).double().tolist()
    return sum(values) / len(values), sum(map(_psnr, values)) / len(values)


def _save(path: Path, content: Dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, buffer.getvalue())


def fit_data_set(config: DenoiseConfig, cell: Cell, paths: Dict[str, List[str]], advance: Callable[[], None]) -> Dict:
    """Trains a filter whose geometry a convolution predicts from the noisy image: Adam on the mean squared error.

    After each epoch a checkpoint is written, from which a stopped run goes on.

    Args:
        config: The experiment.
        cell: Its row.
        paths: Training and test images.
        advance: Called after each epoch.

    Returns:
        As `fit_image`, the curve over epochs, with the filter's `state`.
    """
    device, path = _device(), config.folder / "cells" / f"{cell.label}.checkpoint"
    sets = {part: NoisyImages(paths[part], config.size, cell.sigma, config.seed) for part in ("train", "test")}
    order = torch.Generator()
    loaders = {
        part: DataLoader(
            sets[part], config.batch_size, shuffle=part == "train", num_workers=config.workers, generator=order
        )
        for part in sets
    }
    model = _filter(cell, config).to(device)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser, curve = torch.optim.Adam(learned, lr=_lr(config, cell.method) or 1e-4), []
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        curve = saved["curve"]
    for _ in curve:
        advance()
    for epoch in range(len(curve), config.epochs):
        # the order of an epoch follows from (seed, epoch), so a resumed run sees what an uninterrupted one sees
        order.manual_seed(config.seed + 100_003 * epoch)
        model.train()
        losses = []
        for x, y in loaders["train"]:
            loss = F.mse_loss(model(x.to(device)), y.to(device))
            losses.append(_finite(loss.item(), cell, f"epoch {epoch + 1}"))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        curve.append([epoch + 1, sum(losses) / len(losses), _evaluate(model, loaders["test"], device)[0]])
        _save(path, {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "curve": curve})
        advance()
    (train_mse, _), (test_mse, psnr) = (_evaluate(model, loaders[part], device) for part in ("train", "test"))
    record = {
        "method": cell.method,
        "eps_omega": cell.eps_omega,
        "kernel": cell.kernel,
        "k": cell.k,
        "sigma": cell.sigma,
        "train_mse": train_mse,
        "test_mse": test_mse,
        "psnr": psnr,
        "gap": (test_mse - train_mse) / train_mse,
        "parameters": sum(parameter.numel() for parameter in learned),
    }
    x, clean = (tensor[None] for tensor in sets["test"][0])
    with torch.no_grad():
        result = model(x.to(device))[0, 0].cpu()
    balls = _sample_balls(model, x.to(device), _edge(clean))
    done = {"record": record, "curve": curve, "result": result, "noisy": x[0, 0], "state": model.state_dict(), **balls}
    _save(path.with_suffix(".pt"), done)
    path.unlink()
    return done


# ---------------------------------------------------------------- pictures


def _edge(clean: Tensor) -> Tuple[int, int]:
    """(x, y) of the strongest edge of `[1, 1, H, W]` that is not near the border."""
    x, y = strong_edges(clean[0, 0].numpy(), 1)[0]
    return int(x), int(y)


def plot_curves(done: Dict[Cell, Dict[str, Any]], unit: str):
    """Train (dashed) and test (solid) error: a panel for each kernel size, noise and kernel kind."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((cell.sigma, cell.kernel, cell.k) for cell in done))
    figure = Figure(figsize=(3.6 * min(4, len(panels)), 3.2 * math.ceil(len(panels) / 4)), layout="constrained")
    axes = figure.subplots(math.ceil(len(panels) / 4), min(4, len(panels)), squeeze=False, sharey=True).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    titles = list(dict.fromkeys(cell.title for cell in done))
    colours = dict(zip(titles, ("#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7") * len(titles), strict=False))
    for axis, (sigma, kernel, k) in zip(axes, panels, strict=False):
        axis.set(title=f"k = {k}, σ = {sigma:g}, {kernel} kernel", xlabel=unit, yscale="log")
        axis.grid(alpha=0.3)
        for cell, result in done.items():
            if (cell.sigma, cell.kernel, cell.k) == (sigma, kernel, k):
                steps, train, test = zip(*result["curve"], strict=True)
                axis.plot(steps, train, color=colours[cell.title], linestyle="--")
                axis.plot(steps, test, color=colours[cell.title], label=cell.title)
    axes[0].set_ylabel("MSE (dashed: train, solid: test)")
    axes[0].legend(fontsize=8)
    return figure


def _zoom(axis, image: Tensor, result: Dict[str, Any], deform: bool) -> None:
    """The image about an edge, and where pixels read it: outermost samples joined, all samples of the middle one."""
    centres, middle = result["centres"], BALLS**2 // 2
    x, y = centres[middle].tolist()
    reach = SPACING * (BALLS // 2) + 6
    axis.imshow(image, cmap="gray", vmin=0, vmax=1, alpha=0.75)
    # the rings of deformable's offsets cross each other's: one is enough to see
    for number in [middle] if deform else range(len(centres)):
        ring = (centres[number] + result["rings"][number]).numpy()
        axis.plot(*np.concatenate((ring, ring[:1])).T, color="#D55E00", linewidth=1.0)
    samples = (centres[middle] + result["samples"]).numpy()
    axis.plot(*samples.T, ".", color="#0072B2", markersize=2.5 if len(samples) < 200 else 1.0)
    axis.plot(*centres.T.numpy(), "+", color="black", markersize=4)
    axis.set(xlim=(x - reach, x + reach), ylim=(y + reach, y - reach))


def plot_results(done: Dict[Cell, Dict[str, Any]], clean: Tensor):
    """Two rows for each (σ, kernel, k): clean, noisy and the results; below each what is about an edge, with balls."""
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((cell.sigma, cell.kernel, cell.k) for cell in done))
    columns = 2 + len({cell.title for cell in done})
    figure = Figure(figsize=(2.6 * columns, 5.6 * len(groups)), layout="constrained")
    grid = figure.subplots(2 * len(groups), columns, squeeze=False)
    for axis in grid.flatten():
        axis.set(xticks=[], yticks=[])
    for number, group in enumerate(groups):
        above, below = grid[2 * number : 2 * number + 2]
        cells = [cell for cell in done if (cell.sigma, cell.kernel, cell.k) == group]
        first = done[cells[0]]
        x, y = first["centres"][BALLS**2 // 2].tolist()
        reach = SPACING * (BALLS // 2) + 6
        sigma, kernel, k = group
        above[0].set_ylabel(f"k = {k}, σ = {sigma:g}, {kernel} kernel", fontsize=9)
        for axis, low, image, title in zip(above, below, (clean, first["noisy"]), ("clean", "noisy"), strict=False):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set_title(title, fontsize=9)
            axis.add_patch(_frame(x, y, reach))
            low.imshow(image, cmap="gray", vmin=0, vmax=1)
            low.set(xlim=(x - reach, x + reach), ylim=(y + reach, y - reach))
        for axis, low, cell in zip(above[2:], below[2:], cells, strict=False):
            record = done[cell]["record"]
            axis.imshow(done[cell]["result"], cmap="gray", vmin=0, vmax=1)
            axis.set_title(f"{cell.title}\n{record['psnr']:.2f} dB, gap {record['gap']:.3g}", fontsize=9)
            _zoom(low, clean, done[cell], cell.method == "deform")
    return figure


def _frame(x: float, y: float, reach: float):
    from matplotlib.patches import Rectangle

    return Rectangle((x - reach, y - reach), 2 * reach, 2 * reach, fill=False, edgecolor="#E69F00", linewidth=1.5)


# ---------------------------------------------------------------- the experiment


def _same_experiment(config: DenoiseConfig) -> None:
    """Refuses to mix finished rows with those of another configuration; rows may be added."""
    path, resolved = config.folder / "config.yaml", plain(config)
    if path.exists():
        begun = yaml.safe_load(path.read_text())
        rows = ("name", "output", "method", "eps_omega", "kernel", "k", "sigma", "workers", "data_dir")
        changed = [key for key in resolved if key not in rows and begun.get(key) != resolved[key]]
        if changed:
            what = ", ".join(f"{key} ({begun.get(key)} → {resolved[key]})" for key in changed)
            raise ConfigError(f"output: {config.folder} holds one with another {what}. Give another --output.")
    write_atomic(path, yaml.safe_dump(resolved, sort_keys=False))


def denoise(config: DenoiseConfig) -> List[Dict[str, Any]]:
    """Fits every cell of {method, ε_ω} × {k} × {σ} × {kernel}, skipping what is complete, and reports.

    Writes `summary.json`, `summary.csv`, `summary.md`, `curves.png` and `images.png` into `config.folder`, again after
    each cell, and each cell's curve and result below it.

    Returns:
        The records of `summary.json`: method, eps_omega, k, sigma, train_mse, test_mse, psnr (dB), gap, which is
        (test − train) / train, and paper_gap; of a data set without the last, and with kernel and parameters.

    Raises:
        ConfigError: The configuration cannot be used, or the folder holds another experiment.
        RecipeError: A loss is not finite.
    """
    _check(config)
    single = config.data == "image"
    if single:
        clean = to_grey(load_image(config.image), config.size)[None]
        title = f"Denoising {config.image} at {config.size}×{config.size}: generalisation gap"
    else:
        paths = {part: image_paths(config, part == "train") for part in ("train", "test")}
        clean = to_grey(load_image(paths["test"][0]), config.size)[None]
        title = f"Denoising {config.data}: {len(paths['train'])} images to train on, {len(paths['test'])} to test"
    _same_experiment(config)
    cells, done = _cells(config), {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for number, cell in enumerate(cells, 1):
            path = config.folder / "cells" / f"{cell.label}.pt"
            if path.exists():
                done[cell] = torch.load(path, weights_only=True)
                continue
            task = progress.add_task(cell.label, total=config.steps if single else config.epochs)
            advance = functools.partial(progress.advance, task)
            if single:
                done[cell] = fit_image(config, cell, clean, advance)
                _save(path, done[cell])
            else:
                done[cell] = fit_data_set(config, cell, paths, advance)
            progress.remove_task(task)
            record = done[cell]["record"]
            found = f"{record['psnr']:.2f} dB, gap {record['gap']:.3g}"
            console.print(f"[{number:>3}/{len(cells)}] {cell.label:<30} {found}")
            write_summary(config.folder, [result["record"] for result in done.values()], title)
    records = [result["record"] for result in done.values()]
    write_summary(config.folder, records, title)
    save_figure(plot_curves(done, "step" if single else "epoch"), config.folder / "curves.png")
    save_figure(plot_results(done, clean[0, 0]), config.folder / "images.png")
    print_table(records, f"{title}: {config.folder}")
    return records
