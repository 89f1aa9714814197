"""Segmentation: the data, its scores, a run that stops and goes on, the comparison, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="needs the extra [recipes]")
pytest.importorskip("segmentation_models_pytorch", reason="needs the extra [consumers]")

import segmentation_models_pytorch as smp
import timm
from PIL import ExifTags, Image
from safetensors.torch import save_file

from timm_metricconv import BallConv2d
from timm_metricconv.recipes import segment_data
from timm_metricconv.recipes import train as training
from timm_metricconv.recipes.compare import CompareConfig, compare
from timm_metricconv.recipes.config import ConfigError
from timm_metricconv.recipes.segment import IGNORED, SEGMENTATION, SegmentationLoss, build_segmenter
from timm_metricconv.recipes.segment_data import CurveDataset, make_mask_datasets, make_mask_loader
from timm_metricconv.recipes.train import TrainConfig, train

DECODER = {"decoder_channels": [8, 8, 8, 8, 8]}


def disc(size, centre, radius):
    y, x = np.mgrid[:size, :size]
    return ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Bright discs on dark noise, 8 + 4 images; the masks as 0 and 255."""
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for kind in ("images", "masks"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for i in range(count):
            mask = disc(40, random.uniform(10, 30, 2), 8)
            pixels = (mask[..., None] * 150 + random.uniform(0, 60, (40, 40, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / "images" / f"{i}.jpg")
            Image.fromarray(mask * 255).save(tmp_path / "data" / split / "masks" / f"{i}.png")
    return tmp_path / "data"


def tiny(tmp_path, folder, **changes) -> TrainConfig:
    values = {
        "task": "segmentation",
        "model": "test_resnet_metric",
        "decoder_args": DECODER,
        "data": str(folder),
        "input_size": 32,
        "scale": [0.5, 1.0],
        "batch_size": 4,
        "epochs": 2,
        "workers": 0,
        "output": str(tmp_path / "run"),
        **changes,
    }
    return TrainConfig(**values)


def test_scores_are_those_of_counting(tmp_path):
    """Dice and IoU of three classes over uneven batches, pixels that do not matter left out."""
    torch.manual_seed(0)
    output, target = torch.randn(5, 3, 6, 7), torch.randint(0, 3, (5, 6, 7))
    target[torch.rand(target.shape) < 0.2] = IGNORED
    rows = [SEGMENTATION.measure(output[part], target[part]) for part in (slice(0, 3), slice(3, 5))]
    scores = SEGMENTATION.summarise(torch.cat(rows))
    dice, iou = [], []
    for number in (1, 2):
        both = ours = theirs = 0
        for guess, truth in zip(output.argmax(1).flatten().tolist(), target.flatten().tolist(), strict=True):
            if truth != IGNORED:
                both += guess == truth == number
                ours += guess == number
                theirs += truth == number
        dice.append(2 * both / (ours + theirs))
        iou.append(both / (ours + theirs - both))
    assert scores["dice"] == pytest.approx(100 * sum(dice) / 2) and scores["iou"] == pytest.approx(100 * sum(iou) / 2)
    assert scores.keys() == {"val_loss", *SEGMENTATION.scores}


def test_a_class_that_is_nowhere_counts_nowhere():
    """Class 2 of three is neither in the mask nor in the output; a wrong output scores nothing and not a half."""
    target = torch.ones(1, 4, 4, dtype=torch.int64)
    for guess, score in ((0, 0), (1, 100)):
        output = torch.nn.functional.one_hot(torch.full_like(target, guess), 3).movedim(-1, 1).float()
        scores = SEGMENTATION.summarise(SEGMENTATION.measure(output, target))
        assert scores["dice"] == scores["iou"] == score


def test_the_loss_is_a_mean_over_the_pixels_that_count():
    output, target = torch.randn(1, 3, 8, 8), torch.randint(0, 3, (1, 8, 8))
    target[:, :6] = IGNORED
    expected = torch.nn.functional.cross_entropy(output, target, ignore_index=IGNORED)
    rows = SEGMENTATION.measure(output, target)
    assert SEGMENTATION.summarise(rows)["val_loss"] == pytest.approx(expected.item())
    dice = smp.losses.DiceLoss("multiclass", ignore_index=IGNORED)
    torch.testing.assert_close(SegmentationLoss()(output, target), expected + dice(output, target))
    assert SegmentationLoss()(output, torch.full_like(target, IGNORED)).isfinite()


def test_decoders_of_a_seed_start_alike(tmp_path, folder):
    """Of each convolution, or a difference paired by seed would hold that of two decoders."""

    def weights(seed, **changes):
        model = build_segmenter(tiny(tmp_path, folder, seed=seed, **changes), 2)
        return torch.cat([p.flatten() for part in (model.decoder, model.segmentation_head) for p in part.parameters()])

    standard = weights(0, model_args={"stages": []})
    assert torch.equal(weights(0), standard) and torch.equal(weights(0, model="test_resnet_deform"), standard)
    assert not torch.equal(weights(1), standard)


def test_a_perfect_mask_costs_nothing_and_ignored_pixels_have_no_gradient():
    target = torch.randint(0, 2, (2, 8, 8))
    sure = 50 * torch.nn.functional.one_hot(target, 2).permute(0, 3, 1, 2).float()
    assert SegmentationLoss()(sure, target) < 1e-5 < 1 < SegmentationLoss()(-sure, target)
    target[:, :4] = IGNORED
    output = torch.zeros(2, 2, 8, 8, requires_grad=True)
    SegmentationLoss()(output, target).backward()
    assert not output.grad[:, :, :4].any() and output.grad[:, :, 4:].all()


def test_image_and_mask_are_cropped_and_flipped_together(tmp_path, folder):
    """Where the image is its own mask, it still is after the transform, up to the border that is interpolated."""

    class Itself(segment_data.MaskDataset):
        def read(self, index):
            mask = disc(60, (20, 35), 15)
            return Image.fromarray(mask * 255).convert("RGB"), mask

    dataset = Itself(8, 2)
    cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "input_size": (3, 64, 64)}
    config = tiny(tmp_path, folder, scale=[0.2, 0.6], input_size=64, batch_size=8)
    images, masks = next(iter(make_mask_loader(config, dataset, cfg, True)))
    assert images.shape == (8, 3, 64, 64) and masks.shape == (8, 64, 64) and masks.dtype == torch.int64
    assert type(images) is type(masks) is torch.Tensor
    assert ((images[:, 0] > 0.5) != (masks == 1)).float().mean() < 0.03 < masks.float().std(0).max()


def test_curves_follow_from_their_number_alone():
    train_set, val_set = CurveDataset("train"), CurveDataset("val")
    for dataset in (train_set, val_set):
        image, mask = dataset.read(3)
        again = CurveDataset(dataset.split).read(3)
        assert image.tobytes() == again[0].tobytes() and np.array_equal(mask, again[1])
        assert mask.shape == (64, 64) and 0.01 < np.mean([dataset.read(i)[1].mean() for i in range(20)]) < 0.2
    assert train_set.read(3)[0].tobytes() != val_set.read(3)[0].tobytes()
    for ours, theirs in zip(train_set.regions, val_set.regions, strict=True):
        assert ours.shape[1] + theirs.shape[1] == 512


def test_encoder_starts_as_the_classifier(tmp_path, folder):
    """The one place that makes networks makes the encoder: its kernels, and which of them are fixed."""
    config = tiny(tmp_path, folder, kernel_start="uniform", fixed_kernel=True, model_args={"stages": [2, 4]})
    model = build_segmenter(config, 3)
    layers = [layer for layer in model.encoder.modules() if isinstance(layer, BallConv2d)]
    assert len(layers) == 4
    for layer in layers:
        assert not layer.weight.requires_grad and layer.weight.unique().numel() == 1
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    "decoder, model", [("Unet", "test_efficientnet"), ("Unet", "mobilenetv3_small_050"), ("DPT", "test_vit")]
)
def test_encoders_of_any_feature_class_start_as_the_classifier(tmp_path, folder, decoder, model):
    """EfficientNets and MobileNets have features of their own, and DPT takes a whole ViT."""
    torch.manual_seed(3)
    classifier = timm.create_model(model).eval()
    file = tmp_path / "classifier.safetensors"
    save_file(classifier.state_dict(), file)
    arguments = {} if decoder == "DPT" else DECODER
    size = classifier.pretrained_cfg["input_size"][-1]
    config = tiny(tmp_path, folder, model=model, decoder=decoder, decoder_args=arguments, checkpoint=str(file))
    config.input_size = size
    encoder, x = build_segmenter(config, 2).encoder.eval(), torch.randn(1, 3, size, size)
    with torch.no_grad():
        ours, theirs = encoder(x), classifier.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close((ours[0] if decoder == "DPT" else ours)[-1], theirs[-1])


@pytest.mark.parametrize("decoder, stride", [("DeepLabV3", 8), ("DeepLabV3Plus", 16)])
def test_the_encoder_has_the_stride_of_its_decoder(tmp_path, folder, decoder, stride):
    config = tiny(tmp_path, folder, decoder=decoder, decoder_args={"encoder_output_stride": stride})
    model = build_segmenter(config, 3).eval()
    with torch.no_grad():
        assert model.encoder(torch.zeros(1, 3, 64, 64))[-1].shape[2:] == (64 // stride, 64 // stride)
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3, 64, 64)


def test_a_grey_network_trains_on_grey_images(tmp_path, folder):
    config = tiny(tmp_path, folder, model_args={"in_chans": 1})
    model, train_set = build_segmenter(config, 2), make_mask_datasets(config)[0]
    images, _ = next(iter(make_mask_loader(config, train_set, model.pretrained_cfg, True)))
    assert images.shape == (4, 1, 32, 32) and model(images).shape == (4, 2, 32, 32)


@pytest.mark.slow
def test_interrupted_run_equals_uninterrupted(tmp_path, folder, monkeypatch):
    whole = tiny(tmp_path, folder, output=str(tmp_path / "whole"))
    summary = train(whole, quiet=True)
    assert summary == json.loads((whole.folder / "summary.json").read_text())
    assert summary["geometry"] and 0 <= summary["iou"] <= summary["dice"] <= 100
    parted = tiny(tmp_path, folder)
    epoch = training._Trainer.epoch

    def killed(self, number):
        if number == 1:
            raise KeyboardInterrupt
        return epoch(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(training._Trainer, "epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            train(parted, quiet=True)
    train(parted, quiet=True)
    models = [smp.from_pretrained(str(run.folder / "model")).eval() for run in (whole, parted)]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    # what was saved has the scores that the summary has
    cfg = timm.get_pretrained_cfg(whole.model).to_dict()
    images, masks = next(iter(make_mask_loader(whole, make_mask_datasets(whole)[1], cfg, False)))
    with torch.no_grad():
        scores = SEGMENTATION.summarise(SEGMENTATION.measure(models[0](images), masks))
    assert scores["dice"] == pytest.approx(summary["dice"], rel=1e-4)


@pytest.mark.slow
def test_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(segment_data, "CURVES", {"train": 8, "val": 4})
    config = CompareConfig(
        task="segmentation",
        output=str(tmp_path / "compare"),
        model="test_resnet",
        conv=["standard", "metric"],
        init=["transfer"],
        kernel=["learnable"],
        source={"data": "digits/0-1", "train_images": 16, "val_images": 8, "epochs": 1},
        train={"data": "curves", "input_size": 32, "batch_size": 8, "epochs": 1, "workers": 0, "decoder_args": DECODER},
    )
    config.source |= {"batch_size": 8}
    records = compare(config)
    assert json.loads((config.folder / "summary.json").read_text()) == records
    for record in records:
        for score in SEGMENTATION.scores:
            assert record[f"{score}_mean"] == pytest.approx(sum(record[score]) / 2)
    standard, metric = records
    difference = metric["vs_standard"]["difference"]
    assert difference == pytest.approx(metric["dice_mean"] - standard["dice_mean"])
    assert "Dice (%)" in (config.folder / "summary.md").read_text()


def save_mask(path, values):
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def corrupt(path):
    """Pillow refuses this with a ValueError, where most broken files give an OSError."""
    content = bytearray(path.read_bytes())
    content[11] = 0
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: (root / "train/masks/3.png").unlink(), "train/images: '3' has no mask of that name"),
        (lambda root: (root / "val/images/1.jpg").unlink(), "val/masks: '1' has no image of that name"),
        (lambda root: save_mask(root / "train/masks/2.png", np.zeros((40, 30))), "40×40, its mask 30×40"),
        (lambda root: save_mask(root / "val/masks/2.png", np.zeros((40, 40, 3))), "is in colour"),
        (
            lambda root: (root / "val/masks/2.png").unlink() or save_mask(root / "val/masks/2.jpg", np.eye(40) * 255),
            "is a JPEG file",
        ),
        (lambda root: (root / "val/masks/0.png").write_bytes(b"no image"), "val: '0' cannot be used"),
        (lambda root: corrupt(root / "val/masks/0.png"), "val: '0' cannot be used.*Truncated IHDR"),
        (lambda root: (root / "val").rename(root / "test"), "there is no folder .*val/images"),
        (
            lambda root: (
                Image.open(root / "val/masks/1.png").resize((40, 40), box=(2, 2, 37, 37)).save(root / "val/masks/1.png")
            ),
            r"val/masks/1.png has the pixels 0, .* values\): expected class numbers without a gap",
        ),
        (
            lambda root: [save_mask(p, np.asarray(Image.open(p)) // 255 * 128) for p in root.glob("*/masks/*")],
            "has the pixels 0, 128: expected class numbers without a gap, or 0 and 255",
        ),
        (
            lambda root: [save_mask(p, np.arange(1600).reshape(40, 40) % 256) for p in root.glob("*/masks/*")],
            r"has the pixels 0, 1, 2, 3, 4, … \(256 values\)",
        ),
        (
            lambda root: shutil.copy(root / "val/images/1.jpg", root / "val/images/1.png"),
            "1.jpg and 1.png have one name",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, folder, spoil, message):
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        train(tiny(tmp_path, folder), quiet=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_batch_of_all_processes_must_be_had(tmp_path, folder, monkeypatch):
    """Otherwise there is no step, and the network that is saved has not learned."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    config = tiny(tmp_path, folder, batch_size=5)
    with pytest.raises(ConfigError, match="batch_size=5 in each of 2 processes is more than the 8 training images"):
        make_mask_loader(config, make_mask_datasets(config)[0], {}, True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_classes": 2, "data": "classes"}, "has the value 2, but num_classes=2"),
        ({"train_images": 9}, "train_images: expected at most 8"),
        ({"batch_size": 9}, "more than the 8 training images"),
        ({"mixup": 0.2}, "mixup: segmentation has none"),
        ({"warp": {"rotation": 30}}, "warp: segmentation has none"),
        ({"decoder": "Unett"}, "decoder: Unett over test_resnet_metric"),
        ({"decoder": "FPN", "decoder_args": {}, "input_size": 40}, "decoder: FPN .* at 40×40 pixels: .*divisible"),
        (
            {"decoder": "FPN", "decoder_args": {}, "model_args": {"stem": "cifar"}},
            "decoder: FPN .*stem and layout matter",
        ),
    ],
)
def test_refusals(tmp_path, folder, changes, message):
    if changes.get("data"):
        changes = {**changes, "data": str(folder)}
        save_mask(folder / "train/masks/5.png", np.arange(1600).reshape(40, 40) % 3)
    with pytest.raises(ConfigError, match=message):
        train(tiny(tmp_path, folder, **changes), quiet=True)


def test_photographs_and_masks_stand_upright(tmp_path, folder):
    """A camera held sideways and an upright mask; a mask with such a note is turned too, and hidden files are none."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    expected = Image.fromarray(np.pad(disc(40, (12, 12), 8), ((0, 0), (0, 20))) * 255)
    turned = expected.transpose(Image.Transpose.ROTATE_90)
    turned.convert("RGB").save(folder / "val/images/0.jpg", exif=exif)
    for mask, note in ((expected, {}), (turned, {"exif": exif})):
        mask.save(folder / "val/masks/0.png", **note)
        (folder / "val/images/._0.jpg").write_bytes(b"resource fork")
        segment_data._pairs.cache_clear()
        dataset = make_mask_datasets(tiny(tmp_path, folder))[1]
        image, numbers = dataset[0]
        assert len(dataset) == 4 and ((image[0] > 127) == numbers).float().mean() > 0.99


def test_classes_are_counted_and_ignored_pixels_are_no_class(tmp_path, folder):
    mask = np.arange(1600).reshape(40, 40) % 4
    mask[mask == 3] = IGNORED
    for split in ("train", "val"):
        for path in (folder / split / "masks").iterdir():
            save_mask(path, mask)
    dataset = make_mask_datasets(tiny(tmp_path, folder))[0]
    assert len(dataset.classes) == 3 and set(dataset[0][1].flatten().tolist()) == {0, 1, 2, IGNORED}
