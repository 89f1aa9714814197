"""timm's ResNets with the 3×3 convolutions of some stages replaced: the registered models.

The module is not called `resnet.py` because timm keys modules by their last name.
"""

from dataclasses import replace
from typing import Any, Dict, List, Optional, Sequence

import torch
from huggingface_hub import constants
from timm.models import register_model, resnet
from timm.models._builder import build_model_with_cfg, resolve_pretrained_cfg
from timm.models._pretrained import DefaultCfg
from torch import nn

from ..layers import BallConv2d
from .checkpoints import checkpoint_filter_fn
from .convert import convert

# The arguments that give the paper's network, for all three families.
PAPER: Dict[str, Any] = {
    "layout": "paper",
    "conv_cfg": {
        "parametrization": "spectral_scale",
        "drift": "sigmoid_norm_detach",
        "pattern": "onion",
        "eps_omega": 0.5,
        "scale": (0.1, 1.5),
        "init": "paper",
    },
}

# What `conv_cfg` may hold that only metric layers take: one `conv_cfg` serves all families.
METRIC_ONLY = ("parametrization", "drift", "pattern", "eps_omega", "scale", "ball", "steps")


class BallResNet(resnet.ResNet):
    """A timm ResNet whose k×k convolutions in `stages` are metric, deformable or shifted.

    Args:
        *args: Of `timm.models.resnet.ResNet`.
        conv: Name of the convolution, see `convert`.
        stages: Stages (1 to 4) whose k×k convolutions are replaced; none leaves the standard network.
        conv_cfg: Arguments of the layers. Those of metric layers alone are left out for the other families.
        stem: "imagenet" (timm's own) or "cifar" (3×3, stride 1, no pooling).
        layout: "timm", or "paper" (the last stage keeps its resolution; its first block has dilation 1, the later 2).
        **kwargs: Of `timm.models.resnet.ResNet`.

    Raises:
        ValueError: An argument is out of its range; the message names it.
    """

    def __init__(
        self,
        *args,
        conv: str = "metric",
        stages: Sequence[int] = (2, 3, 4),
        conv_cfg: Optional[Dict[str, Any]] = None,
        stem: str = "imagenet",
        layout: str = "timm",
        **kwargs,
    ):
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem={stem!r}: expected 'imagenet' or 'cifar'.")
        if layout not in ("timm", "paper"):
            raise ValueError(f"layout={layout!r}: expected 'timm' or 'paper'.")
        # 3.0 would name a block
        if isinstance(stages, int) or any(not isinstance(s, int) or s not in (1, 2, 3, 4) for s in stages):
            raise ValueError(f"stages={stages!r}: expected numbers from 1 to 4.")
        if layout == "paper":
            if kwargs.setdefault("output_stride", 16) not in (16, 32):
                raise ValueError(f"output_stride={kwargs['output_stride']}: layout='paper' has its own, 16.")
            kwargs["output_stride"] = 16
        super().__init__(*args, **kwargs)
        self.stem = stem
        if layout == "paper":
            self._undilate_first_block()
        if stem == "cifar":
            self._cifar_stem()
        conv_cfg = dict(conv_cfg or {})
        if conv != "metric":
            conv_cfg = {key: value for key, value in conv_cfg.items() if key not in METRIC_ONLY}
        if stages:
            convert(self, conv, [f"layer{stage}.*" for stage in stages], **conv_cfg)

    def _undilate_first_block(self) -> None:
        """Stride 1 without dilation in the first block of the last stage; timm dilates its second convolution."""
        for module in self.get_submodule("layer4.0").modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
                module.dilation, module.padding = (1, 1), tuple(k // 2 for k in module.kernel_size)

    def _cifar_stem(self) -> None:
        """3×3, stride 1, no pooling: every feature is four times as large."""
        if isinstance(self.conv1, nn.Conv2d):
            old = self.conv1
            device, dtype = old.weight.device, old.weight.dtype
            new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False, device=device, dtype=dtype)
            nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
            self.conv1 = new  # type: ignore[assignment]
        else:
            for module in self.conv1.modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)
        self.maxpool = nn.Identity()  # type: ignore[assignment]
        for info in self.feature_info:
            reduction: Any = info["reduction"]
            info["reduction"] = 1 if info["module"] == "act1" else reduction // 4

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """As timm's, which runs Kaiming over every `nn.Conv2d`, predictors included: those get their own back."""
        super().init_weights(zero_init_last=zero_init_last)
        for module in self.modules():
            if isinstance(module, BallConv2d):
                module.reset_predictor()


def _create_ball_resnet(variant: str, pretrained: bool = False, **kwargs) -> BallResNet:
    try:
        kwargs["pretrained_filter_fn"] = checkpoint_filter_fn
        return build_model_with_cfg(BallResNet, variant, pretrained, **kwargs)
    except Exception as error:
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        # huggingface_hub raises OSErrors, and what the HTTP library below it raises
        download = isinstance(error, OSError) or type(error).__module__.startswith(("http", "requests", "urllib3"))
        if not (pretrained and cfg.hf_hub_id and download):
            raise
        raise RuntimeError(
            f"{variant}: the weights of {cfg.hf_hub_id} could not be fetched from {constants.ENDPOINT} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}). Check the network and HF_ENDPOINT; "
            "HF_HUB_OFFLINE=1 reads the cache alone, pretrained=False starts without weights."
        ) from error


_BLOCKS: Dict[str, Dict[str, Any]] = {
    "resnet18": {"block": resnet.BasicBlock, "layers": (2, 2, 2, 2)},
    "resnet34": {"block": resnet.BasicBlock, "layers": (3, 4, 6, 3)},
    "resnet50": {"block": resnet.Bottleneck, "layers": (3, 4, 6, 3)},
    "resnet101": {"block": resnet.Bottleneck, "layers": (3, 4, 23, 3)},
    "resnet152": {"block": resnet.Bottleneck, "layers": (3, 8, 36, 3)},
    "test_resnet": {
        "block": [resnet.BasicBlock, resnet.BasicBlock, resnet.Bottleneck, resnet.BasicBlock],
        "layers": (1, 1, 1, 1),
        "stem_width": 16,
        "stem_type": "deep",
        "avg_down": True,
        "channels": (32, 48, 48, 96),
    },
}
FAMILIES = ("metric", "deform", "shifted")


def _default_cfg(architecture: str) -> DefaultCfg:
    """timm's own configurations of the standard network, each pointing at that network's Hub repository."""
    theirs = resnet.default_cfgs[architecture]
    cfgs = {
        tag: replace(cfg, url="", hf_hub_id=f"timm/{architecture}.{tag}" if cfg.hf_hub_id == "timm/" else cfg.hf_hub_id)
        for tag, cfg in theirs.cfgs.items()
    }
    return DefaultCfg(tags=theirs.tags.copy(), cfgs=cfgs, is_pretrained=theirs.is_pretrained)


default_cfgs = {f"{name}_{conv}": _default_cfg(name) for name in _BLOCKS for conv in FAMILIES}
__all__: List[str] = ["PAPER", "BallResNet"]


def _register(architecture: str, conv: str) -> None:
    name = f"{architecture}_{conv}"

    def entry_point(pretrained: bool = False, **kwargs) -> BallResNet:
        return _create_ball_resnet(name, pretrained, **{**_BLOCKS[architecture], "conv": conv, **kwargs})

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f"timm's {architecture} with {conv} convolutions; arguments of `BallResNet`."
    globals()[name] = register_model(entry_point)


for _architecture in _BLOCKS:
    for _conv in FAMILIES:
        _register(_architecture, _conv)
