"""Top-1 and top-5 of any model on any data set."""

from typing import Any, Dict, List, Literal, Optional, Sequence

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from .config import ConfigError, option
from .data import class_count, class_names, evaluation_crop, image_size, make_loader, make_validation_set
from .network import check_images, create_model, parameter_counts
from .report import console, print_table, update_csv, write_summary
from .settings import DataConfig
from .tasks import CLASSIFICATION
from .train import evaluate, make_accelerator

# So many classes are printed, those that the network knows worst.
WORST = 10


@dataclass
class ValidateConfig(DataConfig):
    """A validation."""

    model: str = option("resnet18", "any timm model name, hf-hub: or local-dir:")
    model_args: Dict[str, Any] = option({}, "arguments of the model")
    pretrained: bool = option(True, "load the model's weights")
    amp: Literal["no", "bf16", "fp16"] = option("no", "mixed precision")
    csv: Optional[str] = option(None, "results-<data>.csv with timm's columns, in which this model gets its row")
    csv_name: Optional[str] = option(None, "what the CSV file calls the model; by default `model`")
    output: Optional[str] = option(None, "folder for summary.json, .csv and .md; by default nothing is written")


def timm_row(config: ValidateConfig, record: Dict[str, Any], pretrained_cfg: dict) -> Dict[str, Any]:
    """A row of timm's `results-imagenet.csv`: percent, and millions of parameters."""
    crop, interpolation = evaluation_crop(config, pretrained_cfg)
    return {
        "model": config.csv_name or config.model,
        "top1": f"{record['top1']:.3f}",
        "top1_err": f"{100 - record['top1']:.3f}",
        "top5": f"{record['top5']:.3f}",
        "top5_err": f"{100 - record['top5']:.3f}",
        "param_count": f"{record['params'] / 1e6:.2f}",
        "img_size": image_size(config, pretrained_cfg),
        "crop_pct": f"{crop:.3f}",
        "interpolation": interpolation,
    }


def per_class(rows: Tensor, names: Sequence[str]) -> List[Dict[str, Any]]:
    """Images and top-1 of each class that has images, the lowest first, from what `evaluate` gives."""
    of_class = [(name, rows[rows[:, 3] == number, 1]) for number, name in enumerate(names)]
    table = [
        {"class": name, "images": len(hits), "top1": 100 * hits.mean().item()} for name, hits in of_class if len(hits)
    ]
    return sorted(table, key=lambda row: row["top1"])


def validate(config: ValidateConfig) -> Dict[str, Any]:
    """Evaluates `config.model` on the validation images.

    Returns:
        model, data, images, top1 and top5 in percent, val_loss, params, predictor_params.

    Raises:
        ConfigError: The configuration cannot be used.
    """
    accelerator = make_accelerator(config.amp)
    dataset = make_validation_set(config)
    classes = class_count(config, dataset)
    wanted = None if config.pretrained else classes
    model = create_model(config.model, config.model_args, pretrained=config.pretrained, num_classes=wanted)
    if model.num_classes != classes:
        raise ConfigError(f"model: {config.model} has {model.num_classes} classes, {config.data} has {classes}.")
    names, ours = model.pretrained_cfg.get("label_names"), class_names(dataset)
    if isinstance(names, (list, tuple)) and ours:
        for name, own in zip(names, ours, strict=False):
            if name != own:
                raise ConfigError(f"model: a class is {name!r} to {config.model} and {own!r} in {config.data}.")
    channels, size = model.pretrained_cfg["input_size"][0], image_size(config, model.pretrained_cfg)
    check_images(model.eval(), torch.zeros(1, channels, size, size))
    loader = make_loader(config, dataset, model.pretrained_cfg, train=False)
    model, loader = accelerator.prepare(model, loader)
    rows = evaluate(CLASSIFICATION, model, loader, accelerator)
    result = CLASSIFICATION.summarise(rows)
    bare = accelerator.unwrap_model(model)
    record = {"model": config.model, "data": config.data, "images": len(dataset), **result, **parameter_counts(bare)}
    if accelerator.is_main_process:
        shown = {key: value for key, value in record.items() if key != "top5" or classes > 5}
        print_table([shown], f"{config.model} on {config.data}")
        by_class = per_class(rows, ours or list(map(str, range(classes))))
        print_table(by_class[:WORST], f"top-1 of each class, the lowest {WORST} of {classes}")
        few = [row["class"] for row in by_class if row["images"] < 10]
        if few:
            names = ", ".join(few[:WORST])
            console.print(f"Fewer than 10 images: {names}. One image more or less is over 10 % of such a class.")
        if config.output:
            write_summary(config.output, [record], f"{config.model} on {config.data}")
        if config.csv:
            update_csv(config.csv, [timm_row(config, record, bare.pretrained_cfg)], ["model", "img_size"], "top1")
    return record
