"""Zermelo's navigation: frame and wind of a metric, the predicted frame, and the affine part of any samples."""

import math
from itertools import product

import pytest
import torch
from torch import nn

from timm_metricconv import DeformConv2d, MetricConv2d, ShiftedConv2d
from timm_metricconv.geometry import (
    DRIFTS,
    PARAMETRIZATIONS,
    PATTERNS,
    Metric,
    Navigation,
    affine_fields,
    fit_frame,
    frame_of,
    navigation_of,
    randers_of,
)
from timm_metricconv.geometry.parametrizations import FRAME_BOUND


def metrics(count=300, drift=0.95, requires_grad=False):
    """Random float64 metrics in whitened form, ‖v‖ up to `drift`."""
    factor = torch.randn(count, 2, 2, dtype=torch.float64)
    a = factor @ factor.mT + 0.2 * torch.eye(2, dtype=torch.float64)
    angle, size = 2 * math.pi * torch.rand(count, dtype=torch.float64), drift * torch.rand(count, dtype=torch.float64)
    parts = a[:, 0, 0], a[:, 0, 1], a[:, 1, 1], size * angle.cos(), size * angle.sin()
    return Metric(*(part.clone().requires_grad_(requires_grad) for part in parts))


def navigations(count=300, wind=0.95):
    """Random frames with det B > 0, and winds."""
    b = torch.randn(count, 2, 2, dtype=torch.float64)
    b[torch.linalg.det(b) < 0, 0] *= -1
    b += 0.3 * torch.linalg.det(b).sign()[:, None, None] * torch.eye(2, dtype=torch.float64)
    b = b[torch.linalg.det(b) > 0.1]
    angle, size = 2 * math.pi * torch.rand(len(b), dtype=torch.float64), wind * torch.rand(len(b), dtype=torch.float64)
    return Navigation(b[:, 0, 0], b[:, 0, 1], b[:, 1, 0], b[:, 1, 1], size * angle.cos(), size * angle.sin())


def frames(navigated):
    return torch.stack(tuple(navigated)[:4], -1).unflatten(-1, (2, 2))


def winds(navigated):
    """W = B·w."""
    return (frames(navigated) @ torch.stack((navigated.x, navigated.y), -1)[..., None])[..., 0]


def finsler(metric, u):
    """F(u) by M and ω, u `[..., 2]`."""
    m, omega = metric.tensors()
    return torch.einsum("...i,...ij,...j->...", u, m, u).sqrt() + (u * omega).sum(-1)


def circle(count=16):
    angles = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count
    return torch.stack((angles.cos(), angles.sin()), -1)


def on_the_boundary(navigated):
    fields = affine_fields(navigated, (1.0, 1.0))
    linear = fields[..., :4].unflatten(-1, (2, 2))
    return torch.einsum("nij,kj->nki", linear, circle()) + fields[:, None, 4:]


def test_the_boundary_of_the_carried_disk_is_at_distance_1():
    navigated = navigations()
    boundary = on_the_boundary(navigated)
    metric = Metric(*(part[:, None] for part in randers_of(navigated)))
    torch.testing.assert_close(finsler(metric, boundary), torch.ones(boundary.shape[:2], dtype=torch.float64))


def test_conversions_invert_each_other():
    metric = metrics()
    for part, again in zip(metric, randers_of(navigation_of(metric)), strict=True):
        torch.testing.assert_close(again, part, rtol=1e-11, atol=1e-11)
    # a frame comes back up to a rotation on the right, its ellipse and the wind W as they were
    navigated = navigations()
    again = navigation_of(randers_of(navigated))
    b, c = frames(navigated), frames(again)
    torch.testing.assert_close(c @ c.mT, b @ b.mT, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(winds(again), winds(navigated), rtol=1e-10, atol=1e-11)
    rotation = torch.linalg.solve(b, c)
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(2, dtype=torch.float64).expand_as(rotation))
    assert (torch.linalg.det(rotation) > 0).all()


