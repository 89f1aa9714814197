"""The scripts behind the pages of results measure what they say."""

import csv
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("accelerate", reason="needs the extra [recipes]")

from timm_metricconv.layers import LAYERS, BallConv2d, DeformConv2d
from timm_metricconv.recipes import compare
from timm_metricconv.recipes.config import build
from timm_metricconv.recipes.data import make_datasets
from timm_metricconv.recipes.denoise_data import image_paths
from timm_metricconv.recipes.report import csv_text
from timm_metricconv.recipes.settings import TrainConfig

ROOT = Path(__file__).parent.parent


def script(path):
    return runpy.run_path(str(ROOT / path))


@pytest.mark.parametrize("part", ["shift", "stretch", "turn", "rest"])
def test_shares_of_a_known_displacement(part):
    layer = DeformConv2d(1, 1, 3)
    x, y = layer.points.flatten(0, 1).T
    moved = {
        "shift": (torch.full_like(x, 0.3), torch.full_like(x, -0.1)),
        "stretch": (0.2 * x + 0.1 * y, 0.1 * x - 0.3 * y),
        "turn": (-0.2 * y, 0.2 * x),
        "rest": (x * y, torch.zeros_like(x)),
    }[part]
    with torch.no_grad():
        layer.predictor.bias.copy_(torch.stack(moved[::-1], -1).flatten())  # (dy, dx) of each tap
    affine = script("docs/affine.py")
    loader = [(torch.rand(2, 1, 5, 5), None), (torch.rand(3, 1, 5, 5), None)]
    (found,) = affine["moved"](nn.Sequential(layer), loader).values()
    square = torch.stack(moved).square().sum(0).mean()
    expected = square.double() * torch.tensor([float(name == part) for name in affine["PARTS"]], dtype=torch.float64)
    torch.testing.assert_close(found[:4], expected, rtol=1e-5, atol=1e-6)
    assert found[4] == pytest.approx(1 / 3)


def test_alignment_is_one_where_axes_turn_with_their_shapes():
    alignment = script("docs/pose.py")["alignment"]
    generator = torch.Generator().manual_seed(0)
    angles = 2 * math.pi * torch.rand(400, generator=generator, dtype=torch.float64)
    labels = torch.arange(400) % 4
    turning = torch.polar(1 + angles, 2 * (angles + labels))  # a direction of its own in each shape
    assert alignment(turning, angles, labels) == pytest.approx(1)
    assert alignment(turning.conj(), angles, labels) < 0.2
    assert alignment(torch.ones_like(turning), angles, labels) < 0.2


def test_axes_are_the_long_ones_of_the_samples():
    layer = DeformConv2d(1, 1, 3)
    points = layer.points.flatten(0, 1)
    along = torch.tensor([math.cos(0.4), math.sin(0.4)])  # the samples are twice as far apart along it
    with torch.no_grad():
        layer.predictor.bias.copy_(((points @ along)[:, None] * along).flip(-1).flatten())
    (axis,) = script("docs/pose.py")["axes"](nn.Sequential(layer), torch.rand(2, 1, 6, 6)).values()
    expected = torch.polar(torch.tensor(math.log(2.0)), torch.tensor(0.8)).to(axis)
    torch.testing.assert_close(axis, expected.expand(2), rtol=1e-5, atol=1e-5)


