"""Fits of one row: the geometry of every pixel of one image, or a filter that predicts it for a data set's images."""

import functools
import io
import math
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..viz import strong_edges
from .config import RecipeError
from .denoise_cells import HEURISTICS, PAPER_GAP, PAPER_LR, PAPER_PIXELS, Cell, DenoiseConfig, learning_rate
from .denoise_data import NoisyImages, add_noise
from .filters import DeformFilter2d, ImageMetricFilter2d, MetricFilter2d
from .report import write_atomic

EVALUATIONS = 20
# How many of a picture's pixels, in a square, get their balls drawn, and how far apart they are.
BALLS, SPACING = 3, 7


def _device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _filter(cell: Cell, config: DenoiseConfig) -> nn.Module:
    torch.manual_seed(config.seed)
    if cell.method in HEURISTICS:
        ball = {"ball": cell.method, "steps": config.geodesic_steps}
        return ImageMetricFilter2d(1, cell.k, centre=config.centre, **ball, **config.metric)
    free = {"size": (config.size, config.size)} if config.data == "image" else {}
    common = {**free, "centre": config.centre, "fixed_kernel": cell.kernel == "fixed"}
    if cell.method == "deform":
        return DeformFilter2d(1, cell.k, **common)
    return MetricFilter2d(1, cell.k, eps_omega=cell.eps_omega, **common)


def _psnr(mse: float) -> float:
    return 10 * math.log10(1 / max(mse, 1e-12))


def _record(cell: Cell, train_mse: float, test_mse: float, psnr: float) -> Dict[str, Any]:
    gap = (test_mse - train_mse) / max(train_mse, 1e-12)  # a filter may keep a black image
    return {**cell._asdict(), "train_mse": train_mse, "test_mse": test_mse, "psnr": psnr, "gap": gap}


def _finite(value: float, cell: Cell, what: str) -> float:
    if not math.isfinite(value):
        raise RecipeError(f"{cell.label}: {what} is {value}; a lower --lr_{cell.method} may help.")
    return value


@torch.no_grad()
def _descend(parameter: Tensor, lr: float, cell: Cell) -> None:
    parameter.sub_(parameter.grad, alpha=lr)  # type: ignore[arg-type]
    parameter.grad = None
    # the loss does not tell: a sample whose position is NaN reads zero
    _finite(parameter.sum().item(), cell, "the sum of the geometry's parameters")


