"""Replaces the convolutions of any network by members of the family."""

from fnmatch import fnmatchcase
from typing import Callable, Dict, List, Optional, Sequence, Union

from torch import nn

from ..layers import LAYERS, BallConv2d
from ..layers.ball_conv import why_not
from .checkpoints import supply_predictors

Where = Union[str, Sequence[str], Callable[[str, nn.Conv2d], bool]]


def _selector(where: Optional[Where]) -> Callable[[str, nn.Conv2d], bool]:
    if where is None:
        return lambda name, conv: True
    if callable(where):
        return where
    globs = [where] if isinstance(where, str) else list(where)
    return lambda name, conv: any(fnmatchcase(name, glob) for glob in globs)


def convert(model: nn.Module, conv: str = "metric", where: Optional[Where] = None, **conv_cfg) -> Dict[str, BallConv2d]:
    """Replaces convolutions of `model` in place.

    With `init="identity"` (the default) the new layers own the very parameters of the old ones, so the network computes
    what it computed before, and a checkpoint of the standard network still loads. Standard convolutions inside a
    predictor, 1×1 kernels, kernels that are not square, subclasses of `nn.Conv2d` and padding other than zeros are left
    alone.

    Args:
        model: Any module that contains `nn.Conv2d`.
        conv: "metric", "deform", "shifted", "active" or "affine".
        where: Glob(s) over module names ("layer[234].*") or a predicate (name, conv) → bool; by default every
            convolution with k > 1 that can be replaced.
        **conv_cfg: Arguments of the layer, e.g. `parametrization`, `eps_omega`, `fixed_kernel`.

    Returns:
        Name → the new layer, for all that was replaced.

    Raises:
        ValueError: `conv` is unknown, the model is itself a convolution, or `where` was given and selects nothing.
        TypeError: `conv_cfg` has an argument that the layer does not take.
    """
    if conv not in LAYERS:
        raise ValueError(f"conv={conv!r}: expected one of {', '.join(LAYERS)}.")
    if isinstance(model, (nn.Conv2d, BallConv2d)):
        name = LAYERS[conv].__name__
        raise ValueError(f"model: a {type(model).__name__} cannot be replaced in place; use {name}.from_conv.")
    selected = _selector(where)
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BallConv2d))
    candidates = {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1
        if why_not(module) is None and not name.startswith(inside)
    }
    chosen = {name: module for name, module in candidates.items() if selected(name, module)}
    if where is not None and not chosen:
        known: List[str] = list(candidates)[:8]
        count = len(candidates)
        raise ValueError(f"where={where!r} selects none of the {count} convolutions that can be replaced: {known}…")
    # one new layer for a convolution that stands in several places
    new = {module: LAYERS[conv].from_conv(module, **conv_cfg) for module in dict.fromkeys(chosen.values())}
    for name, module in chosen.items():
        model.set_submodule(name, new[module])
    model.register_load_state_dict_pre_hook(supply_predictors)
    return {name: new[module] for name, module in chosen.items()}
