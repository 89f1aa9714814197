"""The implicit metric: exact where there is one, finite and honest where there is none."""

import math

import pytest
import torch

from timm_metricconv import LAYERS, MetricConv2d
from timm_metricconv.geometry import (
    DRIFTS,
    PARAMETRIZATIONS,
    PATTERNS,
    Metric,
    anisotropy,
    asymmetry,
    fit_randers,
    image_metric,
    ray_positions,
    star_hull,
    unit_ball,
)

ANGLES = torch.linspace(0, 2 * math.pi, 91)


def pattern(name, k):
    """Points `[R, D, 2]`, `[K, 2]` and radii `[K]`."""
    points = PATTERNS[name](k)
    return points, points.flatten(0, 1), points.flatten(0, 1).norm(dim=-1)


def random_metrics(count, tau, seed=0):
    generator = torch.Generator().manual_seed(seed)
    raw = 2 * torch.randn(count, 5, generator=generator, dtype=torch.float64)
    root = PARAMETRIZATIONS["logspd"].function(raw[:, :3], (0.1, 1.5))
    return Metric(root.a, root.b, root.d, *DRIFTS["whitened"](2 * raw[:, 3:], root, 1 - tau))


def sample(points, metric):
    """Positions `[1, K, 2, N, 1]` of N metrics."""
    return ray_positions(Metric(*(part[None, :, None, None] for part in metric)), points)


def at_lattice(points):
    """One pixel's positions and the lattice's radii."""
    return points[None, :, :, None, None], pattern("lattice", 3)[2].to(points.dtype)


