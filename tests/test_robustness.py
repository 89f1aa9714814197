"""Odd arguments, wild inputs, broken files, full disks and Ctrl-C: a result, or one clear refusal."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("hypothesis", reason="needs the extra [test]")

from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from timm_metricconv import LAYERS, MetricConv2d
from timm_metricconv.geometry import DRIFTS, PARAMETRIZATIONS, PATTERNS
from timm_metricconv.ops import place

ROOT = Path(__file__).parent.parent
KINDS = pytest.mark.parametrize("kind", LAYERS)
# Fixed examples: a failure in CI is the same failure at home. No deadline, machines differ.
FUZZ = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


# Arguments

PAIRS = st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3)))
COMMON = {
    "stride": PAIRS,
    "padding": st.one_of(st.none(), st.integers(0, 3), st.tuples(st.integers(0, 3), st.integers(0, 3))),
    "dilation": PAIRS,
    "bias": st.booleans(),
    "modulated": st.booleans(),
    "fixed_kernel": st.booleans(),
    "init": st.sampled_from(["identity", "paper"]),
    "backend": st.sampled_from([None, None, "torchvision", "grid_sample", "reference"]),
    "dtype": st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]),
}
OF_METRIC = {
    "parametrization": st.sampled_from(list(PARAMETRIZATIONS)),
    "drift": st.sampled_from(list(DRIFTS)),
    "pattern": st.sampled_from(list(PATTERNS)),
    "eps_omega": st.one_of(st.sampled_from([1, 1.0, 0.5, 0.1, 1e-4]), st.floats(1e-4, 1)),
    "scale": st.sampled_from([(0.1, 1.5), (1.0, 1.0), (0.01, 3.0), (1e-3, 1.01)]),
}


@st.composite
def layers(draw, kind):
    """A layer with its raw channels somewhere between untouched and ±1e4, or an example that is refused by name."""
    torch.manual_seed(draw(st.integers(0, 999)))
    groups = draw(st.integers(1, 3))
    channels = {"in_channels": groups * draw(st.integers(1, 2)), "out_channels": groups * draw(st.integers(1, 2))}
    options = {**COMMON, **(OF_METRIC if kind == "metric" else {})}
    arguments = {name: draw(values) for name, values in options.items()}
    kernel_size = draw(st.sampled_from([1, 2, 3, 3, 4, 5]))
    try:
        layer = LAYERS[kind](**channels, kernel_size=kernel_size, groups=groups, **arguments)
    except ValueError as error:
        # the two combinations of good values that cannot be: they name what to change
        assert ("kernel_size" in str(error) and "onion" in str(error)) or "scale=" in str(error)
        event("refused")
        assume(False)
    how = draw(st.sampled_from(["as made", "bent", "far", "far"]))
    event(how)
    if layer.predictor is not None and how != "as made":
        size = 1.0 if how == "bent" else 1e4
        with torch.no_grad():
            layer.predictor.weight.normal_(0, 0.3)
            layer.predictor.bias.copy_(size * torch.randn(layer.predictor.bias.shape).sign())
    return layer


def image(draw, layer, requires_grad=True):
    batch, size = draw(st.integers(0, 2)), (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    x = torch.randn(batch, layer.in_channels, *size) * draw(st.sampled_from([0.0, 1.0, 1.0, 30.0]))
    return x.to(layer.weight.dtype).requires_grad_(requires_grad)


def finite_gradients(layer, x):
    tensors = {"input": x, **dict(layer.named_parameters())}
    return [name for name, t in tensors.items() if t.grad is not None and not t.grad.isfinite().all()]


@KINDS
@FUZZ
@given(data=st.data())
def test_any_layer_runs_or_refuses(kind, data):
    layer = data.draw(layers(kind))
    x = image(data.draw, layer)
    try:
        out = layer(x)
    except ValueError as error:
        assert str(error).startswith("input:") and "kernel_size" in str(error)
        assert min(layer.out_size(x)) < 1
        return
    assert list(out.shape) == [len(x), layer.out_channels, *layer.out_size(x)] and out.dtype == x.dtype
    assert out.isfinite().all()
    positions = layer.positions(x)
    assert positions.dtype == torch.promote_types(x.dtype, torch.float32) and positions.isfinite().all()
    out.float().square().mean().backward() if out.numel() else out.sum().backward()
    # float16 overflows at 65504, which is what loss scaling is for
    if x.dtype != torch.float16:
        assert not finite_gradients(layer, x)


WRONG = {
    "in_channels": [0, -1, 2.0, "4", None, True],
    "out_channels": [0, -3, 1.5, None],
    "kernel_size": [0, -3, 3.0, "3", None, (3, 5), (3,), (3, 3, 3), True],
    "stride": [0, -1, 0.5, "2", (1, 0), (1,), None],
    "padding": [-1, 0.5, "same", (1, -1)],
    "dilation": [0, -2, 1.5, None],
    "groups": [0, -1, 3, 1.0, None],
    "init": ["zeros", "", None],
    "backend": ["cudnn", ""],
    "parametrization": ["logspf", None, 3],
    "drift": ["wind", None],
    "pattern": ["hexagon", None],
    "eps_omega": [0, -0.1, 1.1, 1e-9, math.nan, math.inf, "0.5", None],
    "scale": [0.5, (1.0,), (0.0, 1.0), (1.5, 0.1), (math.nan, 1.0), (0.1, math.inf), ("a", "b"), None],
}


@pytest.mark.parametrize("argument", WRONG)
@KINDS
def test_wrong_arguments_are_named(kind, argument):
    if argument in OF_METRIC and kind != "metric":
        with pytest.raises(TypeError, match=argument):  # an argument of metric layers alone
            LAYERS[kind](4, 4, 3, **{argument: WRONG[argument][0]})
        return
    for value in WRONG[argument]:
        with pytest.raises((ValueError, TypeError), match=argument):
            LAYERS[kind](**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, argument: value})


# Inputs


def bent(kind, **arguments):
    layer = LAYERS[kind](3, 4, 3, **arguments)
    if layer.predictor is not None:
        torch.nn.init.normal_(layer.predictor.weight, 0, 0.3)
    return layer


BACKENDS = pytest.mark.parametrize("backend", ["compiled", "torchvision", "grid_sample", "reference"])


@KINDS
@BACKENDS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_wild_pixels_do_not_crash(kind, backend, value):
    """Nothing finite is promised, but no wild index either; images without such a pixel are computed as ever."""
    layer = bent(kind, backend=backend)
    clean = torch.randn(2, 3, 6, 5)
    x = clean.clone()
    x[0, 1, 2, 3] = value
    x.requires_grad_()
    out = layer(x)
    out.sum().backward()
    assert out.shape == (2, 4, 6, 5) and x.grad.shape == x.shape
    torch.testing.assert_close(out[1], layer(clean)[1], rtol=1e-5, atol=1e-5)


@KINDS
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4, 1e-30])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 5)])
def test_flat_images(kind, value, size):
    x = torch.full((2, 3, *size), value, requires_grad=True)
    layer = bent(kind)
    out = layer(x)
    out.sum().backward()
    assert out.isfinite().all() and not finite_gradients(layer, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_raw_channels_at_1e4(parametrization, pattern, dtype):
    """Every corner of the cube ±1e4 and the origin, through the fused backend, which computes the ball by itself."""
    for drift in DRIFTS:
        layer = MetricConv2d(2, 2, 3, parametrization=parametrization, pattern=pattern, drift=drift, dtype=dtype)
        channels = layer.channels
        corners = torch.cartesian_prod(*[torch.tensor([-1e4, 1e4])] * channels)
        raw = torch.cat((torch.zeros(1, channels), corners)).T[None, :, :, None].to(dtype).requires_grad_()
        x = torch.randn(1, 2, raw.shape[2], 1, dtype=dtype)
        layer.predict = lambda _, raw=raw: raw.to(torch.promote_types(raw.dtype, torch.float32))
        out = layer(x)
        out.float().square().sum().backward()
        assert out.isfinite().all() and raw.grad.isfinite().all(), drift


def test_smallest_margin_keeps_the_radius():
    """The drift straight against a sample, as strong as it gets: float32 still tells F from zero."""
    layer = MetricConv2d(1, 1, 3, parametrization="logspd", sampling="rays", eps_omega=1e-4)
    drifts = -1e4 * layer.points[0]
    raw = torch.cat((torch.zeros(len(drifts), 3), drifts), 1).T[None, :, :, None].requires_grad_()
    radii = place(layer.samples(raw)).norm(dim=2)
    radii.sum().backward()
    assert radii.max() < layer.max_radius * (1 + 1e-3) and raw.grad.isfinite().all()


def test_network_with_nan_stays_in_its_image():
    model = timm.create_model("test_resnet_metric", num_classes=3).eval()
    x = torch.randn(2, 3, 48, 48)
    expected = model(x)[1]
    x[0, 0, 5, 5] = math.nan
    out = model(x)
    assert out[0].isnan().any()
    torch.testing.assert_close(out[1], expected, rtol=1e-5, atol=1e-5)


# Checkpoints


@pytest.fixture(scope="module")
def recipes():
    pytest.importorskip("accelerate", reason="needs the extra [recipes]")
    from timm_metricconv.recipes import config, network, train

    names = {"ConfigError": config.ConfigError, "RecipeError": config.RecipeError}
    return {**names, "module": train, "network": network}


def load(recipes, path, **changes):
    config = recipes["module"].TrainConfig(model="test_resnet_metric", checkpoint=str(path), **changes)
    return recipes["network"].build_model(config, 5)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(1)
    return timm.create_model("test_resnet_metric", num_classes=5).state_dict()


def rename(state):
    state["layer3.0.conv2.kernel"] = state.pop("layer3.0.conv2.weight")


def reshape(state):
    state["layer3.0.conv2.weight"] = state["layer3.0.conv2.weight"][:, :, :2, :2].contiguous()


def drop(state):
    del state["layer3.0.conv2.predictor.bias"]


def add(state):
    state["layer9.weight"] = torch.zeros(2)


@pytest.mark.parametrize(
    "change, message",
    [
        (rename, r"missing: layer3\.0\.conv2\.weight; unknown: layer3\.0\.conv2\.kernel"),
        (reshape, r"of another shape: layer3\.0\.conv2\.weight \(expected .*3, 3\), came .*2, 2\)"),
        (drop, r"missing: layer3\.0\.conv2\.predictor\.bias"),
        (add, r"unknown: layer9\.weight"),
    ],
)
def test_checkpoint_that_does_not_fit(recipes, state, tmp_path, change, message):
    changed = dict(state)
    change(changed)
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(recipes["ConfigError"], match=f"checkpoint: .*model.safetensors.*{message}"):
        load(recipes, tmp_path / "model.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_truncated_checkpoint(recipes, state, tmp_path, share, suffix):
    path = tmp_path / f"model.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(recipes["ConfigError"], match=f"checkpoint: .*model.{suffix}.*cannot be read.*is it complete"):
        load(recipes, path, allow_pickle=True)


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".tar", ""])
def test_pickle_is_refused_unless_asked_for(recipes, state, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save(state, path)
    with pytest.raises(recipes["ConfigError"], match=r"no \.safetensors file.*--allow_pickle true"):
        load(recipes, path)
    model = load(recipes, path, allow_pickle=True)
    assert torch.equal(model.layer3[0].conv2.weight, state["layer3.0.conv2.weight"])


@pytest.mark.parametrize("content", [lambda s, trap: {**s, "conv1.x": trap}, lambda s, trap: trap])
def test_allowed_pickle_runs_no_code(recipes, state, tmp_path, content):
    path, sprung = tmp_path / "model.pth", tmp_path / "sprung"
    torch.save(content(state, Trap(str(sprung))), path)
    with pytest.raises(recipes["ConfigError"], match="cannot be read"):
        load(recipes, path, allow_pickle=True)
    assert not sprung.exists()


@pytest.mark.parametrize("content", [[1, 2], {"weights": 3}, {"state_dict": {"conv1.0.weight": "x"}}, torch.zeros(3)])
def test_pickle_that_is_no_state_dict(recipes, tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(recipes["ConfigError"], match=r"checkpoint: .*model\.pth"):
        load(recipes, tmp_path / "model.pth", allow_pickle=True)


# Disks and signals


def tiny(recipes, output, **changes):
    values = {
        "model": "test_resnet_metric",
        "model_args": {"stem": "cifar", "layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]},
        "data": "digits/0-1",
        "input_size": 8,
        "batch_size": 64,
        "epochs": 2,
        "workers": 0,
        "output": str(output),
    }
    return recipes["module"].TrainConfig(**{**values, **changes})


@pytest.fixture
def mount(tmp_path):
    """Mounts a tmpfs with the given options on a folder, where that is allowed."""
    mounted = []

    def mount(options):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    try:
        yield mount
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    finally:
        for folder in mounted:
            subprocess.run(["umount", folder], check=True)


def test_output_below_a_file(recipes, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(recipes["ConfigError"], match=r"output: '.*file/run' cannot be written to: .*Not a directory"):
        recipes["module"].train(tiny(recipes, tmp_path / "file" / "run"), quiet=True)


def test_output_on_a_read_only_disk(recipes, mount):
    folder = mount("ro")
    with pytest.raises(recipes["ConfigError"], match=r"output: '.*run' cannot be written to: .*Read-only file system"):
        recipes["module"].train(tiny(recipes, folder / "run"), quiet=True)


def test_output_that_may_not_be_written(recipes, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(recipes["ConfigError"], match=r"output: .* cannot be written to: .*Permission denied"):
        recipes["module"].train(tiny(recipes, tmp_path / "run"), quiet=True)


@pytest.mark.slow
def test_full_disk_leaves_the_previous_checkpoint(recipes, tmp_path, mount):
    """A file system that is full from the second epoch on."""
    disk = mount("size=16m")
    whole, parted = tiny(recipes, tmp_path / "whole", epochs=3), tiny(recipes, disk / "parted", epochs=3)
    recipes["module"].train(whole, quiet=True)

    epoch, filler = recipes["module"]._Trainer.epoch, disk / "filler"

    def filling(self, number):
        row = epoch(self, number)
        if number == 1:
            with filler.open("wb") as file:
                free = os.statvfs(disk)
                file.write(bytes(max(0, free.f_bavail * free.f_frsize - 64 * 1024)))
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes["module"]._Trainer, "epoch", filling)
        with pytest.raises(Exception, match=r"No space left|os error 28|PytorchStreamWriter|SafetensorError"):
            recipes["module"].train(parted, quiet=True)
    assert [path.name for path in (parted.folder / "checkpoints").glob("epoch_?")] == ["epoch_1"]
    assert load_file(parted.folder / "model" / "model.safetensors")  # readable
    filler.unlink()
    assert recipes["module"].train(parted, quiet=True)["epochs"] == 3
    a, b = (load_file(run.folder / "model" / "model.safetensors") for run in (whole, parted))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_leaves_a_resumable_run(tmp_path, recipes, workers):
    config = tiny(recipes, tmp_path / "run", epochs=100_000, workers=workers)  # it never ends by itself
    names = ("model", "data", "input_size", "batch_size", "epochs", "workers", "output")
    arguments = [f"--{name}={getattr(config, name)}" for name in names]
    arguments += [f"--model_args.{key}={value}" for key, value in config.model_args.items()]
    command = [sys.executable, "scripts/train.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "errors").open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's children ignore it
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 400
        while not any(int(path.name[6:]) >= 2 for path in (config.folder / "checkpoints").glob("epoch_*[0-9]")):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "errors").read_text()
            time.sleep(0.02)
        for _ in range(4):  # Python loses an interrupt that comes while a loader's process is forked: once more then
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the loader's processes as well
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
                break
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    errors = (tmp_path / "errors").read_text()
    assert process.returncode == 1, errors
    message = "interrupted: the same command goes on from the last checkpoint, if there is one.\n"
    assert message in errors
    # Python's own words may stand beside it: of an interrupt that it lost, of a loader's process that was being forked
    assert workers or "Exception ignored" in errors or errors == message
    assert not (config.folder / "summary.json").exists()
    trainer = recipes["module"]
    checkpoints = trainer._Checkpoints(config.folder, trainer._Trainer(config, True, None).accelerator)
    assert checkpoints.resume() >= 2
