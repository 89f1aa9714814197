"""The checkpoint filter: a standard network's or the authors' state dict → ours, or a refusal that names the keys."""

import logging
import re
from typing import Dict, List

from torch import Tensor, nn

from ..layers import BallConv2d

_logger = logging.getLogger(__name__)

# The names that the authors' code gives to the parts of a layer.
AUTHORS_NAMES = (
    (re.compile(r"\.ker$"), ".weight"),
    (re.compile(r"\.intermediate_Mw\."), ".predictor."),
    (re.compile(r"\.deform_conv2d\.(weight|bias)$"), r".\1"),
    (re.compile(r"\.conv_offsets\."), ".predictor."),
)


def _renamed(key: str) -> str:
    for pattern, name in AUTHORS_NAMES:
        key = pattern.sub(name, key)
    return key


def _list(keys: List[str]) -> str:
    return ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")


def supply_predictors(model: nn.Module, state_dict: Dict[str, Tensor], prefix: str = "", *_) -> None:
    """Adds the model's own predictors to a state dict that has none at all, as a standard network's.

    As a pre-hook of `load_state_dict` it lets whatever loads a file load such a checkpoint. One that has some of the
    predictors, or lacks anything else, is left as it is, and torch names the keys.
    """
    own = {
        key: value
        for name, layer in model.named_modules(prefix=prefix.rstrip("."))
        if isinstance(layer, BallConv2d) and f"{name}.weight" in state_dict
        for key, value in layer.state_dict(prefix=f"{name}.").items()
        if key.removeprefix(f"{name}.").startswith(("predictor.", "offset")) and not value.is_meta
    }
    if not any(key in state_dict for key in own):
        state_dict.update(own)


def _prefix(state_dict: Dict[str, Tensor], own: Dict[str, Tensor]) -> str:
    """What stands before every name where a checkpoint is that of a module around the network."""
    first = next(iter(own))
    return next((key.removesuffix(first) for key in state_dict if key.endswith(f".{first}")), "")


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Fits a checkpoint to a converted network.

    A standard network's checkpoint has no predictors: the model's own, as initialised, are kept. Where the model has
    another stem (`stem="cifar"`) the model's own stem is kept, with a warning. timm adapts the classifier and the
    input channels afterwards.

    Args:
        state_dict: Of timm's or torchvision's network of that name, of the authors' code, or of this package.
        model: The network to load, a registered one.

    Returns:
        A complete state dict for `model`.

    Raises:
        RuntimeError: Keys are missing, unknown, or of another shape; nothing is skipped.
    """
    state_dict = {_renamed(key): value for key, value in state_dict.items()}
    own = model.state_dict()
    supply_predictors(model, state_dict)

    cfg: Dict[str, str] = model.pretrained_cfg  # type: ignore[assignment]
    first_conv, classifier = cfg["first_conv"], cfg["classifier"]
    if getattr(model, "stem", "imagenet") == "cifar":
        changed = [
            key
            for key in own
            if key.startswith(first_conv) and key in state_dict and state_dict[key].shape[2:] != own[key].shape[2:]
        ]
        if changed:
            _logger.warning(f'stem="cifar": the checkpoint\'s {_list(changed)} does not fit and starts untrained.')
            state_dict.update({key: own[key] for key in changed})

    # older torch counted no batches; nn.BatchNorm2d takes its own number then
    state_dict.update({k: v for k, v in own.items() if k.endswith(".num_batches_tracked") and k not in state_dict})
    missing = [k for k in own if k not in state_dict and not k.startswith(classifier)]
    unknown = [k for k in state_dict if k not in own and not k.startswith(classifier)]
    shapes = [
        f"{k} (expected {tuple(own[k].shape)}, came {tuple(v.shape)})"
        for k, v in state_dict.items()
        if k in own and not _fits(k, v, own[k], first_conv, classifier)
    ]
    if missing or unknown or shapes:
        problems = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        hint = "Create the model with the arguments it was saved with (conv_cfg, stages, stem, layout)."
        if prefix := _prefix(state_dict, own):
            hint = f"Remove {prefix!r} from its keys: it is of a module (Lightning's, for one) that holds the network."
        raise RuntimeError(
            f"The checkpoint does not fit {type(model).__name__}: "
            + "; ".join(f"{what}: {_list(keys)}" for what, keys in problems if keys)
            + f". {hint}"
        )
    return state_dict


def _fits(key: str, value: Tensor, own: Tensor, first_conv: str, classifier: str) -> bool:
    if key.startswith(classifier):
        return True
    if key.startswith(first_conv) and value.dim() == 4:
        return value.shape[0] == own.shape[0] and value.shape[2:] == own.shape[2:]
    return value.shape == own.shape
