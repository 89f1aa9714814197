"""The demo: its functions, and the page in a real browser, started as a user starts it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

pytest.importorskip("gradio", reason="needs the extra [app]")
pytest.importorskip("accelerate", reason="needs the extra [recipes]")

from timm_metricconv.recipes.config import ConfigError
from timm_metricconv.recipes.visualise import load_image

DEMO = Path(__file__).parent.parent / "demo"
LAYER = "layer2.0.conv1"


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("demo_app", DEMO / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def networks(app):
    return app.example_networks()


IMAGE = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)


def differ(one, other):
    return one.size != other.size or np.any(np.asarray(one) != np.asarray(other))


def test_example_networks_differ_in_their_predictors_alone(app, networks):
    """What the page says of them; and no convolution reads the plain lattice, which would show nothing."""
    shared = [
        {key: value for key, value in model.state_dict().items() if ".predictor." not in key}
        for model in networks.values()
    ]
    for other in shared[1:]:
        torch.testing.assert_close(other, shared[0], rtol=0, atol=0)
    for model in networks.values():
        for name in app.layers_of(networks):
            view = app.viz.capture(model, name, app.as_input(model, IMAGE))
            lattice = view.layer.points.flatten(0, -2)[None, :, :, None, None]
            assert (view.positions() - lattice).abs().max() > 0.1


def test_pictures_are_on_this_machine(app):
    for name in app.PICTURES:
        assert min(load_image(name, 32).shape[:2]) == 32


def test_each_control_changes_its_picture(app, networks):
    samples = app.draw_samples(networks, IMAGE, LAYER, (20, 20))
    assert differ(samples, app.draw_samples(networks, IMAGE, LAYER, (60, 20)))
    assert differ(samples, app.draw_samples(networks, IMAGE, "layer3.0.conv2", (20, 20)))
    balls = app.draw_balls(IMAGE, 10, 0.8)
    assert differ(balls, app.draw_balls(IMAGE, 0, 0.8)) and differ(balls, app.draw_balls(IMAGE, 10, -0.8))
    pytest.importorskip("pytorch_grad_cam")
    assert differ(app.draw_grad_cam(networks, IMAGE), app.draw_grad_cam(networks, IMAGE[::-1].copy()))


def test_networks_of_runs(app, tmp_path):
    """Trained networks in the place of the example's, called as their runs."""
    for run, name in (("one", "test_resnet_deform"), ("two", "test_resnet_metric")):
        model = timm.create_model(name, num_classes=3)
        timm.models.save_for_hf(model, tmp_path / run / "model", safe_serialization=True)
    networks = app.load_networks([f"local-dir:{tmp_path / run / 'model'}" for run in ("one", "two")])
    assert list(networks) == ["one", "two"] and LAYER in app.layers_of(networks)
    app.draw_samples(networks, IMAGE, LAYER, (20, 20))


def test_what_cannot_be_shown_is_told(app, networks, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(app.gr.Error, match=r"broken\.png' is no image"):
        app.told(load_image)(str(tmp_path / "broken.png"))
    with pytest.raises(ValueError, match=rf"layer='layer9': expected one of {LAYER}"):
        app.draw_samples(networks, IMAGE, "layer9", (20, 20))
    with pytest.raises(ConfigError, match="share no"):
        app.layers_of({"standard": timm.create_model("test_resnet")})
    with pytest.raises(ConfigError, match="no_such_model"):
        app.load_networks(["no_such_model"])


def test_the_space_names_what_exists(app):
    """The Hub reads the front matter of README.md and installs requirements.txt."""
    front = yaml.safe_load((DEMO / "README.md").read_text().split("---")[1])
    assert front["sdk"] == "gradio" and (DEMO / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60  # the Hub's limit
    assert (DEMO / "requirements.txt").read_text().strip() == "timm_metricconv[app]"


@pytest.fixture
def url(tmp_path):
    """The page, served by the documented command."""
    places = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_TEMP_DIR": str(tmp_path)}
    path = os.pathsep.join([str(DEMO.parent), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [sys.executable, "-u", str(DEMO / "app.py")],
        env={**os.environ, **places, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said = []
        for line in server.stdout:
            said.append(line)
            if "Running on" in line:
                break
        else:
            pytest.fail("".join(said))
        yield re.search(r"http://127.0.0.1:\d+", line)[0] + "/"
    finally:
        server.kill()
        server.communicate()


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="drives the browser")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "hide-scrollbars", "window-size=1440,1800"),
        "disable-dev-shm-usage",
        f"user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(f"--{flag}")
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.mark.slow
def test_the_page_in_a_browser(browser, url, tmp_path):
    """Every control changes its picture and no other, a broken file is told, and nothing is asked of another server."""
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.ui import WebDriverWait

    everything = ["image", "samples", "balls", "cams"]

    def find(selector):
        return browser.find_element("css selector", selector)

    def sources():
        return browser.execute_script(
            "return arguments[0].map(id => (document.querySelector(`#${id} img`) || {}).src)", everything
        )

    def changes(act, *expected):
        """`act` gives these pictures and no other a new source."""
        before = sources()
        act()

        def new():
            return [name for name, old, now in zip(everything, before, sources(), strict=True) if now and old != now]

        def settled(_):
            now = sources()
            time.sleep(2)
            return sources() == now and set(new()) >= set(expected)

        wait.until(settled)
        return new() == list(expected)

    wait = WebDriverWait(browser, 120, poll_frequency=0.5)
    assert changes(lambda: browser.get(url), *everything)
    assert find("#example").text.startswith("Image\ncoffee")

    image = find("#image img")
    click = ActionChains(browser).move_to_element_with_offset(image, -60, -40).click()
    assert changes(click.perform, "samples")

    def choose_layer():
        find("#layer input").click()
        find("#layer input").send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ENTER)

    assert changes(choose_layer, "samples")

    def slide():
        find("#drift input[type=range]").send_keys(Keys.ARROW_LEFT)

    assert changes(slide, "balls")

    if "TIMM_METRICCONV_SCREENSHOT" in os.environ:  # docs/img/demo.png
        browser.save_screenshot(os.environ["TIMM_METRICCONV_SCREENSHOT"])

    Image.fromarray(IMAGE).save(tmp_path / "mine.png")
    upload = "#upload input[type=file], input[type=file]"
    assert changes(lambda: find(upload).send_keys(str(tmp_path / "mine.png")), *everything)
    (tmp_path / "broken.png").write_text("no image")
    find(upload).send_keys(str(tmp_path / "broken.png"))
    wait.until(lambda _: "is no image that Pillow can read" in find("body").text)

    asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert asked and all(name.startswith((url, "data:", "blob:")) for name in asked)
