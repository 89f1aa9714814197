"""timm entry points, checkpoints and `convert`."""

from .ball_convnext import BallConvNeXt
from .ball_resnet import PAPER, BallResNet
from .checkpoints import checkpoint_filter_fn
from .convert import convert

__all__ = ["PAPER", "BallConvNeXt", "BallResNet", "checkpoint_filter_fn", "convert"]
