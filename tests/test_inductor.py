"""`torch.compile` with its default compiler, which neither `aot_eager` nor `opcheck` stands for."""

import pytest
import timm
import torch
from torch import nn

from timm_metricconv import DeformConv2d, MetricConv2d, convert

pytestmark = pytest.mark.slow

LAYERS = {
    "metric, and what works in place": lambda: [MetricConv2d(3, 5, 3), nn.ReLU(inplace=True)],
    "depthwise, odd channels": lambda: [nn.Conv2d(3, 10, 1), MetricConv2d(10, 10, 3, groups=10, metric_groups=2)],
    "deform, masks": lambda: [DeformConv2d(3, 5, 3, modulated=True)],
    "rays": lambda: [MetricConv2d(3, 5, 3, sampling="rays")],
    "geodesic": lambda: [MetricConv2d(3, 4, 3, ball="geodesic")],
}


def results(function, network, x):
    network.zero_grad()
    out = function(x)
    out.square().sum().backward()
    return [out.detach(), *(parameter.grad.clone() for parameter in network.parameters())]


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_training_at_any_size(layers):
    torch.compiler.reset()
    network = nn.Sequential(*layers())
    for layer in network:
        if hasattr(layer, "predictor"):
            nn.init.normal_(layer.predictor.weight, std=0.1)
    compiled = torch.compile(network, dynamic=True)
    for size in ((16, 16), (13, 24)):
        x = torch.randn(2, 3, *size)
        for value, expected in zip(results(compiled, network, x), results(network, network, x), strict=True):
            assert (value - expected).norm() <= 1e-4 * expected.norm()


def test_depthwise_networks_whose_channels_fill_no_register():
    torch.compiler.reset()
    network = timm.create_model("mobilenetv3_small_100").eval()
    assert convert(network, "metric", where="blocks.1.*")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(network)(x), network(x), rtol=1e-4, atol=1e-5)
