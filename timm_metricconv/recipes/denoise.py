"""Denoising with one adaptive layer: the paper's generalisation gap on a single image, and filters for a data set."""

import functools
from typing import Any, Dict, List

import torch
from torch import Tensor

from .denoise_cells import Cell, DenoiseConfig, make_cells
from .denoise_data import image_paths, to_grey
from .denoise_fit import fit_data_set, fit_image, save
from .denoise_plots import plot_curves, plot_results
from .report import console, print_table, save_figure, write_summary
from .run import check_same_run, locked, progress, write_config
from .visualise import load_image

# Rows may be added to an experiment.
ROWS = ("method", "eps_omega", "kernel", "k", "sigma")


def _fit(config: DenoiseConfig, clean: Tensor, paths: Dict[str, List[str]], title: str) -> Dict[Cell, Dict[str, Any]]:
    """Every cell's result, fitted where it is not there: to the image `clean`, or to a data set's `paths`."""
    cells = make_cells(config)
    done: Dict[Cell, Dict[str, Any]] = {}
    with progress() as bar:
        for number, cell in enumerate(cells, 1):
            path = config.folder / "cells" / f"{cell.label}.pt"
            if path.exists():
                done[cell] = torch.load(path, weights_only=True, map_location="cpu")
                continue
            task = bar.add_task(cell.label, total=config.epochs if paths else config.steps)
            advance = functools.partial(bar.advance, task)
            if paths:
                done[cell] = fit_data_set(config, cell, paths, advance)
            else:
                done[cell] = fit_image(config, cell, clean, advance)
                save(path, done[cell])
            bar.remove_task(task)
            record = done[cell]["record"]
            found = f"{record['psnr']:.2f} dB, gap {record['gap']:.3g}"
            console.print(f"[{number:>3}/{len(cells)}] {cell.label:<30} {found}")
            write_summary(config.folder, [result["record"] for result in done.values()], title)
    return done


def denoise(config: DenoiseConfig) -> List[Dict[str, Any]]:
    """Fits every cell of {method, ε_ω} × {k} × {σ} × {kernel}, skipping what is complete, and reports.

    Writes `summary.json`, `summary.csv`, `summary.md`, `curves.png` (where something is fitted) and `images.png` into
    `config.folder`, and each cell's curve and result below it.

    Returns:
        The records of `summary.json`: method, eps_omega, kernel, k, sigma, train_mse, test_mse, psnr (dB), gap, which
        is (test − train) / train, and paper_gap; of a data set parameters instead of the last.

    Raises:
        ConfigError: The data cannot be had, or the folder holds another experiment.
        RecipeError: A loss is not finite.
    """
    if config.data == "image":
        paths: Dict[str, List[str]] = {}
        clean = to_grey(load_image(config.image), config.size)[None]
        title = f"Denoising {config.image} at {config.size}×{config.size}: generalisation gap"
    else:
        paths = {part: image_paths(config.data, config.data_dir, part == "train") for part in ("train", "test")}
        clean = to_grey(load_image(paths["test"][0]), config.size)[None]
        title = f"Denoising {config.data}: {len(paths['train'])} images to train on, {len(paths['test'])} to test"
    with locked(config.folder):
        check_same_run(config, free=ROWS)
        write_config(config)
        done = _fit(config, clean, paths, title)
        records = [result["record"] for result in done.values()]
        write_summary(config.folder, records, title)
        if any(len(result["curve"]) > 1 for result in done.values()):
            save_figure(plot_curves(done, "epoch" if paths else "step"), config.folder / "curves.png")
        save_figure(plot_results(done, clean[0, 0]), config.folder / "images.png")
    print_table(records, f"{title}: {config.folder}")
    return records
