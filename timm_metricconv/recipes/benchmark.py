"""What the convolutions cost, side by side in one run: checked against the reference, then timed in turns."""

import json
import os
import statistics
import tempfile
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Literal, NamedTuple, Optional, Tuple

import timm
import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchvision.ops import deform_conv2d

from ..check import seconds
from ..layers import LAYERS, BallConv2d
from ..models.ball_resnet import FAMILIES
from ..ops import BACKENDS, why_not_on
from .config import ConfigError, Settings, option
from .network import count_activations, count_macs, create_model, randomise_predictors
from .report import console, print_table, update_csv, write_atomic

# Name of a peer → the kind of its layers, and their arguments
OURS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES},
    "metric-geodesic": ("metric", {"ball": "geodesic"}),
}
# (channels, height = width), of ResNet18's stages
LAYER_SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))
# the same of ConvNeXt-T's 7×7 depthwise convolutions
DEPTHWISE_SHAPES = ((96, 56), (192, 28), (384, 14), (768, 7))
MODEL_SHAPES = (("imagenet", (4, 3, 224, 224)), ("cifar", (32, 3, 32, 32)))


@dataclass
class BenchmarkConfig(Settings):
    """A benchmark."""

    device: Literal["cpu", "cuda"] = option("cpu", "cpu or cuda")
    what: Literal["layer", "depthwise", "model", "all"] = option("layer", "layer, depthwise, model, or all three")
    output: Optional[str] = option(None, "JSON file for the records")
    csv: Optional[str] = option(
        None, "folder for benchmark-*.csv: -infer and -train of networks as timm has them, and ratios to nn.Conv2d"
    )
    batch: PositiveInt = option(8, "images in a layer's batch")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "of weights and images; positions are float32")
    repeats: PositiveInt = option(15, "timed repetitions of every peer, in turns")
    stride: List[int] = option([1, 2], "strides of the layers")
    models: List[str] = option(["resnet18", "resnet50"], "networks")
    backends: List[str] = option([], "backends by name; by default all that can run, the reference left out of models")
    compile: bool = option(False, "torch.compile every peer")


class Peer(NamedTuple):
    """A contestant.

    Attributes:
        name: "conv2d", "torchvision_deform", "deformops", or a key of `OURS`.
        backend: Of `ops.ball_conv2d`; the library's name for the others.
        module: What is timed.
    """

    name: str
    backend: str
    module: nn.Module


Peers = Iterator[Peer]


