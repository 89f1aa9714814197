"""The laws of geodesic balls: closed forms, the flow they come from, grids, gradients and bad input."""

import math

import pytest
import torch
from torch.func import jvp

from timm_metricconv.geometry import PATTERNS, geodesic_positions, geodesics

COUNT = 6  # pixels of a field that is a formula


def directions(count=8):
    angles = 2 * math.pi * (torch.arange(count, dtype=torch.float64) + 0.3) / count
    return torch.stack((angles.cos(), angles.sin()), -1)


def lattice(kernel_size=3, scale=1.0):
    return scale * PATTERNS["lattice"](kernel_size)[0]


def randers(five, u):
    """F of u `[..., 2]` for (a, b, d, v_x, v_y) of shapes that broadcast with u's."""
    a, b, d, vx, vy = five
    zx, zy = a * u[..., 0] + b * u[..., 1], b * u[..., 0] + d * u[..., 1]
    return torch.sqrt(zx * zx + zy * zy) + vx * zx + vy * zy


def tangent_positions(fields, points):
    """y_j = r_j·û_j / F(û_j)."""
    radii = torch.linalg.vector_norm(points, dim=-1, keepdim=True)
    unit = torch.where(radii > 0, points / radii, 1.0)
    return points[:, :, None, None] / randers(fields[:, :, None].unbind(1), unit[:, None, None])[:, :, None]


def symmetric_exp(p, q, r):
    """exp of [[p + q, r], [r, p − q]] as (a, b, d)."""
    n = (q * q + r * r + 1e-30).sqrt()
    mean, slope = p.exp() * n.cosh(), p.exp() * n.sinh() / n
    return mean + slope * q, slope * r, mean - slope * q


def random_fields(*shape, dtype=torch.float64, size=0.3):
    """`[B, 5, H, W]`, independent from pixel to pixel."""
    raw = size * torch.randn(shape[0], 5, *shape[1:], dtype=torch.float64)
    return torch.stack((*symmetric_exp(*raw[:, :3].unbind(1)), *(raw[:, 3:].tanh() * 0.7).unbind(1)), 1).to(dtype)


def random_metric(size=0.25, frequency=0.7):
    """A smooth random Randers metric: q `[..., 2]` → (a, b, d, v_x, v_y)."""
    wave, phase = frequency * torch.randn(5, 2, dtype=torch.float64), 6 * torch.rand(5, dtype=torch.float64)

    def metric(q):
        p, s, r, vx, vy = (size * (q @ wave.T + phase).sin()).unbind(-1)
        return (*symmetric_exp(p, s, r), 2 * vx, 2 * vy)

    return metric


def half_plane(c=1.0):
    """Poincaré's, F(u) = c·‖u‖ / y."""

    def metric(q):
        a, zero = c / q[..., 1], torch.zeros_like(q[..., 1])
        return a, zero, a, zero, zero

    return metric


def half_plane_geodesic(start, unit, distance):
    """The image of the vertical one, i·exp(s), by the isometry that turns it around its start."""
    turn = (torch.atan2(unit[..., 1], unit[..., 0]) - math.pi / 2) / 2
    z = 1j * distance.exp()
    w = (z * turn.cos() + turn.sin()) / (turn.cos() - z * turn.sin())
    return torch.stack((start[..., 1] * w.real, start[..., 1] * (w.imag - 1)), -1)


@pytest.fixture
def follow(monkeypatch):
    """`geodesic_positions` of a metric that is a formula: its place reads the grid's."""

    def coefficients(metric, q):
        def numbers(q):
            a, b, d, vx, vy = metric(q)
            return torch.stack((a, b, d, a * vx + b * vy, b * vx + d * vy, vx, vy))

        along = torch.stack([axis.expand_as(q) for axis in torch.eye(2, dtype=q.dtype)])
        values, slopes = jvp(numbers, (torch.stack((q, q)),), (along,))
        (dx, dy), (a, b, d, _, _, vx, vy) = slopes.unbind(1), values[:, 0]
        curls = dx[1] - dy[0], dx[2] - dy[1], dx[4] - dy[3]
        det = a * d - b * b
        return torch.stack((d / det, -b / det, a / det, *(-curl / det for curl in curls), vx, vy))

    def run(metric, start, points, steps):
        """Positions `[P, K, 2]` from the places `[P, 2]`."""

        def table(fields, spacing):
            return torch.nn.functional.pad(coefficients(metric, start)[None, :, None], (1, 1, 1, 1))

        def read(table, x, y, spacing):
            q = start + torch.stack(torch.broadcast_tensors(x[0, :, 0], y[0, :, 0]), -1)
            return coefficients(metric, q)[None, :, :, None]

        monkeypatch.setattr(geodesics, "_coefficients", table)
        monkeypatch.setattr(geodesics, "_read", read)
        fields = torch.stack(metric(start))[None, :, None]
        return geodesic_positions(fields, points, steps=steps)[0, :, :, 0].permute(2, 0, 1)

    return run


