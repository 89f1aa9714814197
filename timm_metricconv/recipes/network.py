"""The network of a configuration: made, warm-started, frozen; its predictors, parameter groups and counts."""

import copy
import difflib
import inspect
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, TypeVar

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from ..layers import LAYERS, BallConv2d
from ..models.registry import check_hub, hub_repository
from .config import ConfigError
from .settings import NetworkConfig

Network = TypeVar("Network", bound=nn.Module)


def _neighbour(error: str) -> str:
    """The nearest argument of our layers, where Python (before 3.13) names an unknown one and no neighbour."""
    unknown = re.search(r"Conv2d\.__init__.* unexpected keyword argument '(\w+)'(?!.*Did you mean)", error)
    known = {name for layer in LAYERS.values() for name in inspect.signature(layer).parameters}
    near = difflib.get_close_matches(unknown[1], known, n=1) if unknown else []
    return f". Did you mean {near[0]!r}?" if near else ""


def check_images(
    model: nn.Module, images: Tensor, hint: str = "Some models have --model_args.img_size for other sizes."
) -> None:
    """Refuses images that a network cannot take, in the mode that it is in; nothing of the network changes.

    Raises:
        ConfigError: The network's own words, and `hint`.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            (copy.deepcopy(model) if model.training else model)(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        shape = "×".join(map(str, images.shape))
        raise ConfigError(f"model: it cannot take images of {shape}: {str(error).rstrip('.')}. {hint}") from error


def _check_hub(name: str, model_args: Dict[str, Any]) -> None:
    """`check_hub` for timm's own networks too, and for a repository by its name."""
    source, _, place = name.rpartition(":")
    repo = place if source == "hf-hub" else None
    if not source and timm.is_model(name):
        repo = hub_repository(name, overlay=model_args.get("pretrained_cfg_overlay"))
    if repo:
        check_hub(repo)


def create_model(
    name: str, model_args: Dict[str, Any], *, pretrained: Optional[bool] = None, num_classes: Optional[int] = None
) -> nn.Module:
    """timm's model of that name.

    Args:
        name: Any that `timm.create_model` takes.
        model_args: Its arguments.
        pretrained: Load its weights; by default where it names a folder or a repository of weights.
        num_classes: Overrides that of `model_args`, which overrides the model's own.

    Raises:
        ConfigError: timm does not know the model, or it refuses its arguments or its weights.
    """
    pretrained = ":" in name if pretrained is None else pretrained
    arguments = model_args if num_classes is None else {**model_args, "num_classes": num_classes}
    try:
        if pretrained:
            _check_hub(name, model_args)
        model = timm.create_model(name, pretrained=pretrained, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model_args: {name} refuses {model_args}: {error}{_neighbour(str(error))}") from error
    except (RuntimeError, OSError, SafetensorError) as error:
        raise ConfigError(f"model: {name} cannot be loaded: {error}") from error
    except KeyError as error:
        raise ConfigError(f"model: {name} has no {error} in its config.json; it is no network of timm's.") from error
    cfg: Dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    # timm leaves the channels as they were
    cfg["input_size"] = (model_args.get("in_chans", cfg["input_size"][0]), *cfg["input_size"][1:])
    return model


def _read_checkpoint(path: str, allow_pickle: bool) -> Dict[str, Tensor]:
    if not Path(path).is_file():
        raise ConfigError(f"checkpoint: there is no file {path!r}.")
    if Path(path).suffix != ".safetensors" and not allow_pickle:
        raise ConfigError(
            f"checkpoint: {path!r} is no .safetensors file, and a pickle file can run code. Convert it with "
            "safetensors.torch.save_file, or give --allow_pickle true for one whose source you trust."
        )
    try:
        state = timm.models.load_state_dict(path, weights_only=True)
    except Exception as error:  # safetensors, zip and pickle have exceptions of their own
        raise ConfigError(f"checkpoint: {path!r} cannot be read ({error}); is it complete?") from error
    strange = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise ConfigError(f"checkpoint: {path!r}: {strange[0]!r} is no tensor; expected the state dict of a network.")
    return state


def load_checkpoint(model: nn.Module, path: str, *, allow_pickle: bool = False, new_classifier: bool = False) -> None:
    """Loads a checkpoint of this network, or of the standard network that it is made from, strictly.

    Args:
        model: A network of timm's or of ours. Where the module that defines it has a `checkpoint_filter_fn`, as timm
            names them, the checkpoint passes it.
        path: A .safetensors file.
        allow_pickle: `path` may be a .pth, .pt or .bin file.
        new_classifier: The model keeps its own classifier.

    Raises:
        ConfigError: The file is missing, broken or (without `allow_pickle`) no safetensors file, or a key is missing,
            unknown or of another shape.
    """
    state, own = _read_checkpoint(path, allow_pickle), model.state_dict()
    fit = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        if fit is not None:
            state = fit(state, model)
        if new_classifier:
            names = model.pretrained_cfg.get("classifier") or ()
            classifier = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
            state = {key: value for key, value in state.items() if not key.startswith(classifier)}
            state.update({key: value for key, value in own.items() if key.startswith(classifier)})
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"checkpoint: {path!r}: {error}") from None


