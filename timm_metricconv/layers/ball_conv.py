"""The convolution that all of the family shares: a ball gives samples, one op takes them."""

import math
from typing import TYPE_CHECKING, List, Optional, Sequence, Tuple, Union, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..geometry import PATTERNS
from ..ops import BACKENDS, Samples, ball_conv2d, place
from ..ops.dispatch import IntPair, int_pair
from ..ops.reference import ball_conv2d_reference, first_centre

INITS = ("identity", "paper")
MODULATIONS = (False, True, "unbounded")


def _choice(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(choices)}.")
    return value


def why_not(conv: nn.Module) -> Optional[str]:
    """Why no layer of the family can stand for a convolution, or None where one can."""
    if type(conv) is not nn.Conv2d:  # standardised weights, TensorFlow's padding: they compute something else
        return f"it is a {type(conv).__name__}, expected an nn.Conv2d"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}, expected 'zeros'"
    if "weight" not in conv._parameters:
        return "weight_norm, spectral_norm or pruning makes its kernel anew at each call"
    if conv.kernel_size[0] != conv.kernel_size[1]:
        return f"kernel_size={conv.kernel_size}, expected a square"
    if conv.padding == "same" and any(d * (conv.kernel_size[0] - 1) % 2 for d in conv.dilation):
        return "padding='same' is uneven where dilation·(k − 1) is odd"
    return None


