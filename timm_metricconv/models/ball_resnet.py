"""timm's ResNets with the 3×3 convolutions of some stages replaced: the registered models.

The module is not called `resnet.py` because timm keys modules by their last name.
"""

from typing import Any, Dict, List, Optional, Sequence

import torch
from timm.models import resnet
from torch import nn

from ..layers import BallConv2d
from .checkpoints import checkpoint_filter_fn
from .convert import convert
from .registry import layer_arguments, register, stage_numbers, standard_cfgs

# The arguments that give the paper's network, for all three families.
PAPER: Dict[str, Any] = {
    "layout": "paper",
    "conv_cfg": {
        "parametrization": "spectral_scale",
        "drift": "sigmoid_norm_detach",
        "sampling": "rays",
        "pattern": "onion",
        "eps_omega": 0.5,
        "scale": (0.1, 1.5),
        "init": "paper",
    },
}


class BallResNet(resnet.ResNet):
    """A timm ResNet whose k×k convolutions in `stages` are metric, deformable or shifted.

    Args:
        *args: Of `timm.models.resnet.ResNet`.
        conv: Name of the convolution, see `convert`.
        stages: Stages (1 to 4) whose k×k convolutions are replaced; none leaves the standard network.
        conv_cfg: Arguments of the layers. Those that other families alone take are left out.
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
        stages = stage_numbers(stages)
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
        if stages:
            convert(self, conv, [f"layer{stage}.*" for stage in stages], **layer_arguments(conv, conv_cfg))

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
        """As timm's, which runs Kaiming over every `nn.Conv2d`; of an adaptive one over its kernel alone."""
        super().init_weights(zero_init_last=zero_init_last)
        for module in self.modules():
            if isinstance(module, BallConv2d):
                module.reset_parameters()
                if module.init == "identity":
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


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

default_cfgs = standard_cfgs(resnet, _BLOCKS, FAMILIES)
__all__: List[str] = ["PAPER", "BallResNet"]
register(__name__, BallResNet, _BLOCKS, FAMILIES, checkpoint_filter_fn)