def places(count=COUNT):
    """Random `[P, 2]` in the upper half-plane."""
    return torch.stack((0.5 * torch.randn(count), 0.5 + 0.5 * torch.rand(count)), -1).double()


def assert_same_gradients(actual, expected, *inputs):
    cotangent = torch.randn_like(actual)
    gradients = (torch.autograd.grad((value * cotangent).sum(), inputs) for value in (actual, expected))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("radius", [0.1, 1.0, 30.0])
def test_constant_metric_has_the_tangent_ball(steps, radius):
    numbers = random_fields(2, 1, 1).requires_grad_()
    fields = numbers.expand(-1, -1, 4, 5)
    actual = geodesic_positions(fields, lattice(scale=radius), steps=steps)
    expected = tangent_positions(fields, lattice(scale=radius))
    torch.testing.assert_close(actual, expected)
    assert_same_gradients(actual, expected, numbers)


def test_rays_of_a_constant_metric():
    """Radii that share directions come out in the order of the points, with a centre and unequal largest radii."""
    radii = torch.tensor([[1.0, 0.2, 3.0], [0.0, 2.5, 0.7], [2.0, 0.1, 0.7]], dtype=torch.float64)
    points = radii[:, :, None] * directions(3)
    fields = random_fields(2, 1, 1).expand(-1, -1, 3, 4)
    actual = geodesic_positions(fields, points, steps=2)
    torch.testing.assert_close(actual, tangent_positions(fields, points.flatten(0, 1)))


def test_half_plane(follow):
    """The circle of centre (x₀, y₀ cosh r) and radius y₀ sinh r, each point where its direction leads."""
    c = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    start, unit, r = places(), directions(), 1.2
    actual = follow(half_plane(c), start, r * unit, 32)
    expected = half_plane_geodesic(start[:, None], unit, r / c)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    assert_same_gradients(actual, expected, c)
    height = start[:, 1:]
    centre = torch.stack((torch.zeros_like(height), height * ((r / c).cosh() - 1)), -1)
    distance = torch.linalg.vector_norm(actual - centre, dim=-1)
    torch.testing.assert_close(distance, (height * (r / c).sinh()).expand(-1, 8), rtol=1e-8, atol=1e-8)


def test_zermelo_with_a_rotation(follow):
    """A wind that turns the plane carries straight lines along: y = R(c·r)(x + r·n) − x, with n the heading."""
    c = torch.tensor(0.35, dtype=torch.float64, requires_grad=True)
    start, unit, r = places(), directions(), 0.7

    def wind(q):
        return c * torch.stack((-q[..., 1], q[..., 0]), -1)

    def metric(q):
        w = wind(q)
        square = w.square().sum(-1)
        root = (1 - square).sqrt()
        # A is 1 / (1 − ‖W‖²) along the wind and its root across, v = −W
        x, y = w.unbind(-1)
        a, b, d = ((1 / (1 - square) - 1 / root) * t / square for t in (x * x, x * y, y * y))
        return a + 1 / root, b, d + 1 / root, -x, -y

    actual = follow(metric, start, r * unit, 32)
    five = [number[:, None] for number in metric(start)]
    heading = unit / randers(five, unit)[..., None] - wind(start)[:, None]
    torch.testing.assert_close(torch.linalg.vector_norm(heading, dim=-1), torch.ones(COUNT, 8, dtype=torch.float64))
    x, y = (start[:, None] + r * heading).unbind(-1)
    cos, sin = (c * r).cos(), (c * r).sin()
    expected = torch.stack((cos * x - sin * y, sin * x + cos * y), -1) - start[:, None]
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    assert_same_gradients(actual, expected, c)