@pytest.mark.parametrize("tau", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("name, k", [("lattice", 3), ("lattice", 4), ("onion", 3), ("onion", 5), ("polar", 5)])
def test_positions_of_a_metric_give_it_back(name, k, tau):
    points, _, r = pattern(name, k)
    metric = random_metrics(200, tau)
    fit = fit_randers(sample(points, metric), r)
    for found, true in zip((fit.metric, fit.omega), metric.tensors(), strict=True):
        torch.testing.assert_close(found[0, :, 0], true, atol=1e-8, rtol=1e-8)
    assert fit.residual.max() < 1e-8


@pytest.mark.parametrize("name, k", [("lattice", 3), ("lattice", 5), ("onion", 5), ("polar", 5)])
def test_corners_of_the_hull_lie_on_the_ball(name, k):
    points, _, r = pattern(name, k)
    metric = random_metrics(50, 0.8)
    positions, (m, omega) = sample(points, metric), metric.tensors()
    angles = torch.atan2(points[-1, :, 1], points[-1, :, 0])
    hull = star_hull(positions, r, angles)[0, :, 0]
    # a Randers ball is convex: its inscribed polygon lies inside
    ball = unit_ball(m, omega, angles)
    torch.testing.assert_close(hull, ball, atol=1e-8, rtol=1e-8)
    between = star_hull(positions, r, ANGLES)[0, :, 0]
    assert (between <= unit_ball(m, omega, ANGLES.double()) + 1e-9).all() and (between > 0).all()


def test_hull_of_the_lattice_is_the_octagon_and_of_one_side_is_empty():
    points = pattern("lattice", 3)[1]
    hull = star_hull(*at_lattice(points), ANGLES).flatten()
    assert hull.max() <= 1 + 1e-9 and hull.min() >= math.cos(math.pi / 8) - 1e-9
    shifted = star_hull(*at_lattice(points + torch.tensor([5.0, 0.0])), torch.tensor([math.pi, math.pi / 2])).flatten()
    assert (shifted == 0).all()


def test_degenerate_samples_are_finite_and_misfit():
    points = pattern("lattice", 3)[1]
    generator = torch.Generator().manual_seed(0)
    cases = {
        "one point": torch.tensor([1.0, 2.0]).expand(9, 2),
        "the centre": torch.zeros(9, 2),
        "a line": points.float() * torch.tensor([1.0, 0.0]),
        "tiny": 1e-6 * torch.randn(9, 2, generator=generator),
        "huge": 1e4 * torch.randn(9, 2, generator=generator),
        "far away": points.float() + 50,
    }
    for name, case in cases.items():
        positions, radii = at_lattice(case)
        fit = fit_randers(positions, radii)
        assert all(torch.isfinite(t).all() for t in (fit.metric, fit.omega, fit.residual)), name
        assert 0.2 < fit.residual.item() <= 1 + 1e-6, name
        assert asymmetry(fit.metric, fit.omega).item() < 1 + 1e-5, name
        assert torch.isfinite(star_hull(positions, radii, ANGLES)).all(), name


def test_any_samples_give_a_metric_that_stays_near_them():
    points = pattern("lattice", 3)[1].float()
    generator = torch.Generator().manual_seed(0)
    positions = points[None, :, :, None, None] + torch.randn(1, 9, 2, 20, 20, generator=generator)
    fit = fit_randers(positions, points.norm(dim=-1))
    assert (fit.residual <= 1).all() and (asymmetry(fit.metric, fit.omega) < 1).all()
    assert (anisotropy(fit.metric) >= 1).all()
    # the ball does not run off where no sample holds it: F stays positive and its reach that of the samples
    reach = unit_ball(fit.metric, fit.omega, ANGLES).amax(-1) / positions.norm(dim=2).amax(1)
    assert reach.median() < 1 and reach.quantile(0.99) < 5


def test_an_affine_layer_has_the_metric_of_its_map():
    points = pattern("lattice", 3)[1]
    matrix = torch.tensor([[1.5, 0.4], [-0.2, 0.7]], dtype=torch.float64)
    fit = fit_randers(*at_lattice(points @ matrix.T))
    inverse = torch.linalg.inv(matrix)
    expected = inverse.T @ inverse
    torch.testing.assert_close(fit.metric[0, 0, 0], expected, atol=1e-8, rtol=1e-8)
    singular = torch.linalg.svdvals(matrix)
    assert anisotropy(fit.metric).item() == pytest.approx((singular[0] / singular[1]).item())


def test_a_shifted_lattice_reads_as_a_drift_against_the_shift():
    fit = fit_randers(*at_lattice(pattern("lattice", 3)[1] + torch.tensor([0.3, 0.0])))
    assert fit.omega[..., 0].item() < -0.2 and abs(fit.omega[..., 1].item()) < 1e-9
    assert 0.01 < fit.residual.item() < 0.2


def test_a_metric_layer_gives_its_own_metric():
    torch.manual_seed(0)
    layer = MetricConv2d(3, 4, 3, sampling="rays").double()
    torch.nn.init.normal_(layer.predictor.weight, std=0.3)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    m, omega = layer.metric(x)
    fit = fit_randers(layer.positions(x), layer.points.norm(dim=-1).flatten())
    torch.testing.assert_close(fit.metric.permute(0, 3, 4, 1, 2), m, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(fit.omega.permute(0, 3, 1, 2), omega, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("conv", list(LAYERS))
def test_every_layer_starts_as_a_disk(conv):
    layer = LAYERS[conv](3, 4, 3)
    fit = fit_randers(layer.positions(torch.randn(1, 3, 5, 6)), layer.points.norm(dim=-1).flatten())
    assert fit.residual.shape == (1, 5, 6) and fit.residual.dtype == torch.float32
    assert fit.residual.max() < 1e-5 and (anisotropy(fit.metric) - 1).abs().max() < 1e-5


def test_errors_name_the_argument():
    positions, radii = at_lattice(pattern("lattice", 3)[1])
    with pytest.raises(ValueError, match="positions"):
        fit_randers(positions, radii[:4])
    with pytest.raises(ValueError, match="radii"):
        star_hull(positions, radii * 0, ANGLES)
    for wrong in ({"tau": 1.0}, {"scale": 0.0}, {"along": "up"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            image_metric(torch.rand(1, 1, 4, 4), **wrong)


@pytest.mark.parametrize("along", ["gradient", "edge"])
def test_balls_of_an_image_lie_along_its_edges(along):
    image = torch.zeros(1, 1, 9, 9)
    image[..., 5:] = 1
    m, omega = image_metric(image, tau=0.6, along=along).tensors()
    a, d = m[0, ..., 0, 0], m[0, ..., 1, 1]
    # a vertical edge: short across (x), long along (y), a disk elsewhere
    assert a[4, 4].item() == pytest.approx(1.1, rel=1e-3) and d[4, 4].item() == pytest.approx(0.1 / 11, rel=1e-3)
    torch.testing.assert_close(a[4, 0], d[4, 0])
    torch.testing.assert_close(torch.linalg.det(m), torch.full((1, 9, 9), 0.01), atol=1e-5, rtol=1e-3)
    assert asymmetry(m, omega)[0, 4, 4].item() == pytest.approx(0.6, rel=1e-3)
    assert omega[0, 4, 4].abs().argmax().item() == (0 if along == "gradient" else 1)
    assert omega[0, 4, 4].max() > 0
    flat, still = image_metric(torch.ones(1, 3, 5, 5)).tensors()
    torch.testing.assert_close(anisotropy(flat), torch.ones(1, 5, 5))
    assert flat.isfinite().all() and not still.any()
    grey, rounded = image_metric(torch.full((1, 1, 9, 9), 127 / 255), tau=0.6).tensors()  # whose gradient is rounding
    assert anisotropy(grey).max() < 1.1 and rounded.abs().max() < 0.01
