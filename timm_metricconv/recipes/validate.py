"""Top-1 and top-5 of any model on any data set."""

from dataclasses import dataclass
from typing import Any, Dict, Literal, Optional

import torch
from accelerate import Accelerator

from .config import ConfigError, option
from .data import DataConfig, class_count, make_datasets, make_loader
from .network import create_model, parameter_counts
from .report import print_table, write_summary
from .tasks import CLASSIFICATION
from .train import evaluate


@dataclass
class ValidateConfig(DataConfig):
    """A validation."""

    model: str = option("resnet18", "any timm model name, hf-hub: or local-dir:")
    model_args: Dict[str, Any] = option({}, "arguments of the model")
    pretrained: bool = option(True, "load the model's weights")
    amp: Literal["no", "bf16", "fp16"] = option("no", "mixed precision")
    output: Optional[str] = option(None, "folder for summary.json, .csv and .md; by default nothing is written")


def validate(config: ValidateConfig) -> Dict[str, Any]:
    """Evaluates `config.model` on the validation images.

    Returns:
        model, data, images, top1 and top5 in percent, val_loss, params, predictor_params.

    Raises:
        ConfigError: The configuration cannot be used.
    """
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=config.amp)
    _, dataset = make_datasets(config)
    classes = class_count(config, dataset)
    wanted = None if config.pretrained else classes
    model = create_model(config.model, config.model_args, pretrained=config.pretrained, num_classes=wanted)
    if model.num_classes != classes:
        raise ConfigError(f"model: {config.model} has {model.num_classes} classes, {config.data} has {classes}.")
    loader = make_loader(config, dataset, model.pretrained_cfg, train=False)
    model, loader = accelerator.prepare(model, loader)
    result = evaluate(CLASSIFICATION, model, loader, accelerator)
    bare = accelerator.unwrap_model(model)
    record = {"model": config.model, "data": config.data, "images": len(dataset), **result, **parameter_counts(bare)}
    if accelerator.is_main_process:
        print_table([record], f"{config.model} on {config.data}")
        if config.output:
            write_summary(config.output, [record], f"{config.model} on {config.data}")
    return record