def test_exact_one_form_changes_lengths_and_not_paths(follow):
    """F = F_M + df: d_F = d_M + f(y) − f(x), along the geodesics of M."""
    strength = torch.tensor([0.1, 0.3], dtype=torch.float64, requires_grad=True)

    def potential(q):
        return strength[0] * q[..., 0].sin() + strength[1] * q[..., 1].log()

    def metric(q):
        a, b, d, _, _ = half_plane()(q)
        return a, b, d, q[..., 1] * strength[0] * q[..., 0].cos(), strength[1].expand_as(a)

    start, unit, r = places(), directions(), 0.9
    actual = follow(metric, start, r * unit, 32)
    end = start[:, None] + actual
    square = actual.square().sum(-1)
    riemannian = torch.acosh(1 + square / (2 * start[:, None, 1] * end[..., 1]))
    distance = riemannian + potential(end) - potential(start)[:, None]
    torch.testing.assert_close(distance, torch.full_like(distance, r), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(actual, half_plane_geodesic(start[:, None], unit, riemannian), rtol=1e-7, atol=1e-7)
    # The distance is r whatever the strength is
    (gradient,) = torch.autograd.grad((distance * torch.randn_like(distance)).sum(), strength)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ any metric


def test_is_the_flow_of_the_dual(follow):
    """Hamilton's equations of ½F*², F* as DESIGN has it, on random metrics: none of the angle's formulas is used."""
    metric, start, unit, r, steps = random_metric(), places(), directions(5), 0.8, 24

    def velocity(state):
        q, p = state
        with torch.enable_grad():
            q, p = q.detach().requires_grad_(), p.detach().requires_grad_()
            a, b, d, vx, vy = metric(q)
            det = a * d - b * b
            mx, my = (d * p[..., 0] - b * p[..., 1]) / det, (a * p[..., 1] - b * p[..., 0]) / det
            margin, wind = 1 - vx * vx - vy * vy, vx * mx + vy * my
            dual = ((margin * (mx * mx + my * my) + wind * wind).sqrt() - wind) / margin
            dq, dp = torch.autograd.grad(dual.square().sum() / 2, (q, p))
        return dp, -dq

    a, b, d, vx, vy = (number[:, None] for number in metric(start))
    zx, zy = a * unit[:, 0] + b * unit[:, 1], b * unit[:, 0] + d * unit[:, 1]
    norm = torch.hypot(zx, zy)
    mx, my = zx / norm + vx, zy / norm + vy  # the derivative of F
    q, p = start[:, None].expand(-1, len(unit), -1), torch.stack((a * mx + b * my, b * mx + d * my), -1)
    h = r / steps
    for _ in range(steps):
        k1 = velocity((q, p))
        k2 = velocity((q + h / 2 * k1[0], p + h / 2 * k1[1]))
        k3 = velocity((q + h / 2 * k2[0], p + h / 2 * k2[1]))
        k4 = velocity((q + h * k3[0], p + h * k3[1]))
        q, p = (s + h / 6 * (e + 2 * f + 2 * g + i) for s, e, f, g, i in zip((q, p), k1, k2, k3, k4, strict=True))
    actual = follow(metric, start, r * unit, steps)
    torch.testing.assert_close(actual, q - start[:, None], rtol=1e-5, atol=1e-6)


def test_paths_are_as_long_as_asked_for(follow):
    """The sum of F over the chords between 200 radii of a path, at every radius."""
    metric, start, unit = random_metric(), places(), directions(5)
    radii = torch.arange(1, 201, dtype=torch.float64) / 100
    path = follow(metric, start, radii[:, None, None] * unit, 20).unflatten(1, (200, 5))
    path = torch.cat((torch.zeros_like(path[:, :1]), path), 1)
    chords, middles = path.diff(dim=1), (path[:, 1:] + path[:, :-1]) / 2
    length = randers(metric(start[:, None, None] + middles), chords).cumsum(1)
    torch.testing.assert_close(length, radii[:, None].expand_as(length), rtol=1e-3, atol=0)


def order(errors):
    """The exponents of the error between one number of steps and twice as many."""
    errors = torch.tensor(errors).log2()
    return errors[:-1] - errors[1:]


def test_order_of_the_integrator(follow):
    """Four at a direction's largest radius, three at those that are read off on the way."""
    metric, start = random_metric(), places()
    points = torch.tensor([[0.5], [1.2]], dtype=torch.float64)[:, None] * directions(5)
    exact = follow(metric, start, points.flatten(0, 1), 40).unflatten(1, (2, 5))
    errors = [(follow(metric, start, points, steps).unflatten(1, (2, 5)) - exact).abs() for steps in (4, 8, 16)]
    assert order([error[:, 1].mean() for error in errors]) == pytest.approx(4, abs=0.4)
    assert (order([error[:, 0].mean() for error in errors]) > 2.6).all()


# ------------------------------------------------------------------------------------------------ grids


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (2.0, 0.5)])
def test_gap_to_the_tangent_ball_is_quadratic(spacing):
    """Also along a row of pixels: an interpolation that is flat at pixels never turns there, and has order three."""
    fields = random_fields(2, 5, 6)
    points = torch.cat((directions(), torch.eye(2, dtype=torch.float64), -torch.eye(2, dtype=torch.float64)))
    gaps = []
    for r in (0.04, 0.02, 0.01):
        gap = geodesic_positions(fields, r * points, steps=2, spacing=spacing) - tangent_positions(fields, r * points)
        gaps.append(torch.linalg.vector_norm(gap, dim=2).mean((0, 2, 3)))
    for ray in torch.stack(gaps, 1):
        assert order(ray.tolist()) == pytest.approx(2, abs=0.15)