def test_crops_of_photographs_are_labelled_by_their_turn(tmp_path, monkeypatch):
    """No photograph is in both splits, the classes are balanced, and turned back each crop is as its photograph."""
    names = [f"{number}.png" for number in range(7)]
    photographs = script("docs/photographs.py")
    monkeypatch.setitem(photographs["make"].__globals__, "ROOT", tmp_path / "share")
    monkeypatch.setitem(photographs["make"].__globals__, "PHOTOGRAPHS", {"wallpapers": names})
    with pytest.raises(SystemExit, match=r"apt-get install .* wallpapers"):
        photographs["make"](tmp_path / "none")
    (tmp_path / "share").mkdir()
    for number, name in enumerate(names):  # darker downwards, redder to the right, and blue tells which one it is
        picture = np.full((60, 90, 3), 30 * number, np.uint8)
        picture[..., 0], picture[..., 1] = np.arange(90), np.arange(60, 0, -1)[:, None]
        Image.fromarray(picture).save(tmp_path / "share" / name)
    for again in ("a", "b"):
        photographs["make"](tmp_path / again, size=16)
    train, val = make_datasets(build(TrainConfig, {"data": str(tmp_path / "a")}))
    seen = []
    for dataset in (train, val):
        assert dataset.classes == ["0", "90", "180", "270"]
        assert np.bincount(dataset.labels).tolist() == [len(dataset) // 4] * 4
        crops = [np.asarray(image) for image, _ in dataset]
        for crop, label in zip(crops, dataset.labels, strict=True):
            red, green, _ = np.rot90(crop, -label).astype(int).transpose(2, 0, 1)
            assert (np.diff(red, axis=1) >= 0).all() and np.ptp(red, axis=0).max() == 0 < np.ptp(red)
            assert (np.diff(green, axis=0) <= 0).all() and np.ptp(green, axis=1).max() == 0 < np.ptp(green)
        seen.append({int(crop[0, 0, 2]) for crop in crops})
        assert len({crop.tobytes() for crop in crops}) == len(crops)
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == len(names)
    for name, dataset, part in (("train", train, True), ("val", val, False)):
        upright = sorted(Path(file).stem for file in (tmp_path / "a" / name / "0").iterdir())
        assert [Path(path).stem for path in image_paths("bsds300", str(tmp_path / "a"), part)] == upright
        assert all(Path(file).read_bytes() == Path(file.replace("/a/", "/b/")).read_bytes() for file in dataset.files)


def test_ablations_start_as_the_standard_convolution_and_keep_their_bounds(monkeypatch):
    monkeypatch.setattr(compare, "OTHERS", compare.OTHERS)
    known = dict(LAYERS)
    try:
        script("docs/ablations.py")
        made = {name: cls for name, cls in LAYERS.items() if name not in known}
    finally:
        for name in LAYERS.keys() - known.keys():
            del LAYERS[name]
    assert made.keys() <= set(compare.OTHERS) and len(made) == 15
    farthest = {"wind-0.5": 1.95 * 2**0.5 + 0.45, "wind-1": 1.95 * 2**0.5 + 0.9, "wind-2": 1.95 * 2**0.5 + 1.8}
    farthest |= {"metric-normed": 1.95 * (2**0.5 + 0.9), "frame-0.32": 1.32 * (2**0.5 + 0.9)}
    farthest |= {f"frame-{bound}": (1 + bound) * (2**0.5 + 0.9) for bound in (0.25, 0.5, 2)}
    farthest |= {"frame-symmetric": 1.95 * (2**0.5 + 0.9), "polynomial-1": 2 * 2**0.5, "polynomial-2": 2 * 2**0.5}
    farthest |= {f"hybrid-{r}": 1.95 * (2**0.5 + 0.9) + r * 2**0.5 for r in (0.25, 1)}
    conv, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 7, 7)
    for name, cls in made.items():
        layer: BallConv2d = cls.from_conv(conv)
        torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-5)
        nn.init.normal_(layer.predictor_head().weight, std=30)
        radius = layer.positions(x).norm(dim=2).max()
        assert radius <= farthest.get(name, math.inf) * 1.0001 and (name in farthest or radius > 10), name


def test_tables(tmp_path, monkeypatch):
    """Rows are merged, newer in place of older; differences are over the seeds that both rows have."""
    monkeypatch.chdir(tmp_path)
    tables = script("results/tables.py")

    def write(file, **rows):
        file = Path("results", file)
        file.parent.mkdir(exist_ok=True)
        records = [
            {"conv": conv, "init": "scratch", "kernel": "learnable", "seeds": list(range(len(top1))), "top1": top1}
            | {"top1_mean": sum(top1) / len(top1), "top1_std": 1.0, "vs_standard": None}
            for conv, top1 in rows.items()
        ]
        file.write_text(csv_text(records))

    def rows(file):
        with Path("results", file).open(newline="") as lines:
            return {row["conv"]: row for row in csv.DictReader(lines)}

    write("t-rate-0.1.csv", standard=[1.0, 2.0, 3.0], metric=[0.0, 0.0])
    write("new.csv", metric=[2.0, 4.0], deform=[5.0, 6.0])
    tables["merge"]("results/t-rate-0.1.csv", "results/new.csv")
    merged = rows("t-rate-0.1.csv")
    assert list(merged) == ["standard", "deform", "metric"] and merged["metric"]["top1"] == "2.0 4.0"
    assert float(merged["metric"]["vs_standard.difference"]) == 1.5 and not merged["standard"]["vs_standard.low"]
    assert float(merged["deform"]["vs_metric.difference"]) == 2.5
    file = Path("results/new.csv")
    file.write_text(file.read_text().replace("0 1", "7 8"))
    tables["merge"]("results/t-rate-0.1.csv", "results/new.csv")
    metric = rows("t-rate-0.1.csv")["metric"]
    assert (metric["seeds"], metric["top1"], float(metric["top1_mean"])) == ("0 1 7 8", "2.0 4.0 2.0 4.0", 3)
    tables["merge"]("results/t-rate-0.1.csv", "results/new.csv")
    assert rows("t-rate-0.1.csv")["metric"]["seeds"] == "7 8"
    write("new.csv", metric=[2.0, 4.0])
    tables["merge"]("results/t-rate-0.1.csv", "results/new.csv")
    write("t-rate-1.0.csv", metric=[4.0, 5.0])
    tables["rates"]("t")
    (metric,) = rows("t-rates.csv").values()
    assert (metric["best"], float(metric["0.1.loss"]), metric["1.0.loss"]) == ("1.0", 1.5, "")
    found = tables["difference"](*map(tables["named"], ("t-rate-1.0.csv:metric", "t-rate-0.1.csv:metric")))
    assert found.difference == 1.5


def test_derived_tables_are_up_to_date(tmp_path, monkeypatch):
    """`python results/tables.py rates TASK` was run after its files changed."""
    (tmp_path / "results").mkdir()
    for file in (ROOT / "results").glob("*-rate*.csv"):
        (tmp_path / "results" / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    tables, derived = script("results/tables.py"), sorted(Path("results").glob("*-rates.csv"))
    assert derived
    for file in derived:
        before = file.read_text()
        tables["rates"](file.name.removesuffix("-rates.csv"))
        assert file.read_text() == before, file.name