@torch.no_grad()
def _sample_balls(model: nn.Module, x: Tensor, point: Tuple[int, int]) -> Dict[str, Tensor]:
    """What a picture draws: pixels about `point` (x, y), their outermost samples, all samples of the middle one."""
    steps = (torch.arange(BALLS) - BALLS // 2) * SPACING
    rows, columns = (index.flatten() for index in torch.meshgrid(point[1] + steps, point[0] + steps, indexing="ij"))
    rows, columns = rows.clamp(0, x.shape[2] - 1).to(x.device), columns.clamp(0, x.shape[3] - 1).to(x.device)
    samples = model.positions_at(x, rows, columns)[0]
    k = int(model.kernel_size)  # type: ignore[arg-type]
    if model.pattern == "polar":
        ring = torch.arange(k * k - k, k * k)
    else:
        square = torch.arange(k * k).view(k, k)
        ring = torch.cat((square[0], square[1:, -1], square[-1, :-1].flip(0), square[1:-1, 0].flip(0)))
    centres = torch.stack((columns, rows), -1)
    rings = samples[ring.to(x.device)].permute(2, 0, 1)
    balls = {"centres": centres, "rings": rings, "samples": samples[..., BALLS**2 // 2]}
    return {name: value.float().cpu() for name, value in balls.items()}


def _learn_at(model: nn.Module, config: DenoiseConfig, cell: Cell) -> None:
    """SGD: a step for each parameter as soon as its gradient is there, so that 2k² offsets' are never all in memory."""
    nearest = min((v for v in PAPER_LR if v[0] == cell.method), key=lambda v: abs((v[1] or 0) - (cell.eps_omega or 0)))
    lr = (learning_rate(config, cell.method) or PAPER_LR[nearest][cell.k]) * config.size**2 / PAPER_PIXELS
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(functools.partial(_descend, lr=lr, cell=cell))


def _edge(clean: Tensor) -> Tuple[int, int]:
    """(x, y) of the strongest edge of `[1, 1, H, W]` that is not near the border."""
    x, y = strong_edges(clean[0, 0].numpy(), 1)[0]
    return int(x), int(y)


def fit_image(config: DenoiseConfig, cell: Cell, clean: Tensor, advance: Callable[[], None]) -> Dict[str, Any]:
    """Fits the geometry of every pixel to one noisy copy of an image, and tests it on another.

    The loss is the mean squared error to the clean image. A pixel's share of it, and so its gradient, is one over the
    number of pixels: the learning rates, the paper's for 256×256, are scaled by the number of pixels. A filter whose
    metric comes from the image by a formula has nothing to fit: its curve is one row, of step 0.

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
    steps = 0 if cell.method in HEURISTICS else config.steps
    if steps:
        _learn_at(model, config, cell)
    every, curve = max(1, steps // EVALUATIONS), []
    for step in range(steps + 1):
        last = step == steps
        with torch.set_grad_enabled(not last):
            loss = F.mse_loss(model(noisy["train"]), target)
        train_mse = _finite(loss.item(), cell, f"the loss of step {step}")
        if last or step % every == 0:
            with torch.no_grad():
                result = model(noisy["test"])
            curve.append([step, train_mse, F.mse_loss(result, target).item()])
        if not last:
            loss.backward()
            advance()
    _, train_mse, test_mse = curve[-1]
    paper = PAPER_GAP.get(cell.variant, {}).get(cell.k) if cell.sigma == 0.3 else None
    record = {**_record(cell, train_mse, test_mse, _psnr(test_mse)), "paper_gap": paper}
    balls = _sample_balls(model, noisy["test"], _edge(clean))
    return {"record": record, "curve": curve, "result": result[0, 0].cpu(), "noisy": noisy["test"][0, 0].cpu(), **balls}


@torch.no_grad()
def _evaluate(model: nn.Module, loader: DataLoader, device: torch.device) -> Tuple[float, float]:
    """Mean over the images of (MSE, PSNR)."""
    model.eval()
    errors = [(model(x.to(device)) - y.to(device)).square().mean((1, 2, 3)).cpu() for x, y in loader]
    values = torch.cat(errors).double().tolist()
    return sum(values) / len(values), sum(map(_psnr, values)) / len(values)


def save(path: Path, content: Dict[str, Any]) -> None:
    """Writes what a fit returned."""
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
    optimiser, curve = torch.optim.Adam(learned, lr=learning_rate(config, cell.method) or 1e-4), []
    if path.exists():
        saved = torch.load(path, weights_only=True, map_location="cpu")
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
            losses.append(_finite(loss.item(), cell, f"the loss of epoch {epoch + 1}"))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        curve.append([epoch + 1, sum(losses) / len(losses), _evaluate(model, loaders["test"], device)[0]])
        save(path, {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "curve": curve})
        advance()
    (train_mse, _), (test_mse, psnr) = (_evaluate(model, loaders[part], device) for part in ("train", "test"))
    record = {**_record(cell, train_mse, test_mse, psnr), "parameters": sum(p.numel() for p in learned)}
    x, clean = (tensor[None] for tensor in sets["test"][0])
    with torch.no_grad():
        result = model(x.to(device))[0, 0].cpu()
    balls = _sample_balls(model, x.to(device), _edge(clean))
    done = {"record": record, "curve": curve, "result": result, "noisy": x[0, 0], "state": model.state_dict(), **balls}
    save(path.with_suffix(".pt"), done)
    path.unlink()
    return done