def test_grids_converge_to_the_field(follow):
    """Of second order in the distance of the pixels, which differs between rows and columns."""
    metric, middle = random_metric(), torch.tensor([0.3, 1.4], dtype=torch.float64)
    points, steps, errors = 0.4 * directions(), 16, []
    for n in (3, 6, 12):
        height, width = 0.7 / n, 1 / n
        offsets = torch.arange(-2 * n, 2 * n + 1, dtype=torch.float64)
        y, x = torch.meshgrid(middle[1] + height * offsets, middle[0] + width * offsets, indexing="ij")
        fields = torch.stack(metric(torch.stack((x, y), -1)))[None]
        positions = geodesic_positions(fields, points, steps=steps, spacing=(height, width))
        errors.append(positions[0, :, :, 2 * n, 2 * n])
    exact = follow(metric, middle[None], points, steps)[0]
    assert order([(error - exact).abs().mean() for error in errors]) == pytest.approx(2, abs=0.35)


def test_shift_equivariance():
    fields = random_fields(1, 14, 15)
    whole = geodesic_positions(fields, lattice(), steps=2)[..., 2:, 3:]
    part = geodesic_positions(fields[..., 2:, 3:], lattice(), steps=2)
    away = part.abs().amax() + 2  # samples and their differences do not see the border
    assert away < 6
    torch.testing.assert_close(part[..., 6:, 6:], whole[..., 6:, 6:])


def test_symmetries_of_the_grid():
    """A mirrored or transposed field has the mirrored or transposed ball: x, y and the signs of turns."""
    fields, points = random_fields(1, 6, 6), lattice()
    positions = geodesic_positions(fields, points, steps=2)
    mirror = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)[:, None, None]
    flipped = geodesic_positions(mirror * fields.flip(-1), points * torch.tensor([-1.0, 1.0]), steps=2)
    torch.testing.assert_close(flipped.flip(-1) * torch.tensor([-1.0, 1.0])[:, None, None], positions)
    swapped = geodesic_positions(fields.mT[:, [2, 1, 0, 4, 3]], points.flip(-1), steps=2)
    torch.testing.assert_close(swapped.mT.flip(2), positions)


def test_images_of_a_batch_do_not_meet():
    fields = random_fields(3, 7, 6, dtype=torch.float32)
    together = geodesic_positions(fields, lattice(), steps=2)
    for i in range(3):
        assert torch.equal(together[i : i + 1], geodesic_positions(fields[i : i + 1], lattice(), steps=2))


def test_outside_is_the_nearest_pixels_metric():
    """A field that changes along x alone, with a slope at the border: from a pixel outside on, paths are straight."""
    fields = random_fields(1, 1, 4).expand(-1, -1, 5, -1)
    radii = torch.arange(1, 17, dtype=torch.float64)
    points = radii[:, None, None] * torch.tensor([[-1.0, 0.2], [1.0, 0.1]], dtype=torch.float64)
    positions = geodesic_positions(fields, points, steps=16).unflatten(1, (16, 2))
    for ray, column in ((0, 0), (1, -1)):
        path = positions[0, :, ray, :, 2, column]
        assert path[5].norm() > 2
        torch.testing.assert_close(path[7:].diff(n=2, dim=0), torch.zeros(7, 2, dtype=torch.float64), atol=1e-9, rtol=0)


def test_one_pixel():
    fields = random_fields(2, 1, 1)
    torch.testing.assert_close(geodesic_positions(fields, lattice(), steps=2), tangent_positions(fields, lattice()))


