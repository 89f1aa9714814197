"""Layers computed by the authors' code at batch size 1: geometry, output and gradients."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from timm_metricconv import MetricConv2d
from timm_metricconv.ops import BACKENDS, why_not_on

FILE = Path(__file__).parent / "data" / "metric_layers.safetensors"
TENSORS = load_file(FILE)
NAMES = sorted({key.split("/")[0] for key in TENSORS})
NAME = re.compile(r"(?P<parametrization>\w+)-(?P<drift>\w+)-(?P<pattern>\w+)-k(\d+)-s(\d+)-d(\d+)-e([\d.]+)-b([01])")


def test_all_golden_layers_are_read():
    assert len(NAMES) == 4 and all(NAME.fullmatch(name) for name in NAMES)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if why_not_on("cpu", name) is None])
@pytest.mark.parametrize("name", NAMES)
def test_authors_layer(name, backend):
    golden = {key.split("/")[1]: value for key, value in TENSORS.items() if key.startswith(f"{name}/")}
    match = NAME.fullmatch(name)
    kernel_size, stride, dilation, eps_omega, bias = match.groups()[3:]
    weight, x = golden["weight"], golden["x"].clone().requires_grad_()
    layer = MetricConv2d(
        weight.shape[1],
        weight.shape[0],
        int(kernel_size),
        int(stride),
        dilation=int(dilation),
        bias=bias == "1",
        eps_omega=float(eps_omega),
        scale=(0.1, 1.5),
        sampling="rays",
        backend=backend,
        **match.groupdict(),
    )
    parameters = {key: value for key, value in golden.items() if key in layer.state_dict()}
    layer.load_state_dict(parameters)
    m, omega = layer.metric(x)
    out = layer(x)
    (out * golden["cotangent"]).sum().backward()
    results = {
        "M": m.flatten(1, 2),
        "omega": omega,
        "positions": layer.positions(x),
        "out": out,
        "grad.x": x.grad,
        "grad.weight": layer.weight.grad,
        "grad.predictor.weight": layer.predictor.weight.grad,
    }
    assert set(results) | set(parameters) | {"x", "cotangent"} == set(golden)
    for key, value in results.items():
        expected = golden[key]
        assert value.shape == expected.shape, key
        assert (value - expected).abs().max() <= 1e-4 * expected.abs().max(), key
