"""What the backbones share: their arguments, timm's configurations, the making of a network, and its registration."""

import sys
import time
from dataclasses import replace
from functools import lru_cache
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Type

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from timm.models import DefaultCfg, build_model_with_cfg, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from ..layers import LAYERS


def stage_numbers(stages: Sequence[int]) -> List[int]:
    """The argument `stages` of a backbone, or a ValueError."""
    # 3.0 would name a block
    if isinstance(stages, int) or any(not isinstance(s, int) or s not in (1, 2, 3, 4) for s in stages):
        raise ValueError(f"stages={stages!r}: expected numbers from 1 to 4.")
    return list(stages)


def layer_arguments(conv: str, conv_cfg: Optional[Dict[str, Any]]) -> Dict[str, Any]:
    """The argument `conv_cfg` of a backbone without what only others than the layers named `conv` take."""
    taken = {name: signature(layer).parameters for name, layer in LAYERS.items()}
    others = set().union(*taken.values()) - set(taken.get(conv, ()))
    return {key: value for key, value in (conv_cfg or {}).items() if key not in others}


def standard_cfgs(theirs: ModuleType, architectures: Iterable[str], convs: Sequence[str]) -> Dict[str, DefaultCfg]:
    """timm's own configurations of the standard networks, each pointing at that network's Hub repository.

    Args:
        theirs: timm's module of the standard networks.
        architectures: Names in it.
        convs: Names of our convolutions.

    Returns:
        `<architecture>_<conv>` → its configurations, with timm's tags.
    """
    cfgs = {}
    for name in architectures:
        standard = theirs.default_cfgs[name]
        tags = {
            tag: replace(cfg, url="", hf_hub_id=f"timm/{name}.{tag}" if cfg.hf_hub_id == "timm/" else cfg.hf_hub_id)
            for tag, cfg in standard.cfgs.items()
        }
        for conv in convs:
            cfgs[f"{name}_{conv}"] = replace(standard, tags=standard.tags.copy(), cfgs=dict(tags))
    return cfgs


def hub_repository(name: str, pretrained_cfg: Any = None, overlay: Optional[Dict[str, Any]] = None) -> Optional[str]:
    """The Hub's repository that timm fetches a model's weights from; None where it fetches none."""
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, overlay)
    return None if cfg.file or cfg.state_dict else cfg.hf_hub_id or None


@lru_cache
def check_hub(repo: str, cache_dir: Optional[str] = None) -> None:
    """Refuses a repository that was never fetched from where no connection to the Hub can be made.

    huggingface_hub would find that out too, but tries for 50 seconds, and for minutes where a firewall does not answer.

    Args:
        repo: owner/name or owner/name@revision.
        cache_dir: By default huggingface_hub's.

    Raises:
        RuntimeError: Two attempts failed.
    """
    owner_name = repo.partition("@")[0]
    if Path(cache_dir or constants.HF_HUB_CACHE, f"models--{owner_name.replace('/', '--')}").exists():
        return
    for last in (False, True):
        try:
            get_hf_file_metadata(hf_hub_url(owner_name, "config.json"))
            return
        except Exception as error:
            # a name tells, because the HTTP library differs between versions; any other error is left to the download
            if not type(error).__name__.startswith("Connect"):
                return
            if last:
                raise RuntimeError(_unfetched(repo, error)) from error
        time.sleep(1)


def _unfetched(repo: str, error: Exception) -> str:
    return (
        f"{repo} could not be fetched from {constants.ENDPOINT} "
        f"({type(error).__name__}: {' '.join(str(error).split())[:300]}). Check the network and HF_ENDPOINT; "
        "HF_HUB_OFFLINE=1 reads the cache alone, pretrained=False starts without weights."
    )


def _create(network: Type[nn.Module], variant: str, pretrained: bool, **kwargs) -> nn.Module:
    """`build_model_with_cfg`, with one clear RuntimeError where the weights cannot be fetched."""
    cfgs = kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
    repo = hub_repository(variant, *cfgs) if pretrained else None
    if repo is None:
        return build_model_with_cfg(network, variant, pretrained, **kwargs)
    check_hub(repo, kwargs.get("cache_dir"))
    try:
        return build_model_with_cfg(network, variant, pretrained, **kwargs)
    except Exception as error:
        # huggingface_hub raises OSErrors, and what the HTTP library below it raises
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("http", "requests", "urllib3")):
            raise
        raise RuntimeError(f"{variant}: {_unfetched(repo, error)}") from error


def register(
    module: str,
    network: Type[nn.Module],
    architectures: Dict[str, Dict[str, Any]],
    convs: Sequence[str],
    checkpoint_filter_fn: Callable[[Dict[str, Tensor], nn.Module], Dict[str, Tensor]],
    feature_cfg: Optional[Dict[str, Any]] = None,
) -> None:
    """Registers `<architecture>_<conv>` in timm, each an entry point in the backbone's module.

    Args:
        module: `__name__` of that module; it has its `default_cfgs` already.
        network: Class of the networks; it takes `conv`.
        architectures: Name → arguments of the class.
        convs: Names of our convolutions.
        checkpoint_filter_fn: What every checkpoint passes; recipes look for it under this name in the module.
        feature_cfg: Of `build_model_with_cfg`.
    """

    def entry_point(name: str, defaults: Dict[str, Any]) -> Callable[..., nn.Module]:
        def make(pretrained: bool = False, **kwargs) -> nn.Module:
            own = {key: value for key, value in kwargs.items() if key in signature(network).parameters}
            kwargs["pretrained_filter_fn"] = checkpoint_filter_fn
            # a copy, because timm removes what it has read
            kwargs["feature_cfg"] = {**(feature_cfg or {}), **kwargs.get("feature_cfg", {})}
            model = _create(network, name, pretrained, **{**defaults, **kwargs})
            # as timm's factory does: without it what was saved would load as the default parametrization
            model._model_args = own  # type: ignore[assignment]
            return model

        # by these two timm knows a model and its module
        make.__name__, make.__module__, make.__qualname__ = name, module, name
        return make

    for architecture, arguments in architectures.items():
        for conv in convs:
            make = entry_point(f"{architecture}_{conv}", {**arguments, "conv": conv})
            make.__doc__ = f"timm's {architecture} with {conv} convolutions; arguments of `{network.__name__}`."
            setattr(sys.modules[module], make.__name__, register_model(make))