def test_no_sample_is_beyond_the_tangent_balls_bound():
    fields = random_fields(4, 9, 9, size=1.0)
    a, b, d, vx, vy = fields.unbind(1)
    least = (a + d) / 2 - torch.hypot((a - d) / 2, b)
    points = directions() * torch.tensor([0.3, 0.9, 1.0])[:, None, None]
    distance = torch.linalg.vector_norm(geodesic_positions(fields, points, steps=1), dim=2)
    assert distance.max() <= 1 / (least.min() * (1 - torch.hypot(vx, vy).max()))


# ------------------------------------------------------------------------------------------------ gradients, cost


@pytest.mark.parametrize("points", [lattice(), directions(3) * torch.tensor([[[0.4]], [[0.9]]])])
def test_gradients(points):
    fields = random_fields(2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f: geodesic_positions(f, points, steps=2, spacing=(1.0, 2.0)), fields, fast_mode=True
    )


def test_backward_takes_the_steps_again(monkeypatch):
    """So memory between the passes holds places and angles alone; without a gradient nothing is wrapped."""
    read, reads = geodesics._read, []
    monkeypatch.setattr(geodesics, "_read", lambda *args: reads.append(1) or read(*args))
    fields = random_fields(1, 3, 4).requires_grad_()
    positions = geodesic_positions(fields, lattice(), steps=3)
    assert len(reads) == 4 * 3 - 1  # the first is the pixel's own
    positions.sum().backward()
    assert len(reads) == 2 * (4 * 3 - 1)


def test_export_and_script():
    class Ball(torch.nn.Module):
        def forward(self, fields, points):
            return geodesic_positions(fields, points, steps=2)

    arguments = random_fields(1, 5, 6, dtype=torch.float32).requires_grad_(), lattice()
    expected = Ball()(*arguments)
    torch.testing.assert_close(torch.export.export(Ball(), arguments).module()(*arguments), expected)
    torch.testing.assert_close(torch.jit.script(Ball())(*arguments), expected)


# ------------------------------------------------------------------------------------------------ bad input


def test_errors_say_what_is_expected():
    fields, points = random_fields(1, 3, 3), lattice()
    with pytest.raises(ValueError, match="steps=0: expected at least 1"):
        geodesic_positions(fields, points, steps=0)
    with pytest.raises(ValueError, match=r"fields: expected \[B, 5, H, W\]"):
        geodesic_positions(fields[:, :4], points, steps=1)
    with pytest.raises(ValueError, match=r"points: expected \[K, 2\]"):
        geodesic_positions(fields, points[:, :1], steps=1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_pixel_that_is_not_finite(value):
    """It harms the pixels whose paths meet it."""
    fields = random_fields(1, 16, 16)
    expected = geodesic_positions(fields, lattice(), steps=2)
    assert expected.abs().max() < 6
    fields[:, :, 2, 2] = value
    torch.testing.assert_close(
        geodesic_positions(fields, lattice(), steps=2)[..., 9:, 9:], expected[..., 9:, 9:], rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wild_fields_and_far_radii_stay_finite(dtype):
    """Conditions up to 1e12, ‖v‖ beyond 1, radii beyond any image; the gradients too."""
    raw = 10 ** (6 * torch.rand(2, 3, 12, 12) - 3) * torch.randn(2, 3, 12, 12).sign()
    l0, l1, l2 = raw[:, 0].abs() + 0.01, raw[:, 1], raw[:, 2].abs() + 0.01
    s = l0 * l2
    scale = (l0 * l0 + l1 * l1 + l2 * l2 + 2 * s).rsqrt()
    numbers = (l0 * l0 + s) * scale, l0 * l1 * scale, (l1 * l1 + l2 * l2 + s) * scale
    fields = torch.stack((*numbers, *(3 * torch.randn(2, 2, 12, 12)).unbind(1)), 1).to(dtype).requires_grad_()
    for radius in (1.0, 1e6):
        positions = geodesic_positions(fields, lattice(scale=radius), steps=3)
        assert positions.isfinite().all()
        (gradient,) = torch.autograd.grad(positions.sum(), fields)
        assert gradient.isfinite().all()


def test_empty_batch():
    assert geodesic_positions(random_fields(0, 3, 4), lattice(), steps=1).shape == (0, 9, 2, 3, 4)


def test_torch_func_differentiates():
    fields, points = random_fields(1, 5, 4), PATTERNS["lattice"](3, (1, 1)).double()

    def energy(fields):
        return geodesic_positions(fields, points, 2).square().sum()

    leaf = fields.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(energy)(fields), torch.autograd.grad(energy(leaf), leaf)[0])
