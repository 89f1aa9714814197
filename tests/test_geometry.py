"""The laws of patterns, metrics and drifts, for every parametrization, drift and pattern."""

import math
from itertools import product

import pytest
import torch
from torch import nn

from timm_metricconv import MetricConv2d
from timm_metricconv.geometry import DRIFTS, PARAMETRIZATIONS, PATTERNS, Metric, Root, randers, zermelo_ellipse

SCALE = (0.1, 1.5)
pairs = pytest.mark.parametrize(("parametrization", "drift"), list(product(PARAMETRIZATIONS, DRIFTS)))
parametrizations = pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)


def exposed(parametrization="logspd", drift="whitened", kernel_size=3, dtype=torch.float64, **kwargs):
    """A layer whose input is the raw channels themselves."""
    kind = {"parametrization": parametrization, "drift": drift, "sampling": "rays"}
    layer = MetricConv2d(1, 1, kernel_size, dtype=dtype, **{**kind, **kwargs})
    layer.predictor = nn.Identity()
    return layer


def raw_channels(parametrization, magnitude, dtype, count=400):
    """Random raw channels `[1, channels, 1, count]`: of all sizes up to `magnitude`, corners, axes, zero."""
    channels = PARAMETRIZATIONS[parametrization].channels
    size = magnitude ** (torch.rand(count, channels) * 3 - 2).clamp(max=1) * (torch.rand(count, channels) > 0.1)
    corners = torch.tensor(list(product((-magnitude, magnitude), repeat=channels)))
    axes = torch.cat((torch.eye(channels), -torch.eye(channels))) * magnitude
    raw = torch.cat((size * torch.randn(count, channels).sign(), corners, axes, torch.zeros(1, channels)))
    return raw.T[None, :, None].to(dtype)


def matrix(a, b, d):
    """Entries `[...]` → a symmetric matrix `[..., 2, 2]`."""
    return torch.stack((a, b, b, d), -1).unflatten(-1, (2, 2))


def random_metric(count=500, drift=0.9):
    """Well-conditioned float64 metrics M and ω with ‖ω‖ up to `drift`."""
    factor = torch.randn(count, 2, 2, dtype=torch.float64)
    m = factor @ factor.mT + 0.1 * torch.eye(2, dtype=torch.float64)
    direction = torch.randn(count, 2, dtype=torch.float64)
    norm = (direction[:, None] @ torch.linalg.inv(m) @ direction[:, :, None]).sqrt()[:, 0]
    return m, direction / norm * drift * torch.rand(count, 1, dtype=torch.float64)


def root_of(m):
    """A of M by its eigenvectors."""
    values, vectors = torch.linalg.eigh(m)
    return vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT


def as_root(a):
    return Root(a[..., 0, 0], a[..., 0, 1], a[..., 1, 1], torch.linalg.det(a))


