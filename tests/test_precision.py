"""Mixed precision, two processes, sharding, checkpointing, EMA and large images."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.utils import ModelEmaV3
from torch import nn

from timm_metricconv import LAYERS, BallConv2d, MetricConv2d
from timm_metricconv.ops import place

ROOT = Path(__file__).parent.parent
NETWORKS = ["test_resnet_metric", "test_resnet_deform", "test_resnet_shifted"]


def bend(model, size=0.05):
    """Predictors that say something."""
    for module in model.modules():
        if isinstance(module, BallConv2d) and module.predictor is not None:
            nn.init.normal_(module.predictor.weight, 0, size)
    return model


def network(name="test_resnet_metric", **arguments):
    torch.manual_seed(0)
    return bend(timm.create_model(name, num_classes=4, **arguments))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-12))


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_in_bf16(kind, modulated):
    """Output and gradients come near float32's; positions are float32 and move as far as bf16's predictor does."""
    layer = bend(LAYERS[kind](8, 8, 3, modulated=modulated))
    # An image without jumps: next to one, a rounded predictor may pick another slope.
    x = nn.functional.interpolate(torch.randn(2, 8, 3, 3), size=(12, 12), mode="bilinear").requires_grad_()
    expected = layer(x)
    expected.square().mean().backward()
    exact, exact_x = gradients(layer), x.grad.clone()
    wide = layer.positions(x)
    layer.zero_grad()
    x.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        out, positions = layer(x), layer.positions(x)
    assert out.dtype == torch.bfloat16 and positions.dtype == torch.float32
    assert (positions - wide).abs().max() < 0.02
    out.float().square().mean().backward()
    assert relative(out, expected) < 0.02 and relative(x.grad, exact_x) < 0.05
    rounded = gradients(layer)
    assert rounded.keys() == exact.keys() and all(value.isfinite().all() for value in rounded.values())
    assert relative(rounded["weight"], exact["weight"]) < 0.05


@pytest.mark.parametrize("name", NETWORKS)
def test_network_in_bf16(name):
    model, x, seen = network(name), torch.rand(4, 3, 64, 64), []
    expected = copy.deepcopy(model)(x).detach()
    for module in model.modules():
        if isinstance(module, BallConv2d):
            module.register_forward_hook(lambda m, inputs, out: seen.append((m.positions(inputs[0]).dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert seen and set(seen) == {(torch.float32, torch.bfloat16)}
    assert relative(out, expected) < 0.1
    nn.functional.cross_entropy(out.float(), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_matmul_precision_moves_no_sample():
    """What a position is made of is no matrix product. (The predictor is a convolution: its precision is cuDNN's.)"""
    layer, x = bend(MetricConv2d(8, 8, 3)), torch.randn(2, 8, 9, 9)
    positions, out, before = layer.positions(x), layer(x), torch.get_float32_matmul_precision()
    raw = layer.predict(x)
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(place(layer.samples(raw)), positions)
        assert torch.equal(layer.predict(x), raw) and torch.equal(layer.positions(x), positions)
        torch.testing.assert_close(layer(x), out, rtol=2e-2, atol=2e-2)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_checkpointing(name):
    model, x = network(name), torch.randn(2, 3, 64, 64)
    model(x).square().sum().backward()
    expected = gradients(model)
    model = network(name)
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    for key, value in gradients(model).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_ema(name):
    model = network(name)
    ema = ModelEmaV3(model, decay=0.75)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update(model)
    for key, value in ema.module.named_parameters():
        torch.testing.assert_close(value, start[key] + 0.25)
    x = torch.randn(1, 3, 48, 48)
    assert ema.module.eval()(x).isfinite().all()
    layers = (m for m in ema.module.modules() if isinstance(m, BallConv2d))
    assert all(layer.points.dtype == torch.float32 for layer in layers)


# Two processes. Evaluation mode, because batch norm without SyncBatchNorm (CUDA alone) sees half the batch.

WORLD = 2
BATCH = 4


def _loss(model, x):
    return model(x).square().mean()


def _images():
    return torch.rand(BATCH, 3, 48, 48, generator=torch.Generator().manual_seed(3))


def _expected(steps):
    """Gradients of the joined batch and the weights after `steps` of SGD in one process."""
    model = network().eval()
    optimiser, first = torch.optim.SGD(model.parameters(), lr=0.1), None
    for _ in range(steps):
        optimiser.zero_grad()
        _loss(model, _images()).backward()
        first = first or gradients(model)
        optimiser.step()
    return first, model.state_dict()


def _worker(rank, folder, way):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    model = network().eval()
    if way == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (WORLD,))
        for stage in (model.layer2, model.layer3, model.layer4):
            fully_shard(stage, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimiser, mine = torch.optim.SGD(model.parameters(), lr=0.1), _images().chunk(WORLD)[rank]
    for step in range(2):
        optimiser.zero_grad()
        _loss(model, mine).backward()
        if step == 0:
            first = {name: _whole(p.grad).clone() for name, p in model.named_parameters()}
        optimiser.step()
    state = {name.removeprefix("module."): _whole(value).clone() for name, value in model.state_dict().items()}
    if rank == 0:
        torch.save(({name.removeprefix("module."): value for name, value in first.items()}, state), f"{folder}/result")
    dist.destroy_process_group()


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_equal_one(tmp_path, way):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    if way == "fsdp2" and not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip(f"torch {torch.__version__} has no fully_shard")
    mp.spawn(_worker, (str(tmp_path), way), nprocs=WORLD)
    first, state = torch.load(tmp_path / "result", weights_only=True)
    expected_first, expected_state = _expected(2)
    assert first.keys() == expected_first.keys() and state.keys() == expected_state.keys()
    for key, value in expected_first.items():
        torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    for key, value in expected_state.items():
        torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


# Not getrusage: its peak is inherited from the process that forked this one.
LARGE = """
import re, sys, timm, torch, timm_metricconv
torch.set_num_threads(1)
model = timm.create_model(sys.argv[1]).eval()
x = torch.randn(1, 3, 1024, 1024)
with torch.inference_mode():
    assert model(x).isfinite().all()
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["test_resnet_metric", "resnet18_metric"])
def test_large_image_in_3_gb(name):
    """The peak of the whole process, libraries included."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LARGE, name], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 3.0, f"{float(done.stdout):.2f} GiB"


@pytest.mark.slow
def test_fsdp2_example():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    example = ROOT / "docs" / "fsdp2.py"
    result = subprocess.run([*torchrun, str(example)], capture_output=True, text=True, timeout=600)
    assert "the whole state dict loads into a plain network" in result.stdout, result.stderr