def test_the_asymmetry_is_the_same_number():
    navigated = navigations()
    metric = randers_of(navigated)
    torch.testing.assert_close(metric.x.square() + metric.y.square(), navigated.x.square() + navigated.y.square())
    m, omega = metric.tensors()
    norm = torch.einsum("ni,nij,nj->n", omega, torch.linalg.inv(m), omega).sqrt()
    torch.testing.assert_close(norm, torch.hypot(navigated.x, navigated.y))


def test_the_textbook_formulas():
    """M = h/λ + (hW)(hW)ᵀ/λ² and ω = −hW/λ, and the ellipse of `zermelo_ellipse`."""
    navigated = navigations()
    b, wind = frames(navigated), winds(navigated)
    h = torch.linalg.inv(b @ b.mT)
    margin = 1 - navigated.x.square() - navigated.y.square()
    covector = (h @ wind[..., None])[..., 0] / margin[:, None]
    m, omega = randers_of(navigated).tensors()
    torch.testing.assert_close(m, h / margin[:, None, None] + covector[:, :, None] * covector[:, None])
    torch.testing.assert_close(omega, -covector)


def test_a_rotation_of_the_frame_leaves_the_metric_alone():
    navigated = navigations()
    angle = torch.rand(len(navigated.x), dtype=torch.float64) * 6
    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1).unflatten(-1, (2, 2))
    b, w = frames(navigated) @ turn, turn.mT @ torch.stack((navigated.x, navigated.y), -1)[..., None]
    turned = Navigation(b[:, 0, 0], b[:, 0, 1], b[:, 1, 0], b[:, 1, 1], w[:, 0, 0], w[:, 1, 0])
    for part, again in zip(randers_of(navigated), randers_of(turned), strict=True):
        torch.testing.assert_close(again, part)


def test_gradients_of_the_conversions():
    parts = metrics(5, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *m: tuple(navigation_of(Metric(*m))), tuple(parts))
    parts = tuple(part.requires_grad_() for part in navigations(5))
    assert torch.autograd.gradcheck(lambda *n: tuple(randers_of(Navigation(*n))), parts)