def _layers(model: nn.Module, names: Sequence[str]) -> List[nn.Module]:
    try:
        return [model.get_submodule(name) for name in names] if names else list(adaptive_layers(model))
    except AttributeError as error:
        raise ConfigError(f"kernels: {error}; expected names of convolutions.") from None


def build_model(config: NetworkConfig, num_classes: Optional[int] = None) -> nn.Module:
    """The network that a configuration names, with its starting weights and (by default its own) number of classes.

    Raises:
        ConfigError: The model or its weights cannot be had.
    """
    model = create_model(config.model, config.model_args, pretrained=config.pretrained, num_classes=num_classes)
    if config.checkpoint:
        load_checkpoint(model, config.checkpoint, allow_pickle=config.allow_pickle, new_classifier=True)
    for layer in _layers(model, config.kernels):
        if config.kernel_start == "uniform":
            nn.init.constant_(layer.weight, 1 / layer.weight[0].numel())
        if config.fixed_kernel:
            layer.weight.requires_grad_(False)
    return model


def adaptive_layers(model: nn.Module) -> List[BallConv2d]:
    """All metric, deformable, ... layers of a network."""
    return [module for module in model.modules() if isinstance(module, BallConv2d)]


def is_predictor(name: str) -> bool:
    """Whether a parameter's name is that of a predictor (or of an active convolution's offsets)."""
    return ".predictor." in f".{name}" or name.split(".")[-1] == "offset"


def randomise_predictors(model: Network, size: float = 1.0) -> Network:
    """Trained-looking predictors: raw channels of about `size` for an input of variance 1, the same every time."""
    generator = torch.Generator().manual_seed(0)
    for layer in adaptive_layers(model):
        head = layer.predictor_head()
        if head is not None:
            values = torch.randn(head.weight.shape, generator=generator) * (size / head.weight[0].numel() ** 0.5)
            head.weight.data.copy_(values.to(head.weight.dtype))
    return model


def predictor_regulariser(model: nn.Module) -> Tensor:
    """The mean over layers and over {weight, bias} of mean |parameter| (the regulariser of the authors' scripts).

    Of a separable predictor it means the 1×1 convolution: with both of its parts at zero neither would learn again.
    """
    heads = [layer.predictor_head() for layer in adaptive_layers(model)]
    terms = [sum(parameter.abs().mean() for parameter in head.parameters()) / 2 for head in heads if head is not None]
    return torch.stack(terms).mean() if terms else torch.zeros(())


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    predictor_lr: float = 1.0,
    predictor_weight_decay: Optional[float] = None,
    decay_all: bool = False,
) -> List[Dict[str, Any]]:
    """Parameters by (predictor or not) × (decayed or not).

    All have the same `lr`, the optimiser's: timm's schedules multiply what they set by a group's `lr_scale`.

    Args:
        model: The network; parameters without gradient are in no group.
        weight_decay: Of weights.
        predictor_lr: Factor on the predictors' learning rate.
        predictor_weight_decay: Of the predictors' weights; by default `weight_decay`.
        decay_all: Decay biases and norms too.
    """
    groups: Dict[Tuple[bool, bool], List[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = decay_all or parameter.ndim > 1
            groups.setdefault((is_predictor(name), decayed), []).append(parameter)
    decay = {False: weight_decay, True: weight_decay if predictor_weight_decay is None else predictor_weight_decay}
    return [
        {
            "params": parameters,
            "weight_decay": decay[predictor] if decayed else 0.0,
            "lr_scale": predictor_lr if predictor else 1.0,
        }
        for (predictor, decayed), parameters in groups.items()
    ]


def parameter_counts(model: nn.Module) -> Dict[str, int]:
    """All parameters, and those of the predictors."""
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "predictor_params": sum(p.numel() for name, p in model.named_parameters() if is_predictor(name)),
    }


def count_macs(model: nn.Module, size: int) -> float:
    """Multiply-adds of one image of `size`² pixels in units of 1e9, the gather of adaptive layers counted."""
    image = torch.zeros(1, model.pretrained_cfg["input_size"][0], size, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    return counter.get_total_flops() / 2e9


def count_activations(model: nn.Module, size: int) -> float:
    """Outputs of convolutions (predictors too) and linear layers for one image of `size`² pixels in units of 1e6."""
    count = 0

    def add(module: nn.Module, inputs: Tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal count
        if isinstance(module, (nn.Conv2d, nn.Linear, BallConv2d)):
            count += output.numel()

    with torch.no_grad(), register_module_forward_hook(add):
        model.eval()(torch.zeros(1, model.pretrained_cfg["input_size"][0], size, size))
    return count / 1e6
