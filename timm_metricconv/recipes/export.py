"""Export of a network: ONNX, `torch.export` or an AOTInductor package, compared with the network before it is kept."""

import copy
import os
import shutil
import time
import timeit
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Dict, List, Literal, Optional, Tuple

import torch
from pydantic import NonNegativeFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.export import Dim

from .config import ConfigError, Settings, option
from .network import adaptive_layers, check_images, create_model, load_checkpoint

# torch's exporter writes nothing older than 18; its conversion to older op sets fails on these networks and keeps 18.
# DeformConv came with 19.
MIN_OPSET, MIN_OPSET_DEFORM = 18, 19
# The backend in a program that is not portable: ONNX has torchvision's operator, and torch finds ours in this package.
FAST = {"onnx": "torchvision", "export": "compiled", "aoti": "compiled"}
SUFFIX = {"onnx": ".onnx", "export": ".pt2", "aoti": ".pt2"}


@dataclass
class ExportConfig(Settings):
    """An export."""

    model: str = option("resnet18_metric", "any timm model name, hf-hub: or local-dir:")
    model_args: Dict[str, Any] = option({}, "arguments of the model: num_classes, stem, conv_cfg, ...")
    pretrained: Optional[bool] = option(None, "load the model's weights; by default those of hf-hub: and local-dir:")
    checkpoint: Optional[str] = option(None, "load this .safetensors file")
    format: Literal["onnx", "export", "aoti"] = option("onnx", "onnx, export (torch.export) or aoti (AOTInductor)")
    output: Optional[str] = option(None, "file to write; by default <model>.onnx or <model>.pt2")
    image_size: Optional[PositiveInt] = option(None, "height and width of the example; by default the model's own")
    dynamic: bool = option(True, "batch and image size may change afterwards")
    half: bool = option(False, "float16 weights and images; positions stay float32")
    portable: Optional[bool] = option(None, "ordinary operators alone; by default false for onnx, which has DeformConv")
    opset: int = option(20, "ONNX operator set, 19 or later (18 where portable)")
    tolerance: NonNegativeFloat = option(1e-4, "largest difference from the network, relative to its largest output")
    time: bool = option(False, "print what one image takes, and what it takes the network")

    @property
    def path(self) -> Path:
        """Where the export goes."""
        return Path(self.output or self.model.rstrip("/").split(":")[-1].split("/")[-1] + SUFFIX[self.format])

    @property
    def backend(self) -> str:
        """The backend of `ops.ball_conv2d` that the program is made with."""
        portable = self.format != "onnx" if self.portable is None else self.portable
        return "reference" if portable else FAST[self.format]


def _images(model: nn.Module, config: ExportConfig) -> List[Tensor]:
    """The example, and what the result is tried on as well: another batch and, where it may change, another size."""
    channels, height, width = model.pretrained_cfg["input_size"]
    if config.image_size:
        height = width = config.image_size
    if config.dynamic:
        # equal lengths would be taken for one length
        sizes = [(2, height, width + 32), (3, height + 9, width + 16), (1, height, width)]
    else:
        sizes = [(1, height, width)]
    dtype = torch.half if config.half else torch.float32
    return [torch.randn(batch, channels, *size, dtype=dtype) for batch, *size in sizes]


def _with_backend(model: nn.Module, backend: str) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in adaptive_layers(model):
        layer.backend = backend
    return model


def _dynamic_shapes(dynamic: bool) -> Optional[Tuple[Dict[int, Any]]]:
    return ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},) if dynamic else None