class BallConv2d(nn.Module):
    """Base of the convolutions that sample a ball around each pixel; a subclass says which one in `samples`.

    The arguments are those of `nn.Conv2d` with a square kernel, and those that every subclass takes:

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: k; the ball is sampled K = k² times.
        stride: Step of the centres.
        padding: Zeros around the input; by default dilation·(k // 2), which keeps the size at stride 1.
        dilation: Of the lattice and of the predictor.
        groups: Of the kernel; the predictor always reads all channels.
        bias: Whether there is one.
        metric_groups: G; the input channels fall into G equal runs, each with a ball of its own.
        modulated: Predict a factor for each sample too. True: 2σ(raw) (DCNv2's masks, doubled so that zero means 1).
            "unbounded": 1 + raw (the dynamic weights of DCNv4, Xiong et al., CVPR 2024: any sign and size, no softmax).
        separable_predictor: The predictor is a depthwise 3×3 convolution and a 1×1, `predictor[0]` and `predictor[1]`,
            with the layer's stride, dilation and centres: lighter than a k×k one by far where k or the number of groups
            is large. It changes nothing where the predictor has no window (active, affine).
        fixed_kernel: The kernel gets no gradient (the paper's FKW); it stays in the state dict.
        init: "identity" (starts as `nn.Conv2d`) or "paper" (every tap 1 / (k²·C_in), the paper's predictor).
        backend: Name of a backend of `ops.ball_conv2d`; by default the fastest that can run.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: An argument is out of its range; the message names it.
    """

    if TYPE_CHECKING:  # nn.Module's attributes are Tensor | Module to a type checker
        weight: nn.Parameter
        bias: Optional[nn.Parameter]
        predictor: Union[nn.Conv2d, nn.Sequential]  # None where nothing is predicted
        points: Tensor

    # Where the points of the ball come from, and how far from its centre a sample can be, in pixels.
    pattern = "lattice"
    max_radius = math.inf

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: Optional[IntPair] = None,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        metric_groups: int = 1,
        modulated: Union[bool, str] = False,
        separable_predictor: bool = False,
        fixed_kernel: bool = False,
        init: str = "identity",
        backend: Optional[str] = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.kernel_size = int_pair("kernel_size", kernel_size, 1)
        k = self.kernel_size[0]
        if k != self.kernel_size[1]:
            raise ValueError(f"kernel_size={kernel_size!r}: a ball has one size, the kernel must be square.")
        counts = {"in_channels": in_channels, "out_channels": out_channels, "groups": groups}
        for name, value in {**counts, "metric_groups": metric_groups}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a positive integer.")
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups}: must divide in_channels={in_channels} and out_channels={out_channels}.")
        if in_channels % metric_groups:
            raise ValueError(f"metric_groups={metric_groups}: must divide in_channels={in_channels}.")
        switches = {"bias": bias, "fixed_kernel": fixed_kernel, "separable_predictor": separable_predictor}
        for name, value in switches.items():
            if not isinstance(value, bool):  # a word such as "no" would mean yes
                raise ValueError(f"{name}={value!r}: expected True or False.")
        if not isinstance(modulated, (bool, str)) or modulated not in MODULATIONS:
            raise ValueError(f"modulated={modulated!r}: expected one of {', '.join(map(repr, MODULATIONS))}.")
        if backend is not None:
            _choice("backend", backend, list(BACKENDS))
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.metric_groups = metric_groups
        self.stride = int_pair("stride", stride, 1)
        self.dilation = int_pair("dilation", dilation, 1)
        same = (self.dilation[0] * (k // 2), self.dilation[1] * (k // 2))
        self.padding = same if padding is None else int_pair("padding", padding, 0)
        self.modulated, self.fixed_kernel, self.backend = modulated, fixed_kernel, backend
        self.separable_predictor = separable_predictor
        # for TorchScript, which knows one type for an attribute
        self._masks, self._unbounded = k * k if modulated else 0, modulated == "unbounded"
        self.init = _choice("init", init, INITS)

        dd = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, k, k, **dd), requires_grad=not fixed_kernel
        )
        self.bias = nn.Parameter(torch.empty(out_channels, **dd)) if bias else None
        channels = metric_groups * (self.predicted + self._masks)
        self.predictor = self._make_predictor(channels, dd) if channels else None  # type: ignore[assignment]
        self._tabulate()
        self.reset_parameters()

    @property
    def predicted(self) -> int:
        """Raw channels of one metric group, without the masks'."""
        raise NotImplementedError

    def _make_predictor(self, channels: int, dd: dict) -> Union[nn.Conv2d, nn.Sequential]:
        c = self.in_channels
        if not self.separable_predictor:
            return nn.Conv2d(c, channels, self.kernel_size, self.stride, self.padding, self.dilation, bias=True, **dd)
        # centred as the kernel: −padding + dilation·(3 − 1)/2 here is −padding + dilation·(k − 1)/2 there
        k, padding = self.kernel_size[0], []
        for pad, dilation in zip(self.padding, self.dilation, strict=True):
            excess = dilation * (k - 3)
            if excess % 2 or 2 * pad < excess:
                raise ValueError(
                    f"separable_predictor=True: no 3×3 window is centred as kernel_size={k} with "
                    f"padding={self.padding}, dilation={self.dilation}; expected dilation·(k − 1) even and padding of "
                    "at least dilation·(k − 3)/2."
                )
            padding.append(pad - excess // 2)
        pads = (padding[0], padding[1])
        depthwise = nn.Conv2d(c, c, 3, self.stride, pads, self.dilation, groups=c, bias=False, **dd)
        return nn.Sequential(depthwise, nn.Conv2d(c, channels, 1, bias=True, **dd))

    def predictor_head(self) -> Optional[nn.Conv2d]:
        """The convolution that gives the raw channels: the predictor, or the 1×1 of a separable one."""
        if isinstance(self.predictor, nn.Sequential):
            return cast(nn.Conv2d, self.predictor[1])
        return self.predictor

    def _tabulate(self) -> None:
        """(Re)makes the pattern's points on the device of the kernel, in float32 at least: never rounded to bf16."""
        points = PATTERNS[self.pattern](self.kernel_size[0], self.dilation)
        self.register_buffer("points", points.to(self.weight.device, self._points_dtype()), persistent=False)

    def _points_dtype(self) -> torch.dtype:
        return torch.promote_types(self.weight.dtype, torch.float32)

    def init_non_persistent_buffers(self) -> None:
        """timm's name for this: transformers calls it on networks that were made without memory, on the meta device."""
        self._tabulate()

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        if (self.points.device, self.points.dtype) != (self.weight.device, self._points_dtype()):
            self._tabulate()  # with assign=True the kernel may be another one, and have come from the meta device

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._tabulate()
        return self

    def reset_parameters(self) -> None:
        """Initialises kernel, bias and predictor as `init` says."""
        fan_in = self.weight[0].numel()
        if self.init == "paper":
            nn.init.constant_(self.weight, 1 / fan_in)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        self.reset_predictor()

    def reset_predictor(self) -> None:
        """Initialises the predictor alone: zero, or the paper's 1e-6, with bias zero.

        That is the 1×1 of a separable one; its depthwise part starts as any `nn.Conv2d`, so that both of them learn.
        """
        head = self.predictor_head()
        if head is not None:
            nn.init.constant_(head.weight, 1e-6 if self.init == "paper" else 0.0)
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]
        if isinstance(self.predictor, nn.Sequential):
            cast(nn.Conv2d, self.predictor[0]).reset_parameters()

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **conv_cfg) -> "BallConv2d":
        """A layer in the place of `conv`: its arguments and, with `init="identity"`, its very parameters.

        Args:
            conv: Square kernel, zero padding.
            **conv_cfg: Arguments of the layer that `nn.Conv2d` does not have.

        Raises:
            ValueError: It computes what no layer here does; the message says why.
        """
        reason = why_not(conv)
        if reason is not None:
            raise ValueError(f"conv: no {cls.__name__} computes what this one does: {reason}.")
        padding = conv.padding
        if isinstance(padding, str):
            spans = zip(conv.dilation, conv.kernel_size, strict=True)
            padding = tuple(d * (k - 1) // 2 if padding == "same" else 0 for d, k in spans)
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            **{"device": conv.weight.device, "dtype": conv.weight.dtype, **conv_cfg},
        )
        if layer.init == "identity":
            layer.weight, layer.bias = conv.weight, conv.bias  # type: ignore[assignment]
            if layer.fixed_kernel:
                layer.weight.requires_grad_(False)
        return layer.train(conv.training)

    def out_size(self, x: Tensor) -> List[int]:
        """(H_out, W_out) for an input."""
        height = x.shape[-2] + 2 * self.padding[0] - self.dilation[0] * (self.kernel_size[0] - 1) - 1
        width = x.shape[-1] + 2 * self.padding[1] - self.dilation[1] * (self.kernel_size[1] - 1) - 1
        return [height // self.stride[0] + 1, width // self.stride[1] + 1]

    def predict(self, x: Tensor) -> Tensor:
        """Raw channels `[B, channels, H_out, W_out]`, in float32 at least."""
        raw = self.predictor(x)
        return raw.to(torch.promote_types(raw.dtype, torch.float32))

    def samples(self, raw: Tensor) -> Union[Tensor, Samples]:
        """Raw channels → positions `[B, G·K, 2, H_out, W_out]`, or the affine maps that give them."""
        raise NotImplementedError

    def density(self, raw: Tensor) -> Optional[Tensor]:
        """Raw channels → the factor of each sample `[B, G·K, H_out, W_out]`, or None where there is none."""
        if self._masks == 0:
            return None
        raw = raw[:, -self.metric_groups * self._masks :]
        return 1 + raw if self._unbounded else 2 * raw.sigmoid()

    @torch.jit.ignore
    def positions(self, x: Tensor) -> Tensor:
        """Where each output pixel reads.

        Args:
            x: Input `[B, C_in, H, W]`, or without B, as what is returned.

        Returns:
            `[B, G·K, 2, H_out, W_out]` as (x, y) in pixels of x, from the centre of the kernel's receptive field.
            float32, also under autocast; float64 in a float64 layer.
        """
        if x.dim() == 3:
            return self.positions(x[None])[0]
        return place(self.samples(self.predict(x)))

    @torch.jit.ignore
    def centres(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """What positions are counted from, in pixels of x: the output's columns `[W_out]` and rows `[H_out]`."""
        (height, width), points = self.out_size(x), self.points
        top, left = first_centre(self.weight, list(self.padding), list(self.dilation))
        columns, rows = (torch.arange(count, dtype=points.dtype, device=points.device) for count in (width, height))
        return left + self.stride[1] * columns, top + self.stride[0] * rows

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C_in, H, W]` → `[B, C_out, H_out, W_out]`; `[C_in, H, W]` → `[C_out, H_out, W_out]`."""
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript must not read the next line
            if isinstance(x, Proxy):  # whatever traces with torch.fx keeps the layer whole
                return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
        return self._of_batch(x[None])[0] if x.dim() == 3 else self._of_batch(x)

    def _of_batch(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"input: expected [B, C_in, H, W] or [C_in, H, W], got {x.shape}.")
        if x.shape[1] != self.in_channels:
            raise ValueError(f"input: expected in_channels={self.in_channels}, got {x.shape[1]} channels.")
        for axis in (0, 1):
            field = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
            if x.shape[2 + axis] + 2 * self.padding[axis] < field:
                raise ValueError(
                    f"input: {x.shape} with padding={self.padding} is smaller than the receptive field {field} of "
                    f"kernel_size={self.kernel_size} with dilation={self.dilation}."
                )
        raw = self.predict(x)
        samples, mask = self.samples(raw), self.density(raw)
        if torch.jit.is_scripting():
            return ball_conv2d_reference(  # TorchScript makes lists of the pairs
                x,
                samples,
                self.weight,
                self.bias,
                mask,
                self.stride,  # type: ignore[arg-type]
                self.padding,  # type: ignore[arg-type]
                self.dilation,  # type: ignore[arg-type]
                self.groups,
            )
        return self._convolve(x, samples, mask)

    @torch.jit.unused
    def _convolve(self, x: Tensor, samples: Union[Tensor, Samples], mask: Optional[Tensor]) -> Tensor:
        return ball_conv2d(
            x,
            samples,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            mask=mask,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        parts += [f"padding={self.padding}"]
        defaults = {"dilation": (1, 1), "groups": 1, "metric_groups": 1, "modulated": False}
        defaults |= {"separable_predictor": False, "fixed_kernel": False}
        parts += [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join(parts + ([] if self.bias is not None else ["bias=False"]))
