"""The libraries that take timm models take ours: each with a small network and one real step."""

import json

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("pydantic", reason="needs the extra [recipes]")

from timm_metricconv import BallConv2d, DeformConv2d, MetricConv2d
from timm_metricconv.recipes.hub import HubConfig, push

NAME = "test_resnet_metric"


def moved(module: nn.Module, before: dict) -> bool:
    """Whether kernels and predictors of all adaptive layers have changed."""
    names = [name for name, layer in module.named_modules() if isinstance(layer, BallConv2d)]
    after = module.state_dict()
    keys = [f"{name}.{part}" for name in names for part in ("weight", "predictor.weight")]
    return bool(keys) and all(not torch.equal(before[key], after[key]) for key in keys)


def train(module: nn.Module, loss) -> None:
    """Two steps: timm starts the last norm of a block at zero, which keeps the first gradient from what precedes it."""
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()


def copy_of(module: nn.Module) -> dict:
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("architecture", ["Unet", "FPN", "DeepLabV3Plus"])
def test_segmentation_models_pytorch(architecture):
    smp = pytest.importorskip("segmentation_models_pytorch", reason="needs segmentation-models-pytorch")
    output_stride = {"encoder_output_stride": 16} if architecture == "DeepLabV3Plus" else {}
    model = smp.create_model(architecture, "tu-resnet18_metric", encoder_weights=None, classes=2, **output_stride)
    image, target = torch.randn(2, 3, 64, 64), torch.randint(0, 2, (2, 64, 64))
    assert model(image).shape == (2, 2, 64, 64)
    before = copy_of(model)
    train(model, lambda: nn.functional.cross_entropy(model(image), target))
    assert moved(model, before)
    if output_stride:
        dilations = {layer.dilation for layer in model.encoder.modules() if isinstance(layer, MetricConv2d)}
        assert (2, 2) in dilations
        assert model.encoder(image)[-1].shape[-1] == 64 // 16


def test_torchvision_detection():
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    body = timm.create_model(NAME, features_only=True, out_indices=(1, 2, 3, 4))
    layers = {name: str(i) for i, name in enumerate(body.feature_info.module_name())}
    backbone = BackboneWithFPN(body, layers, body.feature_info.channels(), 16)
    model = FasterRCNN(backbone, num_classes=3, min_size=96, max_size=96, box_detections_per_img=5)
    images = [torch.rand(3, 80, 96), torch.rand(3, 96, 72)]
    targets = [
        {"boxes": torch.tensor([[10.0, 12.0, 50.0, 60.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.tensor([[5.0, 5.0, 40.0, 30.0]]), "labels": torch.tensor([2])},
    ]
    before = copy_of(model)
    train(model, lambda: sum(model(images, targets).values()))
    assert moved(model, before)
    with torch.no_grad():
        detections = model.eval()(images)
    assert len(detections) == 2 and detections[0]["boxes"].shape[1] == 4


@pytest.fixture
def saved(tmp_path):
    """A network whose arguments differ from the defaults, saved as training saves it."""
    model = timm.create_model(
        NAME, num_classes=3, stem="cifar", zero_init_last=False, conv_cfg={"parametrization": "spectral"}
    ).eval()
    for layer in model.modules():
        if isinstance(layer, MetricConv2d):
            nn.init.normal_(layer.predictor.weight, std=0.02)
    timm.models.save_for_hf(model, str(tmp_path / "saved"), safe_serialization=True)
    return model, tmp_path / "saved"


def test_transformers_timm_wrapper(saved):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    model, folder = saved
    image = torch.randn(2, 3, 32, 32)
    settings = json.loads((folder / "config.json").read_text())
    # TimmWrapper passes the number of classes on beside model_args, so it must not be in there
    arguments = {key: value for key, value in settings["model_args"].items() if key != "num_classes"}
    wrapped = transformers.TimmWrapperForImageClassification.from_pretrained(folder, model_args=arguments).eval()
    with torch.no_grad():
        torch.testing.assert_close(wrapped(pixel_values=image).logits, model(image))
    labels = torch.tensor([0, 2])
    before = copy_of(wrapped.train())
    train(wrapped, lambda: wrapped(pixel_values=image, labels=labels).loss)
    assert moved(wrapped, before)


def test_transformers_loads_what_push_to_hub_writes(saved, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    model, folder = saved
    push(HubConfig(folder=str(folder), dry_run=str(tmp_path / "repository")))
    image = torch.randn(2, 3, 32, 32)
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "repository").eval()
    with torch.no_grad():
        torch.testing.assert_close(wrapped(pixel_values=image).logits, model(image))


def test_transformers_timm_backbone(saved):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    model, folder = saved
    image = torch.randn(2, 3, 32, 32)
    backbone = transformers.TimmBackbone.from_pretrained(f"local-dir:{folder}").eval()
    with torch.no_grad():
        features = backbone(image).feature_maps
        expected = model.forward_intermediates(image, intermediates_only=True)
    torch.testing.assert_close(features[-1], expected[-1])


def test_lightning_epoch(tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = timm.create_model(NAME, num_classes=2)

        def training_step(self, batch, index):
            image, target = batch
            return nn.functional.cross_entropy(self.model(image), target)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32), torch.randint(0, 2, (8,)))
    learner = Classifier()
    before = copy_of(learner)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(learner, torch.utils.data.DataLoader(data, batch_size=4))
    assert trainer.current_epoch == 1 and moved(learner, before)
    again = Classifier.load_from_checkpoint(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    torch.testing.assert_close(again.state_dict(), learner.state_dict())


def test_grad_cam():
    cam = pytest.importorskip("pytorch_grad_cam", reason="needs grad-cam")
    model = timm.create_model(NAME, num_classes=4).eval()
    image = torch.randn(2, 3, 64, 64)
    with cam.GradCAM(model=model, target_layers=[model.layer4[-1]]) as explain:
        heat = explain(input_tensor=image, targets=None)
    assert heat.shape == (2, 64, 64) and 0 <= heat.min() <= heat.max() <= 1


def multiply_adds(layer: BallConv2d, pixels: int) -> int:
    """By hand: the predictor, four corners for every sample, and the product."""
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    return pixels * (layer.predictor.weight.numel() + 4 * taps * layer.in_channels + layer.weight.numel())


@pytest.mark.parametrize("layer", [MetricConv2d(8, 16, 3, stride=2), DeformConv2d(8, 16, 3, groups=2, modulated=True)])
def test_flop_counter_counts_the_gather(layer):
    image = torch.randn(2, 8, 12, 10)
    with FlopCounterMode(display=False) as counter:
        output = layer(image)
    assert counter.get_total_flops() == 2 * multiply_adds(layer, 2 * output[0, 0].numel())


def test_fvcore_counts_the_gather():
    fvcore = pytest.importorskip("fvcore.nn", reason="needs fvcore")

    def gather(inputs, outputs):
        image, source, weight = (value.type().sizes() for value in inputs[:3])
        samples = source[0] * source[-2] * source[-1] * weight[2] * weight[3]
        return samples * (4 * image[1] + weight[0] * weight[1])

    layer = MetricConv2d(8, 16, 3, stride=2, backend="gather")
    counter = fvcore.FlopCountAnalysis(layer, torch.randn(2, 8, 12, 10))
    counter.set_op_handle("timm_metricconv::gather_conv2d", gather).unsupported_ops_warnings(False)
    by_operator = counter.by_operator()
    assert by_operator["conv"] + by_operator["gather_conv2d"] == multiply_adds(layer, 2 * 6 * 5)
