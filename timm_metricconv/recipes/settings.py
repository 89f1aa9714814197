"""What recipes have in common to be set: where a run writes, its network, its images, its training.

Each is a pydantic dataclass: its values are checked when it is made. What one recipe alone needs stands in its file.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Dict, List, Literal, Optional

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from timm.data import create_transform
from timm.optim import list_optimizers

from .config import ConfigError, Settings, option

Probability = Annotated[float, Field(ge=0, le=1)]
Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]


def _ascending(pair: List[float]) -> List[float]:
    if pair[0] > pair[1]:
        raise ValueError("the least and then the most")
    return pair


def _of_channels(numbers: List[float]) -> List[float]:
    if len(numbers) not in (0, 1, 3):
        raise ValueError("one number, or one for each of the three channels")
    return numbers


def _known_policy(policy: str) -> str:
    try:
        create_transform(32, is_training=True, auto_augment=policy)
    except (AssertionError, KeyError, ValueError, IndexError):  # timm's, by what it cannot read
        raise ValueError("a policy of timm's, such as rand-m9-mstd0.5-inc1 or augmix-m3") from None
    return policy


Crop = Annotated[float, Field(gt=0, le=1)]
Range = Annotated[List[PositiveFloat], Field(min_length=2, max_length=2), AfterValidator(_ascending)]
Mean = Annotated[List[float], AfterValidator(_of_channels)]
Spread = Annotated[List[PositiveFloat], AfterValidator(_of_channels)]
Policy = Annotated[str, AfterValidator(_known_policy)]


def _known_optimiser(name: str) -> str:
    if name not in list_optimizers():
        near = difflib.get_close_matches(name, list_optimizers(), n=3)
        raise ValueError(f"an optimiser of timm's, such as {', '.join(near) or 'adamw, adam, sgd, lamb'}")
    return name


Optimiser = Annotated[str, AfterValidator(_known_optimiser)]
Schedule = Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant"]
TaskName = Literal["classification", "segmentation"]
Share = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


@dataclass
class RunConfig(Settings):
    """Where a run writes."""

    name: str = option("run", "name of the run")
    output: Optional[str] = option(None, "folder of the run; by default runs/<name>")

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.output or f"runs/{self.name}")


@dataclass
class NetworkConfig(Settings):
    """Which network is trained, and what it starts from."""

    model: str = option("resnet18_metric", "any timm model name, hf-hub: or local-dir:")
    pretrained: Optional[bool] = option(None, "start from the model's weights; by default of hf-hub: and local-dir:")
    model_args: Dict[str, Any] = option({}, "arguments of the model: stem, layout, conv_cfg, ...")
    checkpoint: Optional[str] = option(None, "start from this .safetensors file, with a new classifier")
    allow_pickle: bool = option(False, "`checkpoint` may be a .pth, .pt or .bin file (tensors alone are unpickled)")
    kernel_start: Literal["model", "uniform"] = option("model", "kernels of adaptive layers: as loaded, or uniform")
    fixed_kernel: bool = option(False, "FKW: no gradient for the kernels of adaptive layers")
    kernels: List[str] = option([], "layers that kernel_start and fixed_kernel mean; by default the adaptive ones")

    def __post_init__(self):
        if self.pretrained is None:
            self.pretrained = ":" in str(self.model) and not self.checkpoint


@dataclass
class DataConfig(Settings):
    """What the images are and how they are shown to a network."""

    data: str = option("digits", "digits[/FIRST-LAST], mnist, textures, fashion-mnist, cifar10, cifar100, a folder, …")
    data_dir: str = option("data", "root that timm and torchvision download to and read from")
    num_classes: NonNegativeInt = option(0, "number of classes; 0 asks the data set")
    input_size: NonNegativeInt = option(0, "images are resized to this; 0 takes the model's own size")
    train_images: NonNegativeInt = option(0, "train on so many, drawn by the run's seed, each class alike; 0: on all")
    val_images: NonNegativeInt = option(0, "validate on so many, the same for every seed; 0: on all")
    warp: Dict[str, Any] = option({}, "random warps: rotation, scale, stretch, perspective, elastic")
    val_warp: Dict[str, Any] = option({}, "what is otherwise on the validation images, each warped once and for all")
    mean: Mean = option([], "by default the data set's (CIFAR, Fashion-MNIST) or the model's")
    std: Spread = option([], "likewise")
    scale: Range = option([0.08, 1.0], "area range of RandomResizedCrop")
    ratio: Range = option([0.75, 1.3333], "aspect range of RandomResizedCrop")
    hflip: Probability = option(0.5, "probability of a horizontal flip")
    color_jitter: NonNegativeFloat = option(0.0, "strength of colour jitter")
    auto_augment: Optional[Policy] = option(None, "timm's auto-augment policy, e.g. rand-m9-mstd0.5-inc1")
    re_prob: Probability = option(0.0, "probability of random erasing")
    crop_pct: Optional[Crop] = option(None, "centre crop of the validation images; by default the model's own")
    interpolation: Optional[Interpolation] = option(None, "resizing; by default the model's own, in training random")
    batch_size: PositiveInt = option(128, "images in a batch, on each device")
    workers: NonNegativeInt = option(2, "loader processes; 0 loads in the training process")


@dataclass
class TrainConfig(DataConfig, NetworkConfig, RunConfig):
    """A training run."""

    name: str = option("train", "name of the run")
    task: TaskName = option("classification", "what is learnt")
    decoder: str = option("Unet", "task=segmentation: architecture of segmentation-models-pytorch over `model`")
    decoder_args: Dict[str, Any] = option({}, "task=segmentation: its arguments, e.g. decoder_channels")
    epochs: PositiveInt = option(10, "epochs")
    opt: Optimiser = option("adamw", "timm optimiser")
    lr: PositiveFloat = option(1e-3, "learning rate")
    predictor_lr: NonNegativeFloat = option(0.1, "factor on the predictors' learning rate (DCN practice)")
    predictor_regulariser: NonNegativeFloat = option(0.0, "weight of the mean |parameter| of the predictors")
    weight_decay: NonNegativeFloat = option(1e-4, "weight decay")
    predictor_weight_decay: Optional[NonNegativeFloat] = option(None, "of the predictors; by default weight_decay")
    decay_all: bool = option(False, "decay biases and norms too, as torch.optim does on its own")
    sched: Schedule = option("cosine", "timm schedule, stepped each epoch")
    warmup_epochs: NonNegativeInt = option(0, "epochs of linear warm-up, fewer than epochs")
    warmup_lr: Optional[NonNegativeFloat] = option(None, "where warm-up starts; by default lr/100, at most timm's 1e-5")
    min_lr: NonNegativeFloat = option(0.0, "last learning rate")
    decay_epochs: Optional[PositiveFloat] = option(
        None, "step: epochs between two decays (by default 0.3 of all); wsd, rsqrt: the last ones (a fifth)"
    )
    decay_milestones: List[PositiveInt] = option([], "multistep: when to decay; by default at 0.3, 0.6 and 0.9 of all")
    decay_rate: PositiveFloat = option(0.1, "step, multistep: factor of a decay")
    power: PositiveFloat = option(0.9, "poly: exponent")
    clip_grad: Optional[PositiveFloat] = option(None, "largest norm of the gradient")
    smoothing: Share = option(0.0, "label smoothing")
    mixup: NonNegativeFloat = option(0.0, "mixup alpha")
    cutmix: NonNegativeFloat = option(0.0, "cutmix alpha")
    ema_decay: Optional[Share] = option(None, "validate and save an exponential average of the weights")
    amp: Literal["no", "bf16", "fp16"] = option("no", "mixed precision")
    grad_accum: PositiveInt = option(1, "batches in one optimiser step")
    channels_last: bool = option(True, "memory format of network and images")
    seed: Seed = option(0, "seed of weights, order and augmentation")

    def __post_init__(self):
        super().__post_init__()
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise ConfigError(
                f"warmup_epochs: expected fewer than epochs, {self.epochs}, or lr is never reached; "
                f"got {self.warmup_epochs}."
            )
        if self.warmup_lr is not None and self.warmup_lr > self.lr:
            raise ConfigError(f"warmup_lr: expected at most lr, {self.lr:g}; got {self.warmup_lr:g}.")
