"""Segmentation: a network of segmentation-models-pytorch over one of timm's encoders, trained by the same engine."""

import dataclasses
from pathlib import Path
from typing import Dict

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .config import ConfigError
from .data import class_count, image_size
from .network import build_model
from .segment_data import IGNORED, make_mask_datasets, make_mask_loader
from .settings import TrainConfig
from .tasks import Task

# What classification has and segmentation has not.
_UNUSED = ("warp", "val_warp", "auto_augment", "re_prob", "crop_pct", "interpolation", "mixup", "cutmix")


def _smp():
    try:
        import segmentation_models_pytorch
    except ImportError:
        raise ConfigError('task: "segmentation" needs pip install "timm_metricconv[consumers]".') from None
    return segmentation_models_pytorch


def _datasets(config: TrainConfig, seed: int):
    default = {field.name: field.default for field in dataclasses.fields(config)}
    for key in _UNUSED:
        if getattr(config, key) and getattr(config, key) != default[key]:
            raise ConfigError(f"{key}: segmentation has none; leave it out.")
    return make_mask_datasets(config, seed)


def _start_as(encoder: nn.Module, classifier: nn.Module) -> None:
    """Gives timm's features of a network the weights of its classifier, and their gradients or none.

    The names are the classifier's, but for dots that timm makes underscores and for a prefix.
    """
    theirs = {name.replace(".", "_"): value for name, value in classifier.state_dict(keep_vars=True).items()}
    ours = encoder.state_dict(keep_vars=True)
    names = {name: name.removeprefix("model.").replace(".", "_") for name in ours}
    alone = [name for name in ours if names[name] not in theirs]
    if alone:
        raise ValueError(f"its features have {alone[0]}, which the network has not")
    encoder.load_state_dict({name: theirs[names[name]] for name in ours})
    for name, value in encoder.named_parameters():
        value.requires_grad_(theirs[names[name]].requires_grad)


def build_segmenter(config: TrainConfig, num_classes: int) -> nn.Module:
    """A decoder over `config.model`, which starts, is frozen and converted as a classifier of that name would be.

    Raises:
        ConfigError: segmentation-models-pytorch refuses the decoder, or the encoder or the image size does not fit it.
    """
    classifier = build_model(config)
    channels, size = classifier.pretrained_cfg["input_size"][0], image_size(config, classifier.pretrained_cfg)
    arguments = {key: value for key, value in config.model_args.items() if key != "in_chans"}
    try:
        model = _smp().create_model(
            config.decoder,
            f"tu-{config.model}",
            encoder_weights=None,
            in_channels=channels,
            classes=num_classes,
            **arguments,
            **config.decoder_args,
        )
        # smp draws an encoder first, which takes another number of draws for each convolution
        torch.manual_seed(config.seed)
        model.initialize()
        _start_as(model.encoder.model, classifier)
        with torch.no_grad():
            shape = tuple(model.eval()(torch.zeros(1, channels, size, size)).shape)
        if shape[2:] != (size, size):
            raise ValueError(f"an image of {size}×{size} gets a mask of {shape[3]}×{shape[2]} (stem and layout matter)")
    except (AssertionError, KeyError, TypeError, ValueError, RuntimeError) as error:
        text = error.args[0] if error.args else error
        raise ConfigError(f"decoder: {config.decoder} over {config.model} at {size}×{size} pixels: {text}") from error
    model.pretrained_cfg = classifier.pretrained_cfg
    return model.train()


def _network(config: TrainConfig, train_set: Dataset) -> nn.Module:
    return build_segmenter(config, class_count(config, train_set))


class SegmentationLoss(nn.Module):
    """Cross-entropy of the pixels plus the Dice loss of the classes: thin things are few pixels.

    Args:
        smoothing: Label smoothing of the cross-entropy.
    """

    def __init__(self, smoothing: float = 0.0):
        super().__init__()
        self.entropy = nn.CrossEntropyLoss(ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum")
        self.dice = _smp().losses.DiceLoss("multiclass", ignore_index=IGNORED)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Logits `[B, C, H, W]` and class numbers `[B, H, W]` → a number."""
        # the mean of a batch whose pixels are all ignored would be NaN
        pixels = (target != IGNORED).sum().clamp(min=1)
        return self.entropy(output, target) / pixels + self.dice(output.float(), target)


def _measure(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy, then true and false positives, false and true negatives of each class: `[B, 1 + 4·C]`."""
    losses = nn.functional.cross_entropy(output, target, ignore_index=IGNORED, reduction="none")
    loss = losses.sum((1, 2)) / (target != IGNORED).sum((1, 2)).clamp(min=1)
    counts = _smp().metrics.get_stats(
        output.argmax(1), target, mode="multiclass", num_classes=output.shape[1], ignore_index=IGNORED
    )
    return torch.cat([loss[:, None], *(count.to(loss) for count in counts)], 1)


def _summarise(rows: Tensor) -> Dict[str, float]:
    """Dice and IoU in percent: counts of all images together, then the mean over the classes but the background.

    A class that is neither in the masks nor in the predictions counts nowhere.
    """
    rows = rows.double()
    hits, wrong, missed, _ = (count[:, 1:].sum(0) for count in rows[:, 1:].chunk(4, 1))
    return {
        "val_loss": rows[:, 0].mean().item(),
        "dice": 100 * (2 * hits / (2 * hits + wrong + missed)).nanmean().item(),
        "iou": 100 * (hits / (hits + wrong + missed)).nanmean().item(),
    }


def _save(model: nn.Module, config: TrainConfig, folder: Path) -> None:
    """What `segmentation_models_pytorch.from_pretrained(folder)` loads once `timm_metricconv` is imported."""
    model.save_pretrained(folder)


SEGMENTATION = Task(
    scores={"dice": "Dice", "iou": "IoU"},
    datasets=_datasets,
    loader=make_mask_loader,
    network=_network,
    loss=lambda config: SegmentationLoss(config.smoothing),
    measure=_measure,
    summarise=_summarise,
    save=_save,
)