# --- the predicted frame ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_raw_channels_give_a_frame(dtype):
    """det B > 0 and singular values within 1 ± β, at zero and up to ±1e4, with finite gradients."""
    corners = torch.tensor(list(product((-1e4, 0.0, 1e4), repeat=4)))
    raw = torch.cat((corners, 10 ** (6 * torch.rand(500, 1) - 2) * torch.randn(500, 4).sign() * torch.rand(500, 4)))
    raw = raw.to(dtype).requires_grad_()
    b = frames(frame_of(raw.to(torch.promote_types(dtype, torch.float32))))
    sizes = torch.linalg.svdvals(b.double())
    assert sizes.min() >= 1 - FRAME_BOUND - 1e-6 and sizes.max() <= 1 + FRAME_BOUND + 1e-6
    assert torch.linalg.det(b.double()).min() > 0
    (gradient,) = torch.autograd.grad(b.sum(), raw)
    assert gradient.isfinite().all() and gradient[len(corners) // 2].any()


def test_the_frame_of_zero_is_the_identity():
    b = frame_of(torch.zeros(3, 4))
    assert torch.equal(frames(b), torch.eye(2).expand(3, 2, 2))


def test_the_frame_follows_its_channels_in_row_major_order():
    raw = 1e-4 * torch.arange(1.0, 5.0, dtype=torch.float64)
    torch.testing.assert_close(
        frames(frame_of(raw)).flatten(), raw + torch.tensor([1.0, 0, 0, 1]).double(), atol=1e-9, rtol=0
    )


# --- the layer -------------------------------------------------------------------------------------------------------

pairs = pytest.mark.parametrize(("parametrization", "drift"), list(product(PARAMETRIZATIONS, DRIFTS)))


def exposed(parametrization="frame", drift="whitened", kernel_size=3, **options):
    """A layer whose input is the raw channels themselves."""
    layer = MetricConv2d(1, 1, kernel_size, parametrization=parametrization, drift=drift, **options).double()
    layer.predictor = nn.Identity()
    return layer


@pytest.mark.parametrize("pattern", PATTERNS)
@pairs
def test_samples_lie_in_the_ball_of_the_layers_metric(parametrization, drift, pattern):
    """F(y_j) of a point p_j + ρw: with q = p + ρw − w in the frame of the ball, y is on the boundary where ‖q‖ = 1."""
    layer = exposed(parametrization, drift, pattern=pattern)
    raw = torch.randn(1, layer.channels, 4, 5, dtype=torch.float64)
    y, (m, omega) = layer.positions(raw), layer.metric(raw)
    # what navigation says of the metric that the layer reports
    metric = Metric.from_tensors(m.permute(0, 3, 4, 1, 2), omega.permute(0, 2, 3, 1))
    navigated = navigation_of(metric)
    relative = y.permute(0, 3, 4, 1, 2) - winds(navigated)[..., None, :]
    inverse = torch.linalg.inv(frames(navigated))
    size = torch.linalg.vector_norm(torch.einsum("bhwij,bhwkj->bhwki", inverse, relative), dim=-1)
    # of a lattice of step 1 and of unit disks alike ρ = 1, so that ‖y − W‖_h is the point's radius
    radii = layer.points.flatten(0, 1).norm(dim=-1)
    torch.testing.assert_close(size, radii.expand_as(size), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("sampling", ["navigation", "rays"])
@pairs
def test_finite_gradients_and_the_identity_at_zero(parametrization, drift, sampling):
    layer = MetricConv2d(3, 4, 3, parametrization=parametrization, drift=drift, sampling=sampling)
    x = torch.randn(2, 3, 6, 5)
    exact = {"rtol": 0, "atol": 0 if (parametrization, sampling) == ("frame", "navigation") else 1e-5}
    lattice = layer.points.flatten(0, 1)[None, :, :, None, None].expand(2, -1, -1, 6, 5)
    torch.testing.assert_close(layer.positions(x), lattice, **exact)
    layer(x).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert layer.predictor.weight.grad.any()


@pytest.mark.parametrize("magnitude", [1.0, 1e4])
@pytest.mark.parametrize("dilation", [1, (2, 3)])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "options",
    [
        {"sampling": "navigation"},
        {"sampling": "rays"},
        {"ball": "geodesic", "steps": 2},
        {"parametrization": "logspd", "sampling": "navigation"},
        {"parametrization": "logspd", "sampling": "rays"},
        {"sampling": "navigation", "eps_omega": 1.0},
    ],
)
def test_no_sample_is_beyond_max_radius(options, pattern, dilation, magnitude):
    layer = exposed(pattern=pattern, dilation=dilation, **options)
    raw = magnitude * torch.randn(1, layer.channels, 30, 30, dtype=torch.float64)
    farthest = layer.positions(raw).norm(dim=2).max().item()
    assert farthest <= layer.max_radius * (1 + 1e-6) < math.inf


def test_max_radius_is_reached():
    """It is the least such bound: a frame that stretches a corner of the lattice, and a wind along it."""
    layer = exposed(eps_omega=0.1)
    raw = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0, 1.0], dtype=torch.float64)[None, :, None, None] * 1e6
    assert layer.positions(raw).norm(dim=2).max() > 0.999 * layer.max_radius


@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_the_wind_carries_a_lattice_by_one_step_of_it(kernel_size, dilation):
    layer = exposed(kernel_size=kernel_size, dilation=dilation, padding=0)
    wind = torch.tensor([0.6, -0.8], dtype=torch.float64)
    raw = torch.cat((torch.zeros(4, dtype=torch.float64), 1e6 * wind))[None, :, None, None]
    step = 0.9 * wind * torch.tensor([dilation[1], dilation[0]])
    moved = layer.positions(raw)[0, :, :, 0, 0] - layer.points[0]
    torch.testing.assert_close(moved, step.expand_as(moved), rtol=1e-6, atol=1e-6)


def test_groups_have_frames_of_their_own():
    layer = MetricConv2d(4, 4, 3, metric_groups=2).double()
    nn.init.normal_(layer.predictor.weight)
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    m, omega = layer.metric(x)
    assert m.shape == (1, 2, 2, 2, 5, 6) and omega.shape == (1, 2, 2, 5, 6)
    navigated = navigation_of(Metric.from_tensors(m.permute(0, 1, 4, 5, 2, 3), omega.permute(0, 1, 3, 4, 2)))
    # the mean of the samples is B·w
    mean = layer.positions(x).unflatten(1, (2, 9)).mean(2)
    torch.testing.assert_close(mean.permute(0, 1, 3, 4, 2), winds(navigated))


