"""timm's ConvNeXts with their 7×7 depthwise convolutions replaced: the registered models."""

from typing import Any, Dict, List, Optional, Sequence

from timm.models import convnext
from torch import Tensor, nn

from . import checkpoints
from .convert import convert
from .registry import layer_arguments, register, stage_numbers, standard_cfgs

# Channels that share a ball, at least: DCNv4 and InternImage have 16 in a group.
GROUP_CHANNELS = 16


def metric_groups(channels: int) -> int:
    """The largest number of equal groups of at least 16 channels: C/16 where that is whole, 2 for the 40 of atto."""
    most = max(1, channels // GROUP_CHANNELS)
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


class BallConvNeXt(convnext.ConvNeXt):
    """A timm ConvNeXt whose depthwise convolutions in `stages` are metric, deformable, ...

    By default each has `metric_groups(channels)` balls, and a separable predictor: it adds less than 5 % to the
    parameters of a metric network, and 60 to 75 % to those of a deformable one.

    Args:
        *args: Of `timm.models.convnext.ConvNeXt`.
        conv: Name of the convolution, see `convert`.
        stages: Stages (1 to 4) whose depthwise convolutions are replaced; none leaves the standard network.
        conv_cfg: Arguments of the layers. Those that other families alone take are left out.
        **kwargs: Of `timm.models.convnext.ConvNeXt`.

    Raises:
        ValueError: An argument is out of its range; the message names it.
    """

    def __init__(
        self,
        *args,
        conv: str = "metric",
        stages: Sequence[int] = (1, 2, 3, 4),
        conv_cfg: Optional[Dict[str, Any]] = None,
        **kwargs,
    ):
        numbers = stage_numbers(stages)
        super().__init__(*args, **kwargs)
        for number in numbers:
            channels: Any = self.feature_info[number - 1]["num_chs"]
            defaults = {"metric_groups": metric_groups(channels), "separable_predictor": True}
            layers = {**defaults, **layer_arguments(conv, conv_cfg)}
            convert(self, conv, f"stages.{number - 1}.blocks.*.conv_dw", **layers)


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """As `checkpoints.checkpoint_filter_fn`, after timm's own filter where the keys are those of the ConvNeXt authors.

    Args:
        state_dict: Of timm's network, of the authors of ConvNeXt (or of what else timm converts), or of this package.
        model: The network to load.

    Returns:
        A complete state dict for `model`.

    Raises:
        RuntimeError: Keys are missing, unknown, or of another shape; nothing is skipped.
    """
    if any(key == "model" or key.startswith(("downsample_layers.", "visual.trunk.")) for key in state_dict):
        try:
            state_dict = convnext.checkpoint_filter_fn(state_dict, model)
        except KeyError as error:
            raise RuntimeError(
                f"The checkpoint does not fit {type(model).__name__}: unknown: {error.args[0]}"
            ) from error
    return checkpoints.checkpoint_filter_fn(state_dict, model)


_SIZES: Dict[str, Dict[str, Any]] = {
    "convnext_atto": {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320), "conv_mlp": True},
    "convnext_femto": {"depths": (2, 2, 6, 2), "dims": (48, 96, 192, 384), "conv_mlp": True},
    "convnext_pico": {"depths": (2, 2, 6, 2), "dims": (64, 128, 256, 512), "conv_mlp": True},
    "convnext_nano": {"depths": (2, 2, 8, 2), "dims": (80, 160, 320, 640), "conv_mlp": True},
    "convnext_tiny": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)},
    "convnext_small": {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)},
    "convnext_base": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
    "test_convnext": {"depths": (1, 2, 4, 2), "dims": (24, 32, 48, 64), "norm_eps": 1e-5, "act_layer": "gelu_tanh"},
}
FAMILIES = ("metric", "deform")
FEATURES = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}  # as timm's ConvNeXt

default_cfgs = standard_cfgs(convnext, _SIZES, FAMILIES)
__all__: List[str] = ["BallConvNeXt"]
register(__name__, BallConvNeXt, _SIZES, FAMILIES, checkpoint_filter_fn, FEATURES)
