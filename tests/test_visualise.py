"""The recipe of the pictures: what it writes and what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("accelerate", reason="needs the extra [recipes]")

from timm_metricconv.recipes.config import ConfigError
from timm_metricconv.recipes.network import create_model
from timm_metricconv.recipes.visualise import VisualiseConfig, as_input, load_image, visualise

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)


def test_an_untrained_network_with_metric_groups(tmp_path, capsys):
    """Its random predictors bend the balls, and the pictures are the same every time."""
    file = tmp_path / "image.png"
    Image.fromarray(IMAGE).save(file)
    arguments = {"image": str(file), "size": 48, "model": "test_convnext_metric", "random": 1.0, "dpi": 40}
    once, again = (
        [path.read_bytes() for path in visualise(VisualiseConfig(output=str(tmp_path / folder), **arguments))]
        for folder in ("once", "again")
    )
    assert once == again and len(once) == 5
    assert "plain pattern" not in capsys.readouterr().out


def test_the_recipe_writes_its_pictures(tmp_path):
    file = tmp_path / "image.png"
    Image.fromarray(IMAGE).save(file)
    written = visualise(
        VisualiseConfig(output=str(tmp_path / "out"), image=str(file), size=48, model="test_resnet_metric", dpi=40)
    )
    assert [path.name for path in written] == [
        "unit_balls.png",
        "geodesic_balls.png",
        *(f"layer2.0.conv1-{what}.png" for what in ("samples", "balls", "maps")),
    ]
    for path in written:
        assert np.asarray(Image.open(path)).std() > 0


def test_a_photograph_stands_upright_and_16_bits_are_refused(tmp_path):
    """A camera writes how it was held, and Pillow would show 16 bits as white."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it to the right
    Image.new("RGB", (60, 30)).save(tmp_path / "photo.jpg", exif=exif)
    assert load_image(str(tmp_path / "photo.jpg")).shape == (60, 30, 3)
    Image.fromarray(np.full((9, 9), 4096, np.uint16)).save(tmp_path / "scan.png")
    with pytest.raises(ConfigError, match=r"scan\.png.* expected 8 bits a channel"):
        load_image(str(tmp_path / "scan.png"))


def test_pictures_as_networks_take_them():
    """A grey network gets the picture in grey; one of fixed input size gets that size."""
    grey = as_input(create_model("test_resnet", {"in_chans": 1}), IMAGE)
    expected = np.asarray(Image.fromarray(IMAGE).convert("L")) / 255
    torch.testing.assert_close(grey[0, 0], torch.as_tensor((expected - 0.5) / 0.5, dtype=torch.float32))
    fixed = create_model("test_vit", {})
    assert as_input(fixed, IMAGE).shape[1:] == fixed.pretrained_cfg["input_size"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"image": "thin.png"}, r"thin.png' is 50×2 pixels; expected a longer side of at most 8 times the shorter"),
        ({"cam": {"a": "test_vit"}}, r"cam: a: Grad-CAM needs feature maps"),
        ({"image": "no_such_picture"}, "no file and no picture"),
        ({"metric": {"tau": 2.0}}, "tau"),
        ({"metric": {"tilt": 2.0}}, "tilt"),
        ({"points": [[31, 0], [32, 5]]}, r"points: \[?\(?32.* lies outside of camera, 32×32 pixels"),
        ({"cam": {"a": "test_resnet_metric"}, "cam_class": 1000}, "cam_class: a has the classes 0 to 999; got 1000"),
        ({"model": "test_resnet"}, "no such layer"),
        ({"model": "test_resnet_metric", "layers": ["layer1"]}, r"layer2\.0\.conv1"),
    ],
)
def test_the_recipe_refuses_what_it_cannot_do(tmp_path, monkeypatch, wrong, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 2)).save("thin.png")
    with pytest.raises(ConfigError, match=message):
        visualise(VisualiseConfig(**{"output": str(tmp_path / "out"), "image": "camera", "size": 32, **wrong}))
    assert not (tmp_path / "out").exists()