def test_unknown_samplings_are_refused():
    with pytest.raises(ValueError, match="sampling='orbit': expected one of navigation, rays"):
        MetricConv2d(3, 4, 3, sampling="orbit")


# --- the affine part of any positions --------------------------------------------------------------------------------


def random_maps(batch=2, size=(3, 4)):
    linear = torch.eye(2, dtype=torch.float64) + 0.4 * torch.randn(batch, *size, 2, 2, dtype=torch.float64)
    return linear, torch.randn(batch, *size, 2, dtype=torch.float64)


def place(linear, shift, points):
    return (torch.einsum("bhwij,kj->bhwki", linear, points) + shift[..., None, :]).permute(0, 3, 4, 1, 2)


@pytest.mark.parametrize("points", [PATTERNS["lattice"](3), PATTERNS["onion"](5), torch.rand(1, 7, 2).double()])
def test_an_affine_map_is_found_and_leaves_no_rest(points):
    points = points.flatten(0, 1)
    linear, shift = random_maps()
    fit = fit_frame(place(linear, shift, points), points)
    torch.testing.assert_close(fit.linear, linear)
    torch.testing.assert_close(fit.shift, shift)
    assert (fit.moved[..., 2] < 1e-20 * fit.moved.sum(-1)).all()


def test_the_parts_add_up_and_are_what_least_squares_leaves():
    points = PATTERNS["lattice"](3)[0]
    positions = torch.randn(2, 9, 2, 3, 4, dtype=torch.float64)
    fit = fit_frame(positions, points)
    moved = positions - points[:, :, None, None]
    torch.testing.assert_close(fit.moved.sum(-1), moved.square().sum(2).mean(1))
    design = torch.cat((points, torch.ones(9, 1, dtype=torch.float64)), 1)
    flat = positions.permute(0, 3, 4, 1, 2)
    solution = torch.linalg.lstsq(design.expand(*flat.shape[:3], 9, 3), flat).solution
    rest = (flat - design @ solution).square().sum(-1).mean(-1)
    torch.testing.assert_close(fit.moved[..., 2], rest)
    torch.testing.assert_close(fit.linear, solution[..., :2, :].mT)


def test_a_third_of_a_random_displacement_is_affine():
    points = PATTERNS["lattice"](3)[0]
    fit = fit_frame(points[:, :, None, None] + torch.randn(1, 9, 2, 100, 100, dtype=torch.float64), points)
    shares = fit.moved.mean((0, 1, 2))
    torch.testing.assert_close(shares / shares.sum(), torch.tensor([1, 2, 6]).double() / 9, atol=0.01, rtol=0)


def test_what_has_not_moved_has_no_parts():
    points = PATTERNS["lattice"](3)[0]
    fit = fit_frame(points[None, :, :, None, None], points)
    assert not fit.moved.any() and torch.equal(fit.linear[0, 0, 0], torch.eye(2).double())


@pytest.mark.parametrize("kind", [MetricConv2d, ShiftedConv2d, DeformConv2d])
def test_layers_are_as_affine_as_their_convolution_says(kind):
    layer = kind(3, 4, 3).double()
    nn.init.normal_(layer.predictor.weight, std=0.3)
    fit = fit_frame(layer.positions(torch.randn(1, 3, 8, 8, dtype=torch.float64)), layer.points.flatten(0, 1))
    _, linear, rest = (fit.moved.mean((0, 1, 2)) / fit.moved.mean((0, 1, 2)).sum()).tolist()
    assert (rest > 0.5) if kind is DeformConv2d else (rest < 1e-20)
    assert (linear < 1e-20) if kind is ShiftedConv2d else (linear > 0.1)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"positions: expected \[B, K, 2, H, W\] and points \[K, 2\]"):
        fit_frame(torch.zeros(1, 9, 2, 3, 3), torch.zeros(8, 2))
