"""What a task is to the training engine, and the task that timm's networks are made for: a class for each image."""

from pathlib import Path
from typing import Callable, Dict, NamedTuple, Tuple

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .data import class_count, class_names, evaluation_crop, image_size, make_datasets, make_loader, normalisation
from .network import build_model
from .settings import TrainConfig


class Task(NamedTuple):
    """What is learnt; the engine (`train`) knows devices, epochs, checkpoints and schedules, and nothing of this.

    Attributes:
        scores: What `summarise` gives besides `val_loss`, in percent, with its name for people; the first one decides.
        datasets: (config, seed) → the training and the validation images with their targets.
        loader: (config, data set, the network's `pretrained_cfg`, whether it is for training) → batches of both.
        network: (config, training set) → the network; `pretrained_cfg` says what images it expects.
        loss: config → (output, target) → the loss that is minimised.
        measure: (output, target) → `[B, M]`, M numbers of each image that say how good the output is.
        summarise: `[N, M]` of all validation images → `val_loss` and the scores.
        save: (network, config, folder) writes what loads the network again.
    """

    scores: Dict[str, str]
    datasets: Callable[[TrainConfig, int], Tuple[Dataset, Dataset]]
    loader: Callable[[TrainConfig, Dataset, dict, bool], DataLoader]
    network: Callable[[TrainConfig, Dataset], nn.Module]
    loss: Callable[[TrainConfig], nn.Module]
    measure: Callable[[Tensor, Tensor], Tensor]
    summarise: Callable[[Tensor], Dict[str, float]]
    save: Callable[[nn.Module, TrainConfig, Path], None]


def _network(config: TrainConfig, train_set: Dataset) -> nn.Module:
    model = build_model(config, class_count(config, train_set))
    model.label_names = class_names(train_set)  # type: ignore[assignment]
    return model


def _loss(config: TrainConfig) -> nn.Module:
    if config.mixup or config.cutmix:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(config.smoothing) if config.smoothing else nn.CrossEntropyLoss()


def _measure(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy, whether the class is the first, and among the first five, the class, and the first: `[B, 5]`."""
    first = output.topk(min(5, output.shape[1])).indices
    hits = first == target[:, None]
    loss = nn.functional.cross_entropy(output, target, reduction="none")
    return torch.stack([loss, *(part.to(loss) for part in (hits[:, 0], hits.any(1), target, first[:, 0]))], 1)


def _summarise(rows: Tensor) -> Dict[str, float]:
    """The mean loss, top-1 and top-5 in percent, and how many classes are predicted at all."""
    loss, top1, top5 = rows[:, :3].double().mean(0).tolist()
    return {"val_loss": loss, "top1": 100 * top1, "top5": 100 * top5, "predicted": len(rows[:, 4].unique())}


def _save(model: nn.Module, config: TrainConfig, folder: Path) -> None:
    """`model.safetensors` and `config.json`, which `timm.create_model("local-dir:…")` loads."""
    mean, std = normalisation(config, model.pretrained_cfg)
    size = (len(mean), *[image_size(config, model.pretrained_cfg)] * 2)
    crop, interpolation = evaluation_crop(config, model.pretrained_cfg)
    image = {"input_size": size, "mean": mean, "std": std, "crop_pct": crop, "interpolation": interpolation}
    labels = {"label_names": model.label_names}
    timm.models.save_for_hf(model, str(folder), labels, safe_serialization=True, data_config=image)


CLASSIFICATION = Task(
    scores={"top1": "top-1", "top5": "top-5"},
    datasets=make_datasets,
    loader=make_loader,
    network=_network,
    loss=_loss,
    measure=_measure,
    summarise=_summarise,
    save=_save,
)
