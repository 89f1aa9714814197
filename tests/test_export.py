"""torch.compile, torch.export, ONNX and AOTInductor: one program for every batch and image size, equal to eager."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("pydantic", reason="needs the extra [recipes]")

from timm_metricconv import LAYERS, BallConv2d, DeformConv2d, MetricConv2d
from timm_metricconv.recipes.config import ConfigError
from timm_metricconv.recipes.export import _EXPORTERS, ExportConfig, _to_aoti, export

pytestmark = pytest.mark.slow
FAMILIES = ("metric", "deform", "shifted")
# A ResNet that a compiler is done with soon; no norm starts at zero, which would hide what precedes it.
SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stages": [2], "num_classes": 4, "zero_init_last": False}
SIZES = ((2, 3, 48, 64), (3, 3, 48, 64), (2, 3, 72, 56), (4, 3, 56, 83))


def bend(module: nn.Module, std: float = 0.05) -> nn.Module:
    """Predictors (and an active convolution's offsets) start at zero; with these weights every sample moves."""
    for layer in module.modules():
        if isinstance(layer, BallConv2d):
            head = layer.predictor_head()
            for parameter in (None if head is None else head.weight, getattr(layer, "offset", None)):
                if parameter is not None:
                    nn.init.normal_(parameter, std=std)
    return module


def small_network(conv: str) -> nn.Module:
    family, _, ball = conv.partition("-")
    conv_cfg = {"ball": ball, "steps": 2} if ball else {}
    return bend(timm.create_model(f"resnet18_{family}", conv_cfg=conv_cfg, **SMALL))


@pytest.fixture(autouse=True)
def forget_compilations():
    torch._dynamo.reset()


@pytest.mark.parametrize("conv", FAMILIES)
def test_a_layer_compiles_once_for_all_sizes(conv):
    layer = bend(LAYERS[conv](3, 4, 3, stride=2))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in SIZES:
            x = torch.randn(size, requires_grad=True)
            y = x.detach().clone().requires_grad_()
            expected, result = layer(x), compiled(y)
            torch.testing.assert_close(result, expected)
            cotangent = torch.randn_like(expected)
            parameters = list(layer.parameters())
            for a, b in zip(
                torch.autograd.grad(result, [y, *parameters], cotangent),
                torch.autograd.grad(expected, [x, *parameters], cotangent),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_network_compiles_once_for_forward_and_once_for_training():
    model = small_network("metric")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in SIZES:
            compiled(torch.randn(size)).sum().backward()
    assert counter.frame_count == 1
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for size in SIZES:
            image = torch.randn(size)
            torch.testing.assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2


@pytest.mark.parametrize("conv", [*FAMILIES, "metric-geodesic"])
def test_torch_export_takes_every_size_with_ordinary_operators(conv):
    model = small_network(conv).eval()
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model, (torch.randn(SIZES[0]),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    )
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    ordinary = ("aten.", "<built-in", "<function sym_float")
    assert targets and all(target.startswith(ordinary) for target in targets)
    for size in (*SIZES, (1, 3, 33, 90)):
        image = torch.randn(size)
        torch.testing.assert_close(program.module()(image), model(image), rtol=1e-4, atol=1e-5)


def test_the_older_exporter_of_onnx_keeps_sizes_free(tmp_path):
    onnxruntime = need_onnx(portable=True)
    geodesic = MetricConv2d(3, 4, 3, stride=2, ball="geodesic")
    model = bend(SideBySide(*[layer(3, 4, 3, stride=2) for layer in LAYERS.values()], geodesic)).eval()
    axes = {"x": {0: "batch", 2: "height", 3: "width"}}
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (torch.randn(SIZES[0]),), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in SIZES:
        image = torch.randn(size)
        result = torch.from_numpy(session.run(None, {"x": image.numpy()})[0])
        torch.testing.assert_close(result, model(image).detach(), rtol=1e-4, atol=1e-4)


@pytest.fixture
def saved(tmp_path):
    """A folder per family, as training leaves it."""

    def save(conv: str) -> str:
        folder = tmp_path / conv
        timm.models.save_for_hf(small_network(conv), str(folder), safe_serialization=True)
        return f"local-dir:{folder}"

    return save


class SideBySide(nn.Module):
    """Layers on one image, their outputs one after another."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], 1)


def need_onnx(portable: bool = False):
    pytest.importorskip("onnxscript", reason="torch's ONNX exporter needs onnxscript")
    # onnxruntime runs DeformConv from 1.25 on
    return pytest.importorskip("onnxruntime", minversion=None if portable else "1.25", reason="ONNX needs onnxruntime")


def count(path, operator: str) -> int:
    import onnx

    return sum(node.op_type == operator for node in onnx.load(str(path)).graph.node)


def test_every_layer_is_one_deform_conv_in_onnx(tmp_path):
    onnxruntime = need_onnx()
    paper = {"parametrization": "spectral_scale", "drift": "sigmoid_norm_detach", "pattern": "onion"}
    kinds = [layer(8, 4, 3, stride=2, backend="torchvision") for layer in LAYERS.values()]
    others = [
        MetricConv2d(8, 4, 3, stride=2, groups=4, metric_groups=2, modulated=True, backend="torchvision", **paper),
        MetricConv2d(8, 4, 5, stride=2, groups=2, metric_groups=4, pattern="polar", backend="torchvision"),
        MetricConv2d(8, 4, 3, stride=2, ball="geodesic", backend="torchvision"),
        DeformConv2d(8, 8, 3, stride=2, dilation=2, groups=8, metric_groups=2, modulated=True, backend="torchvision"),
        DeformConv2d(8, 4, 3, stride=2, bias=False, backend="torchvision"),
    ]
    model = bend(SideBySide(*kinds, *others), std=0.2).eval()  # some samples leave the image
    path = tmp_path / "layers.onnx"
    sizes = ({0: "batch", 2: "height", 3: "width"},)
    torch.onnx.export(
        model, (torch.randn(2, 8, 12, 17),), path, dynamo=True, verbose=False, input_names=["x"], dynamic_shapes=sizes
    )
    assert count(path, "DeformConv") == len(model.layers)
    assert not count(path, "GatherND")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for layer in model.layers:
        layer.backend = "reference"
    for size in ((2, 8, 12, 17), (1, 8, 9, 9), (3, 8, 6, 21)):
        image = torch.randn(size)
        result = torch.from_numpy(session.run(None, {"x": image.numpy()})[0])
        torch.testing.assert_close(result, model(image).detach(), rtol=1e-4, atol=1e-4)


def test_samples_without_a_place_read_zero_in_onnx(tmp_path):
    """NaN, infinite and huge positions: no wild index, and the other samples are not touched."""
    onnxruntime = need_onnx()
    layer = bend(DeformConv2d(3, 4, 3, backend="torchvision")).eval()
    with torch.no_grad():
        layer.predictor.bias[:6] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 3e9])
    path = tmp_path / "layer.onnx"
    image = torch.randn(2, 3, 7, 9)
    torch.onnx.export(layer, (image,), path, dynamo=True, verbose=False, input_names=["x"])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    layer.backend = "reference"
    result = torch.from_numpy(session.run(None, {"x": image.numpy()})[0])
    torch.testing.assert_close(result, layer(image).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("conv", "half", "portable"),
    [
        ("metric", False, False),
        ("metric-geodesic", False, False),
        ("deform", False, False),
        ("shifted", False, False),
        ("metric", True, False),
        ("metric", False, True),
        ("shifted", True, True),
    ],
)
def test_onnx_equals_eager_in_onnxruntime(conv, half, portable, saved, tmp_path):
    onnxruntime = need_onnx(portable)
    path = tmp_path / "model.onnx"
    name = saved(conv)
    opset = 18 if portable else 20
    export(ExportConfig(model=name, output=str(path), image_size=48, half=half, portable=portable, opset=opset))
    model = timm.create_model(name, pretrained=True).eval()
    assert count(path, "DeformConv") == (0 if portable else sum(isinstance(m, BallConv2d) for m in model.modules()))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    for size in ((1, 3, 48, 48), (5, 3, 65, 40)):
        image = torch.randn(size)
        given = image.half() if half else image
        result = torch.from_numpy(session.run(None, {"image": given.numpy()})[0])
        assert result.dtype == given.dtype
        tolerance = 1e-2 if half else 1e-4
        torch.testing.assert_close(result.float(), model(image).detach(), rtol=tolerance, atol=tolerance)


def test_timmx_exports_our_names(tmp_path):
    timmx = pytest.importorskip("timmx", reason="needs timmx")
    import timm_metricconv  # noqa: F401  timmx asks timm, which has to know our names

    need_onnx(portable=True)
    for format, options in (("onnx", {"slim": False}), ("torch-export", {})):
        # it runs the program and compares it with the network
        path = timmx.export_model(format, "test_resnet_metric", output=str(tmp_path / format), **options)
        assert path.stat().st_size > 0


def test_export_program_runs_without_this_package(saved, tmp_path):
    path, name = tmp_path / "model.pt2", saved("metric")
    export(ExportConfig(model=name, format="export", output=str(path), image_size=48))
    image = torch.randn(3, 3, 50, 61)
    torch.save(image, tmp_path / "image.pt")
    code = (
        "import sys, torch; program = torch.export.load(sys.argv[1]).module();"
        "torch.save(program(torch.load(sys.argv[2])).detach(), sys.argv[3]);"
        "assert 'timm' not in sys.modules and 'timm_metricconv' not in sys.modules"
    )
    in_new_process(code, path, tmp_path / "image.pt", tmp_path / "result.pt")
    expected = timm.create_model(name, pretrained=True).eval()(image)
    torch.testing.assert_close(torch.load(tmp_path / "result.pt"), expected, rtol=1e-4, atol=1e-5)


def in_new_process(code: str, *arguments) -> None:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_aoti_package_runs_in_a_fresh_process(backend, tmp_path):
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    # one layer: the C++ compiler takes its time for every one
    layer = bend(LAYERS["metric"](3, 4, 3, stride=2, backend=backend)).eval()
    model = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        _to_aoti(model, torch.randn(2, 3, 48, 64), tmp_path / "model.pt2", ExportConfig())
    images = [torch.randn(size) for size in ((1, 3, 48, 48), (3, 3, 51, 70))]
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch; run = torch._inductor.aoti_load_package(sys.argv[1]);"
        "torch.save([run(image) for image in torch.load(sys.argv[2])], sys.argv[3]);"
        "assert 'timm' not in sys.modules and 'timm_metricconv' not in sys.modules"
    )
    if backend == "compiled":  # an operator of this package
        code = f"import timm_metricconv;{code.partition('assert')[0]}"
    in_new_process(code, tmp_path / "model.pt2", tmp_path / "images.pt", tmp_path / "result.pt")
    for image, result in zip(images, torch.load(tmp_path / "result.pt"), strict=True):
        torch.testing.assert_close(result, model(image), rtol=1e-4, atol=1e-5)


def test_the_fast_operator_stays_in_a_program_that_is_not_portable(saved, tmp_path, capsys):
    path, name = tmp_path / "model.pt2", saved("metric")
    export(ExportConfig(model=name, format="export", output=str(path), image_size=48, portable=False, time=True))
    assert re.search(r"^export [\d.]+ ms, network [\d.]+ ms .*times$", capsys.readouterr().out, re.MULTILINE)
    program = torch.export.load(path)
    fast = [node for node in program.graph.nodes if str(node.target) == "timm_metricconv.compiled_conv2d.default"]
    model = timm.create_model(name, pretrained=True).eval()
    assert len(fast) == sum(isinstance(m, BallConv2d) for m in model.modules())
    image = torch.randn(3, 3, 50, 61)
    torch.testing.assert_close(program.module()(image), model(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"opset": 16}, "opset=16.*18"),
        ({"opset": 18}, "opset=18.*19.*portable"),
        ({"model": "resnet18_metrik"}, "Unknown model"),
        ({"model_args": {"conv_cfg": {"drift": "wind"}}}, "drift='wind'"),
        ({"checkpoint": "nowhere.safetensors"}, "no file"),
        ({"model": "vit_tiny_patch16_224"}, "1×3×224×256|2×3×224×256.*--dynamic false"),
        ({"output": "model.pth"}, "ends in .onnx"),
        ({"format": "aoti", "output": "model.pt2"}, "C\\+\\+ compiler"),
    ],
)
def test_export_refuses_what_cannot_work(changes, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    settings = {"model": "test_resnet_metric", "output": "model.onnx", **changes}
    with pytest.raises(ConfigError, match=says):
        export(ExportConfig(**settings))
    assert not list(tmp_path.iterdir())


def test_a_program_that_differs_is_not_kept(tmp_path, monkeypatch):
    def wrong(model, example, path, config):
        path.write_bytes(b"a wrong program")
        return lambda image: model(image) + 1

    monkeypatch.setitem(_EXPORTERS, "onnx", wrong)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"an older export")
    with pytest.raises(ConfigError, match="differs from the network"):
        export(ExportConfig(model="test_resnet_metric", output=str(path), image_size=48))
    assert path.read_bytes() == b"an older export"
    assert [f.name for f in tmp_path.iterdir()] == ["model.onnx"]


def test_a_large_network_keeps_the_file_of_its_weights(tmp_path, monkeypatch):
    """torch writes it beside the network, which names it; here any network is large."""
    onnxruntime = need_onnx(portable=True)
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    path = tmp_path / "out" / "model.onnx"
    export(ExportConfig(model="test_resnet", output=str(path), image_size=48, dynamic=False))
    assert sorted(f.name for f in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_outputs()