def _to_onnx(model: nn.Module, example: Tensor, path: Path, config: ExportConfig) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise ConfigError(f'format: "onnx" needs {error.name}: pip install "timm_metricconv[export]".') from None
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        verbose=False,
        opset_version=config.opset,
        input_names=["image"],
        output_names=["output"],
        dynamic_shapes=({0: "batch", 2: "height", 3: "width"},) if config.dynamic else None,
    )
    written = program.model.opset_imports[""]
    if written != config.opset:
        raise ConfigError(f"opset={config.opset}: only {written} could be written; give --opset {written}.")
    program.save(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for every status
        hint = "" if config.portable else " It has DeformConv from 1.25 on; --portable true does without."
        version = onnxruntime.__version__
        raise ConfigError(f"opset={config.opset}: onnxruntime {version} cannot read it: {error}.{hint}") from error
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def _to_export(model: nn.Module, example: Tensor, path: Path, config: ExportConfig) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(model, (example,), dynamic_shapes=_dynamic_shapes(config.dynamic))
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _to_aoti(model: nn.Module, example: Tensor, path: Path, config: ExportConfig) -> Callable[[Tensor], Tensor]:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(f'format: "aoti" needs a C++ compiler, there is no {compiler!r}; install one or set CXX.')
    program = torch.export.export(model, (example,), dynamic_shapes=_dynamic_shapes(config.dynamic))
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return torch._inductor.aoti_load_package(str(path))


_EXPORTERS = {"onnx": _to_onnx, "export": _to_export, "aoti": _to_aoti}


def _compare(run: Callable[[Tensor], Tensor], model: nn.Module, images: List[Tensor], config: ExportConfig) -> float:
    """The largest relative difference over `images`.

    Raises:
        ConfigError: It is above the tolerance, or the exported program fails.
    """
    # float16 has eleven bits
    tolerance, worst = max(config.tolerance, 1e-2 if config.half else 0.0), 0.0
    hint = "" if not config.dynamic else " --dynamic false exports for one batch and size."
    for image in images:
        expected = model(image).float()
        try:
            result = run(image)
        except Exception as error:  # every runtime has its own
            raise ConfigError(f"format={config.format}: it fails on {list(image.shape)}: {error}.{hint}") from error
        difference = float((result.float() - expected).abs().max() / expected.abs().max().clamp(min=1))
        if not difference <= tolerance:  # NaN as well
            raise ConfigError(
                f"format={config.format}: on {list(image.shape)} it differs from the network by {difference:.1e}, "
                f"more than {tolerance:.0e}; nothing was written.{hint}"
            )
        worst = max(worst, difference)
    return worst


def _milliseconds(run: Callable[[Tensor], Tensor], image: Tensor) -> float:
    """CPU time, the best of ten."""
    return 1000 * min(timeit.repeat(lambda: run(image), timer=time.process_time, repeat=10, number=1))


@torch.no_grad()
def export(config: ExportConfig) -> Path:
    """Exports a network, runs the result, and only then moves it to its place.

    Returns:
        The file.

    Raises:
        ConfigError: The configuration cannot be used, or the exported program does not compute what the network does.
    """
    if config.format == "onnx" and config.opset < (MIN_OPSET if config.portable else MIN_OPSET_DEFORM):
        raise ConfigError(
            f"opset={config.opset}: ONNX has DeformConv from {MIN_OPSET_DEFORM} on, and torch's exporter writes none "
            f"below {MIN_OPSET}; give --opset {MIN_OPSET_DEFORM} or later, or --portable true with {MIN_OPSET}."
        )
    path, suffix = config.path, SUFFIX[config.format]
    if path.suffix != suffix:
        raise ConfigError(f"output: expected a name that ends in {suffix}, got {str(path)!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    pretrained = False if config.checkpoint else config.pretrained
    model = create_model(config.model, config.model_args, pretrained=pretrained).eval()
    if config.checkpoint:
        load_checkpoint(model, config.checkpoint)
    if config.half:
        model.half()
    images = _images(model, config)
    for image in images:
        check_images(model, image, "--dynamic false exports for one size.")
    with TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        program = Path(folder) / path.name  # ONNX names a file beside it for the weights of a large network
        run = _EXPORTERS[config.format](_with_backend(model, config.backend), images[0], program, config)
        difference = _compare(run, model, images, config)
        files = [file.replace(path.with_name(file.name)) for file in Path(folder).iterdir()]
    tried = ", ".join("×".join(map(str, image.shape)) for image in images)
    size = sum(file.stat().st_size for file in files) / 2**20
    print(f"{path}: {size:.1f} MiB, equal to the network within {difference:.1e} on {tried}")
    if config.time:
        taken, eager = (_milliseconds(f, images[-1]) for f in (run, model))
        print(f"{config.format} {taken:.1f} ms, network {eager:.1f} ms of CPU time: {taken / eager:.2f} times")
    return path