@pytest.mark.parametrize("pattern", PATTERNS)
@pairs
def test_samples_lie_at_their_distance(parametrization, drift, pattern):
    layer = exposed(parametrization, drift, pattern=pattern, eps_omega=0.1)
    raw = 2 * torch.randn(2, layer.channels, 5, 4, dtype=torch.float64)
    y, (m, omega) = layer.positions(raw), layer.metric(raw)
    distance = torch.einsum("bkihw,bijhw,bkjhw->bkhw", y, m, y).sqrt() + torch.einsum("bkihw,bihw->bkhw", y, omega)
    # the paper's variants divide by F + ε
    eps = 0.0 if parametrization in ("logspd", "frame") else 1e-6
    radii = PATTERNS[pattern](3).flatten(0, 1).norm(dim=-1)
    torch.testing.assert_close(
        distance + eps * y.norm(dim=2), radii.view(1, -1, 1, 1).expand_as(distance), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("eps_omega", [0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pairs
def test_any_raw_channels_give_a_metric(parametrization, drift, dtype, eps_omega):
    """Symmetric positive definite A, F > 0, finite samples and gradients, at zero and up to ±1e4; ‖v‖ < 1 − ε_ω."""
    layer = exposed(parametrization, drift, eps_omega=eps_omega, dtype=dtype)
    raw = raw_channels(parametrization, 1e4, dtype).requires_grad_()
    metric = Metric(*(part[0, 0, :, 0] for part in layer._metric(layer._channels(layer.predict(raw)))))
    a, b, d, x, y = (part.detach().double() for part in metric)
    assert metric.a.dtype == torch.promote_types(dtype, torch.float32)
    trace = a + d
    assert trace.min() > 0 and (a * d - b * b > -1e-6 * trace.square()).all()
    angles = torch.linspace(0, 2 * math.pi, 33)[:-1]
    directions = torch.stack((angles.cos(), angles.sin()), -1).to(metric.a)
    assert randers(directions, metric).min() > 0
    if drift == "whitened":
        # the last bit of 1 − ε_ω is the dtype's
        assert torch.hypot(x, y).max() <= (1 - eps_omega) * (1 + 1e-6)
    if eps_omega == 1.0:
        assert not x.any() and not y.any()

    positions, (m, omega) = layer.positions(raw), layer.metric(raw)
    assert positions.isfinite().all() and (positions[:, [0, 8]] != 0).any()
    for value in (positions, m, omega + 0 * raw.sum()):
        (gradient,) = torch.autograd.grad(value.sum(), raw, retain_graph=True)
        assert gradient.isfinite().all()


def test_the_law_is_kept_where_a_drift_leaves_it():
    """‖v‖ ≥ 1 would make F zero or negative in some directions: there it is the floor, elsewhere it is untouched."""
    angles = torch.linspace(0, 2 * math.pi, 65, dtype=torch.float64)[:-1]
    u = torch.stack((angles.cos(), angles.sin()), -1)
    metric = Metric(*torch.tensor([1.5, 0.3, 0.8, 1.2, -0.9], dtype=torch.float64))
    z = u @ matrix(*metric[:3])
    size, plain = z.norm(dim=-1), z.norm(dim=-1) + z @ torch.stack(metric[3:])
    value = randers(u, metric)
    left = plain < 1e-3 * size
    assert left.any() and not left.all()
    torch.testing.assert_close(value, torch.where(left, 1e-3 * size, plain))


@pytest.mark.parametrize("parametrization", [p for p in PARAMETRIZATIONS if p not in ("logspd", "frame")])
def test_float32_agrees_with_the_plain_formula_in_float64(parametrization):
    """Up to condition numbers of 2e6: what a bound on the condition number or on F would move shows here."""
    raw = raw_channels(parametrization, 30.0, torch.float64, count=4000)[0, :, 0].T
    m = torch.stack([FORMULAS[parametrization](vector[:-2]) for vector in raw])
    omega = torch.stack([sigmoid_norm(vector[-2:], matrix, 0.1) for vector, matrix in zip(raw, m, strict=True)])
    values = torch.linalg.eigvalsh(m)
    norm = torch.linalg.solve_ex(m, omega)[0].mul(omega).sum(-1).sqrt()
    kept = (values[:, 1] < 2e6 * values[:, 0]) & (norm < 0.99)
    assert kept.sum() > 1000
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    u = torch.stack((angles.cos(), angles.sin()), -1)
    value = torch.einsum("di,nij,dj->nd", u, m, u).sqrt() + omega @ u.T
    expected = u / (value[..., None] + 1e-6)
    layer = exposed(parametrization, "sigmoid_norm", eps_omega=0.1, dtype=torch.float32)
    layer.points = u.float()[None]
    found = layer.positions(raw.float().T[None, :, None])[0, :, :, 0].permute(2, 0, 1).double()
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error[kept].max() < 2e-3 and error[kept].median() < 1e-6


@pairs
def test_strong_drift_reaches_its_margin(parametrization, drift):
    """‖ω‖ ≤ 1 − ε_ω (in the paper's formulas up to their ε), and comes near it."""
    layer = exposed(parametrization, drift, eps_omega=0.3)
    identity = torch.tensor(PARAMETRIZATIONS[parametrization].identity(SCALE), dtype=torch.float64)
    raw = 1e4 * torch.randn(1, layer.channels, 1, 200, dtype=torch.float64)
    raw[:, :-2] = identity[None, :, None, None] + 0.1 * torch.randn_like(raw[:, :-2])
    m, omega = (t[0, ..., 0, :] for t in layer.metric(raw))
    norm = torch.einsum("in,nij,jn->n", omega, torch.linalg.inv(m.permute(2, 0, 1)), omega).sqrt()
    assert 0.699 < norm.max() < 0.7 * (1 + (1e-9 if drift == "whitened" else 1e-5))


@parametrizations
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_identity_start(parametrization, dtype):
    raw = torch.zeros(1, PARAMETRIZATIONS[parametrization].channels, 1, 1, dtype=dtype)
    raw[0, :-2, 0, 0] = torch.tensor(PARAMETRIZATIONS[parametrization].identity(SCALE), dtype=dtype)
    for drift, kernel_size in product(DRIFTS, (2, 3)):
        layer = exposed(parametrization, drift, kernel_size=kernel_size, dilation=(2, 1), scale=SCALE, dtype=dtype)
        m, omega = layer.metric(raw)
        positions = layer.positions(raw)
        lattice = PATTERNS["lattice"](kernel_size, (2, 1))[0].to(dtype)
        assert torch.equal(omega, torch.zeros_like(omega))
        tolerance = 0 if parametrization in ("frame", "logspd") else 4e-6  # the paper's formulas have their ε of 1e-6
        torch.testing.assert_close(m[0, :, :, 0, 0], torch.eye(2, dtype=dtype), rtol=0, atol=tolerance)
        # ‖û‖ may miss 1 by rounding
        torch.testing.assert_close(
            positions[0, :, :, 0, 0], lattice, rtol=tolerance + 2 * torch.finfo(dtype).eps, atol=0
        )


@pytest.mark.parametrize("scale", [(0.5, 1.5), (1.0, 1.0), (0.9, 2.5)])
@pytest.mark.parametrize("parametrization", ["spectral_scale", "spectral_scale_ratio"])
def test_identity_start_at_other_scales(parametrization, scale):
    values = torch.tensor(PARAMETRIZATIONS[parametrization].identity(scale), dtype=torch.float64)
    root = matrix(*PARAMETRIZATIONS[parametrization].function(values, scale)[:3])
    torch.testing.assert_close(root, torch.eye(2, dtype=torch.float64), rtol=0, atol=4e-6)


@pytest.mark.parametrize(
    ("parametrization", "scale"),
    [("spectral_scale", (0.1, 0.5)), ("spectral_scale_ratio", (0.1, 0.5)), ("spectral_scale_ratio", (2.0, 3.0))],
)
def test_identity_out_of_reach_is_refused(parametrization, scale):
    with pytest.raises(ValueError, match="scale="):
        MetricConv2d(1, 1, 3, parametrization=parametrization, scale=scale)


@pytest.mark.parametrize("eps_omega", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    ("kernel_size", "dilation", "pattern"),
    [(3, 1, "lattice"), (4, (1, 3), "lattice"), (5, 2, "onion"), (5, 1, "polar")],
)
def test_radius_of_the_default(kernel_size, dilation, pattern, eps_omega):
    arguments = {"pattern": pattern, "kernel_size": kernel_size, "dilation": dilation, "eps_omega": eps_omega}
    layer = exposed(**arguments)
    farthest = layer.positions(raw_channels("logspd", 1e4, torch.float64)).norm(dim=2).max()
    assert farthest <= layer.max_radius * (1 + 1e-12)
    narrow = exposed(**arguments, dtype=torch.float32)
    farthest = narrow.positions(raw_channels("logspd", 1e4, torch.float32)).norm(dim=2).max()
    assert farthest <= layer.max_radius * (1 + 1e-5)

    # the smallest eigenvalue along the farthest point, the drift against it: the bound is attained
    point = layer.points.flatten(0, 1)[layer.points.flatten(0, 1).norm(dim=-1).argmax()].double()
    x, y = point / point.norm()
    raw = torch.stack((torch.tensor(-1.0), y * y - x * x, -2 * x * y, -x, -y)).double() * 1e6
    attained = layer.positions(raw.view(1, 5, 1, 1)).norm(dim=2).max()
    assert attained > (1 - 1e-6) * layer.max_radius


@pytest.mark.parametrize("ball", ["tangent", "geodesic"])
@pytest.mark.parametrize("drift", DRIFTS)
def test_every_bounded_layer_keeps_its_radius(drift, ball):
    layer = exposed(drift=drift, eps_omega=0.1, ball=ball, steps=3)
    farthest = layer.positions(raw_channels("logspd", 1e4, torch.float64)).norm(dim=2).max()
    assert farthest <= layer.max_radius * (1 + 1e-3)


@pytest.mark.parametrize("parametrization", [p for p in PARAMETRIZATIONS if p not in ("logspd", "frame")])
def test_other_layers_state_no_radius(parametrization):
    assert exposed(parametrization).max_radius == math.inf


def rotation(v, eps=1e-6):
    v = (v + eps) / (v.norm() + eps)
    return torch.stack((v, torch.stack((-v[1], v[0]))), 1)


def scale_of(value):
    return (SCALE[1] + SCALE[0]) / 2 + (torch.sigmoid(value) - 0.5) * (SCALE[1] - SCALE[0])


def from_axes(v, eigenvalues):
    r = rotation(v)
    return r @ torch.diag(torch.stack(tuple(eigenvalues))) @ r.T


def bounded(raw):
    bound = math.log(4)
    p, (q, r) = raw[0], raw[1:]
    p = p / torch.sqrt(1 + (p / bound) ** 2)
    q, r = raw[1:] / torch.sqrt(1 + (raw[1:] / bound).square().sum())
    return torch.linalg.matrix_exp(torch.stack((torch.stack((p + q, r)), torch.stack((r, p - q)))))


def lower(a, b, c):
    return torch.stack((torch.stack((a, torch.zeros_like(a))), torch.stack((b, c))))


def ldl(raw):
    l = lower(torch.ones_like(raw[0]), raw[0], torch.ones_like(raw[0]))  # noqa: E741
    return l @ torch.diag(raw[1:].abs() + 0.01) @ l.T


def cholesky(raw):
    l = lower(raw[0].abs() + 0.01, raw[1], raw[2].abs() + 0.01)  # noqa: E741
    return l @ l.T


def inverse_square(raw):
    """(BBᵀ)⁻¹ of B = I + β·raw / sqrt(β² + ‖raw‖²)."""
    b = torch.eye(2, dtype=raw.dtype) + (0.95 * raw / (0.95**2 + raw.square().sum()).sqrt()).view(2, 2)
    return torch.linalg.inv(b @ b.T)


# The formulas written once more, one raw vector at a time.
FORMULAS = {
    "frame": inverse_square,
    "logspd": bounded,
    "cholesky": cholesky,
    "ldl": ldl,
    "spectral": lambda raw: from_axes(raw[:2], raw[2:].abs() + 0.01),
    "spectral_scale": lambda raw: from_axes(raw[:2], 2 * raw[2:4].sigmoid() * scale_of(raw[4])),
    "spectral_scale_ratio": lambda raw: from_axes(
        raw[:2], (2 * raw[2].sigmoid() * scale_of(raw[4]), scale_of(raw[4]) / (2 * raw[3].sigmoid() + 1e-6))
    ),
}


@parametrizations
def test_parametrization_is_its_formula(parametrization):
    row = PARAMETRIZATIONS[parametrization]
    raw = 2 * torch.randn(50, row.channels - 2, dtype=torch.float64)
    root = row.function(raw, SCALE)
    expected = torch.stack([FORMULAS[parametrization](vector) for vector in raw])
    torch.testing.assert_close(matrix(*root[:3]), root_of(expected), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(root.det, torch.linalg.det(expected).sqrt(), rtol=1e-7, atol=1e-12)


def paper_norm(raw, m, eps=1e-6):
    a, b, d = m[0, 0] + eps, m[0, 1], m[1, 1] + eps
    inverse = torch.stack((torch.stack((d, -b)), torch.stack((-b, a)))) / (a * d - b * b + eps)
    return torch.sqrt(raw @ inverse @ raw + eps)


def whitened(raw, m, eps_omega):
    return root_of(m) @ raw * (1 - eps_omega) / torch.sqrt(1 + raw @ raw)


def sigmoid_norm(raw, m, eps_omega):
    n = paper_norm(raw, m)
    return raw * (2 * n.sigmoid() - 1) * (1 - eps_omega) / (n + 1e-6)


def norm_clip(raw, m, eps_omega):
    n = paper_norm(raw, m)
    return raw * n.clamp(max=1 - eps_omega) / (n + 1e-6)


@pytest.mark.parametrize(
    ("drift", "formula", "attached"),
    [
        ("whitened", whitened, True),
        ("sigmoid_norm", sigmoid_norm, True),
        ("sigmoid_norm_detach", sigmoid_norm, False),
        ("norm_clip_detach", norm_clip, False),
    ],
)
def test_drift_is_its_formula(drift, formula, attached):
    m, _ = random_metric(50)
    a = root_of(m)
    raw = (2 * torch.randn(50, 2, dtype=torch.float64)).requires_grad_()
    v = torch.stack(DRIFTS[drift](raw, as_root(a), 0.3), -1)
    omega = (a @ v[..., None])[..., 0]
    expected = torch.stack([formula(vector, matrix, 0.3) for vector, matrix in zip(raw, m, strict=True)])
    torch.testing.assert_close(omega, expected, rtol=1e-9, atol=1e-12)
    factor = torch.ones_like(omega)
    if attached:
        (gradient,) = torch.autograd.grad((expected * factor).sum(), raw)
    else:
        gradient = (expected / raw).detach()  # the factor alone
    torch.testing.assert_close(torch.autograd.grad(omega.sum(), raw)[0], gradient, rtol=1e-8, atol=1e-12)


def test_drift_names_are_all_tested():
    assert set(DRIFTS) == {"whitened", "sigmoid_norm", "sigmoid_norm_detach", "norm_clip_detach"}
    assert set(FORMULAS) == set(PARAMETRIZATIONS)


def test_randers_is_its_formula_in_m_and_omega():
    m, omega = random_metric()
    metric = Metric.from_tensors(m, omega)
    for found, expected in zip(metric.tensors(), (m, omega), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    u = torch.randn(7, 2, dtype=torch.float64)
    expected = torch.einsum("di,nij,dj->nd", u, m, u).sqrt() + omega @ u.T
    torch.testing.assert_close(randers(u, metric), expected, rtol=1e-9, atol=1e-12)
    norm = torch.einsum("ni,nij,nj->n", omega, torch.linalg.inv(m), omega).sqrt()
    torch.testing.assert_close(torch.hypot(metric.x, metric.y), norm, rtol=1e-9, atol=1e-12)
    riemannian = metric._replace(x=torch.zeros(500), y=torch.zeros(500))
    assert torch.equal(randers(u, riemannian), randers(-u, riemannian))
    assert not torch.allclose(randers(u, metric), randers(-u, metric))


def test_randers_ball_is_zermelos_ellipse():
    metric = Metric.from_tensors(*random_metric())
    angles = torch.linspace(0, 2 * math.pi, 37, dtype=torch.float64)
    directions = torch.stack((angles.cos(), angles.sin()), -1)
    boundary = directions / randers(directions, metric)[..., None]
    ellipse, centre = zermelo_ellipse(metric)
    u = boundary - centre[:, None]
    value = torch.einsum("ndi,nij,ndj->nd", u, ellipse, u)
    torch.testing.assert_close(value, torch.ones_like(value), rtol=1e-8, atol=0)


@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, (1, 1)), (2, (1, 1)), (3, (2, 1)), (4, (1, 3)), (5, (1, 1))])
def test_lattice(kernel_size, dilation):
    half = (kernel_size - 1) / 2
    expected = [
        (dilation[1] * (column - half), dilation[0] * (row - half))
        for row in range(kernel_size)
        for column in range(kernel_size)
    ]
    torch.testing.assert_close(
        PATTERNS["lattice"](kernel_size, dilation)[0], torch.tensor(expected, dtype=torch.float64)
    )


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
def test_onion(kernel_size):
    points = PATTERNS["onion"](kernel_size, (3, 2))[0]  # ignores dilation
    rings = (kernel_size - 1) // 2
    expected = [(0.0, 0.0)]
    for m in range(1, rings + 1):
        for n in range(8 * m):
            angle = 2 * math.pi * n / (8 * m)
            expected.append((m / rings * math.cos(angle), m / rings * math.sin(angle)))
    assert len(expected) == kernel_size**2
    torch.testing.assert_close(points, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 5])
def test_polar(kernel_size):
    points = PATTERNS["polar"](kernel_size, (3, 2))
    k = kernel_size
    assert points.shape == (k, k, 2)  # a metric is read in k directions, not k²
    expected = [
        ((i + 1) / k * math.cos(2 * math.pi * n / k), (i + 1) / k * math.sin(2 * math.pi * n / k))
        for i in range(k)
        for n in range(k)
    ]
    torch.testing.assert_close(points.flatten(0, 1), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kernel_size", [2, 4])
def test_onion_refuses_even_kernels(kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size={kernel_size}.*odd"):
        MetricConv2d(1, 1, kernel_size, pattern="onion")