class DeformPeer(nn.Module):
    """The deformable layer as its users write it: a predictor and a library's `deform_conv2d`."""

    def __init__(self, layer: BallConv2d, function: Callable[..., Tensor]):
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C_in, H, W]` → `[B, C_out, H_out, W_out]`."""
        layer = self.layer
        # torchvision has no kernel of half precision for CPUs
        dtype = torch.float32 if x.device.type == "cpu" else x.dtype
        tensors = (tensor.to(dtype) for tensor in (x, layer.predictor(x), layer.weight, layer.bias))
        return self.function(*tensors, layer.stride, layer.padding, layer.dilation).to(x.dtype)


def _backends(config: BenchmarkConfig, reference: bool) -> List[str]:
    unknown = [name for name in config.backends if name not in BACKENDS]
    if unknown:
        raise ConfigError(f"backends: expected some of {', '.join(BACKENDS)}; got {unknown}.")
    for name in config.backends:
        reason = why_not_on(config.device, name)
        if reason:
            raise ConfigError(f"backends: {name!r} cannot run on device={config.device!r}: {reason}.")
    names = config.backends or [name for name in BACKENDS if reference or name != "reference"]
    return [name for name in names if why_not_on(config.device, name) is None]


def _layer_peers(
    config: BenchmarkConfig, backends: List[str], channels: int, geometry: Dict[str, int], conv_cfg: Dict[str, Any]
) -> Peers:
    conv = nn.Conv2d(channels, channels, **geometry)
    yield Peer("conv2d", "torch", conv)
    deform = randomise_predictors(LAYERS["deform"].from_conv(conv, **conv_cfg))
    yield Peer("torchvision_deform", "torchvision", DeformPeer(deform, deform_conv2d))
    if config.device == "cuda" and find_spec("deformops"):
        function = import_module("deformops.integrations.torchvision").deform_conv2d
        yield Peer("deformops", "deformops", DeformPeer(deform, function))
    for name, (kind, own) in OURS.items():
        for backend in backends:
            layer = LAYERS[kind].from_conv(conv, backend=backend, **conv_cfg, **own)
            yield Peer(name, backend, randomise_predictors(layer))


def _model_peers(config: BenchmarkConfig, model: str, stem: str, backends: List[str]) -> Peers:
    yield Peer("conv2d", "torch", create_model(f"{model}_metric", {"stem": stem, "stages": []}))
    network = create_model(f"{model}_deform", {"stem": stem, "conv_cfg": {"backend": "torchvision"}})
    yield Peer("torchvision_deform", "torchvision", randomise_predictors(network))
    for name, (kind, conv_cfg) in OURS.items():
        for backend in backends:
            if (name, backend) != ("deform", "torchvision"):
                arguments = {"stem": stem, "conv_cfg": {"backend": backend, **conv_cfg}}
                network = create_model(f"{model}_{kind}", arguments)
                yield Peer(name, backend, randomise_predictors(network))


def _gradients(module: nn.Module, x: Tensor) -> List[Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    cotangent = torch.linspace(-1, 1, out.numel(), device=x.device).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [x, *module.parameters()], cotangent)]


def check_against_reference(peer: Peer, x: Tensor) -> None:
    """Compares a layer's output and gradients with the reference backend's.

    Raises:
        RuntimeError: They differ by more than the dtype explains; such a backend must not be timed.
    """
    layer = peer.module.layer if isinstance(peer.module, DeformPeer) else peer.module
    if not isinstance(layer, BallConv2d):
        return
    backend, layer.backend = layer.backend, "reference"
    expected = _gradients(layer, x)
    layer.backend = backend
    # a few samples that rounding puts on the other side of a pixel have another derivative
    tolerance = 5e-3 if x.dtype == torch.float32 else 5e-2
    for value, truth in zip(_gradients(peer.module, x), expected, strict=True):
        error = float((value.float() - truth.float()).norm() / truth.float().norm().clamp(min=1e-12))
        if not error < tolerance:
            raise RuntimeError(f"{peer.name} with backend {peer.backend!r} is off the reference by {error:.1e}.")


def _step(peer: Peer, x: Tensor, direction: str) -> Callable[[], None]:
    module = peer.module
    if direction == "forward":

        def forward() -> None:
            with torch.no_grad():
                module(x)

        return forward

    inputs = x.clone().requires_grad_()

    def forward_backward() -> None:
        out = module(inputs)
        out.backward(torch.ones_like(out))
        inputs.grad = None
        for parameter in module.parameters():
            parameter.grad = None

    return forward_backward


def _peak_mb(step: Callable[[], None], device: str) -> float:
    """Memory that a step allocates on top of weights and input, at its highest, in MB."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_bytes())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    total = peak = 0
    for _, change in changes:
        total += change
        peak = max(peak, total)
    return peak / 1e6


def _time(config: BenchmarkConfig, what: str, shape: str, x: Tensor, peers: List[Peer]) -> List[Dict[str, Any]]:
    records = []
    for direction in ("forward", "forward_backward"):
        for peer in peers:
            peer.module.train(direction == "forward_backward")
        steps = {peer[:2]: _step(peer, x, direction) for peer in peers}
        for step in steps.values():
            step()
            step()
        times: Dict[Tuple[str, str], List[float]] = {key: [] for key in steps}
        for _ in range(config.repeats):
            for key, step in steps.items():
                times[key].append(seconds(step, config.device))
        median = {key: statistics.median(values) for key, values in times.items()}
        for key, step in steps.items():
            quartiles = statistics.quantiles(times[key], n=4) if config.repeats > 1 else [median[key]] * 3
            records.append(
                {
                    "what": what,
                    "peer": key[0],
                    "backend": key[1],
                    "shape": shape,
                    "dtype": config.dtype,
                    "direction": direction,
                    "median_ms": median[key] * 1e3,
                    "spread_ms": (quartiles[2] - quartiles[0]) * 1e3,
                    "ratio_to_conv": median[key] / median["conv2d", "torch"],
                    "ratio_to_torchvision_deform": median[key] / median["torchvision_deform", "torchvision"],
                    "peak_mb": _peak_mb(step, config.device),
                }
            )
    return records


def _ready(peers: Peers, config: BenchmarkConfig) -> List[Peer]:
    moved = {"device": config.device, "dtype": getattr(torch, config.dtype), "memory_format": torch.channels_last}
    return [peer._replace(module=peer.module.to(**moved)) for peer in peers]


def _cases(config: BenchmarkConfig) -> Iterator[Tuple[str, str, Tuple[int, ...], Callable[[], Peers]]]:
    if config.what in ("layer", "all"):
        backends = _backends(config, reference=True)
        for channels, size in LAYER_SHAPES:
            for stride in config.stride:
                shape = (config.batch, channels, size, size)
                label = f"{config.batch}x{channels}x{size}x{size} stride {stride}"
                dense = {"kernel_size": 3, "stride": stride, "padding": 1}
                yield "layer", label, shape, partial(_layer_peers, config, backends, channels, dense, {})
    if config.what in ("depthwise", "all"):
        backends = _backends(config, reference=False)
        for channels, size in DEPTHWISE_SHAPES:
            shape = (config.batch, channels, size, size)
            label = f"7x7 depthwise {'x'.join(map(str, shape))}"
            depthwise = {"kernel_size": 7, "padding": 3, "groups": channels}
            conv_cfg = {"metric_groups": channels // 16, "separable_predictor": True}
            yield "depthwise", label, shape, partial(_layer_peers, config, backends, channels, depthwise, conv_cfg)
    if config.what in ("model", "all"):
        backends = _backends(config, reference=False)
        for model in config.models:
            for stem, shape in MODEL_SHAPES:
                label = f"{model} {'x'.join(map(str, shape))}"
                yield "model", label, shape, partial(_model_peers, config, model, stem, backends)


def _row(record: Dict[str, Any], device: str) -> Dict[str, Any]:
    """What a table for people has room for. A CPU's milliseconds say nothing about another's; ratios do."""
    time = {"ms": round(record["median_ms"], 3)} if device == "cuda" else {}
    return {
        "shape": record["shape"],
        "pass": {"forward": "fwd", "forward_backward": "fwd+bwd"}[record["direction"]],
        "peer": record["peer"],
        "backend": record["backend"],
        **time,
        "÷ conv": round(record["ratio_to_conv"], 2),
        "÷ tv deform": round(record["ratio_to_torchvision_deform"], 3),
        "IQR %": round(100 * record["spread_ms"] / record["median_ms"], 1),
        "peak MB": round(record["peak_mb"], 1),
    }


def _csv_name(config: BenchmarkConfig, kind: str) -> str:
    """Like timm's: benchmark-infer-fp32-nhwc-pt2141-cpu-2threads.csv."""
    dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[config.dtype]
    version = torch.__version__.partition("+")[0].replace(".", "")
    device = f"cpu-{torch.get_num_threads()}threads"
    if config.device == "cuda":
        device = torch.cuda.get_device_name().lower().replace(" ", "_")
    return f"benchmark-{kind}-{dtype}-nhwc-pt{version}-{device}{'-dynamo' if config.compile else ''}.csv"


def write_timm_csv(config: BenchmarkConfig, records: List[Dict[str, Any]]) -> None:
    """The networks' records as rows of timm's two files, each with the backend that is preferred here."""
    preferred, (batch, _, size, _) = _backends(config, reference=False)[0], dict(MODEL_SHAPES)["imagenet"]
    for kind, direction in (("infer", "forward"), ("train", "forward_backward")):
        rows = []
        for model in config.models:
            for peer in ("conv2d", *OURS):
                backend = "torch" if peer == "conv2d" else preferred
                key = {"shape": f"{model} {batch}x3x{size}x{size}", "peer": peer, "backend": backend}
                found = [r for r in records if {**r, **key} == r and r["direction"] == direction]
                name = model if peer == "conv2d" else f"{model}_{peer}"
                if not found or not timm.is_model(name):  # geodesic balls have no name of their own
                    continue
                network, ms = create_model(name, {}), found[0]["median_ms"]
                row = {
                    "model": name,
                    f"{kind}_samples_per_sec": f"{batch / ms * 1e3:.2f}",
                    f"{kind}_step_time": f"{ms:.3f}",
                    f"{kind}_batch_size": batch,
                    f"{kind}_img_size": size,
                    "param_count": f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f}",
                }
                if kind == "infer":
                    row["infer_gmacs"] = f"{count_macs(network, size):.2f}"
                    row["infer_macts"] = f"{count_activations(network, size):.2f}"
                rows.append(row)
        if rows:
            path = Path(config.csv or ".") / _csv_name(config, kind)
            update_csv(path, rows, ["model", f"{kind}_img_size"], f"{kind}_samples_per_sec")


def write_ratios_csv(config: BenchmarkConfig, records: List[Dict[str, Any]]) -> None:
    """A file for layers, depthwise layers and networks each, with a row for each shape.

    Of each peer, with the backend that is preferred here, `<peer>.forward` and `<peer>.forward_backward` are times
    as multiples of `nn.Conv2d`'s, and `<peer>.mb` is the memory of a forward and backward pass.
    """
    preferred = _backends(config, reference=False)[0]
    for what in ("layer", "depthwise", "model"):
        rows: Dict[str, Dict[str, Any]] = {}
        for record in records:
            if record["what"] == what and (record["backend"] == preferred or record["peer"] not in OURS):
                row, peer = rows.setdefault(record["shape"], {"shape": record["shape"]}), record["peer"]
                row[f"{peer}.{record['direction']}"] = f"{record['ratio_to_conv']:.3f}"
                row[f"{peer}.mb"] = f"{record['peak_mb']:.1f}"  # the backward pass comes last
        if rows:
            path = Path(config.csv or ".") / _csv_name(config, what)
            update_csv(path, list(rows.values()), ["shape"])


def benchmark(config: BenchmarkConfig) -> List[Dict[str, Any]]:
    """Times every peer and prints a table.

    Returns:
        Records with the keys what, peer, backend, shape, dtype, direction, median_ms, spread_ms, ratio_to_conv,
        ratio_to_torchvision_deform, peak_mb; also written to `config.output` as JSON.

    Raises:
        ConfigError: The device or a backend is not there.
        RuntimeError: A backend does not agree with the reference.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would talk into the progress bar
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda': torch sees no GPU here; `python -m timm_metricconv` says what it sees.")
    known = [name.removesuffix("_shifted") for name in timm.list_models("*_shifted")]
    if not set(config.models) <= set(known):
        raise ConfigError(f"models: expected some of {', '.join(known)}; got {config.models}.")
    records: List[Dict[str, Any]] = []
    for number, (what, label, shape, peers) in enumerate(cases := list(_cases(config)), 1):
        console.print(f"[{number:>3}/{len(cases)}] {what} {label}", highlight=False)
        torch.manual_seed(0)
        x = torch.randn(shape, device=config.device, dtype=getattr(torch, config.dtype))
        x = x.contiguous(memory_format=torch.channels_last)
        ready = _ready(peers(), config)
        if what != "model":
            for peer in ready:
                check_against_reference(peer, x[:1])
        if config.compile:
            ready = [peer._replace(module=torch.compile(peer.module)) for peer in ready]
        records += _time(config, what, label, x, ready)
        if config.output:
            write_atomic(config.output, json.dumps(records, indent=2) + "\n")
    rows = [_row(record, config.device) for record in records]
    threads = f"{torch.get_num_threads()} threads" if config.device == "cpu" else torch.cuda.get_device_name()
    print_table(rows, f"{config.device} ({threads}), {config.dtype}, torch {torch.__version__}")
    if config.csv:
        write_timm_csv(config, records)
        write_ratios_csv(config, records)
    return records
