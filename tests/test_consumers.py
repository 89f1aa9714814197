"""The libraries that take timm models take ours: each with a small network and one real step."""

import copy
import json

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("pydantic", reason="needs the extra [recipes]")

from timm_metricconv import BallConv2d, DeformConv2d, MetricConv2d, convert
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


def total(layer: BallConv2d, output) -> int:
    return multiply_adds(layer, output.numel() // layer.out_channels)


def test_fvcore_counts_predictor_and_product():
    """What it traces has ordinary operators, of which it knows the products."""
    fvcore = pytest.importorskip("fvcore.nn", reason="needs fvcore")
    layer = MetricConv2d(8, 16, 3, stride=2)
    counter = fvcore.FlopCountAnalysis(layer, torch.randn(2, 8, 12, 10)).unsupported_ops_warnings(False)
    expected = 2 * 6 * 5 * (layer.predictor.weight.numel() + layer.weight.numel())
    assert counter.total() == pytest.approx(expected, rel=1e-3)  # it estimates an einsum


def test_thop_takes_a_count():
    thop = pytest.importorskip("thop", reason="needs thop")
    layer, image = MetricConv2d(8, 16, 3, stride=2), torch.randn(2, 8, 12, 10)

    def count(layer, inputs, output):
        layer.total_ops += total(layer, output)

    macs, _ = thop.profile(nn.Sequential(layer), (image,), custom_ops={MetricConv2d: count}, verbose=False)
    assert macs == multiply_adds(layer, 2 * 6 * 5)


def test_ptflops_takes_a_count():
    ptflops = pytest.importorskip("ptflops", reason="needs ptflops")
    layer = MetricConv2d(8, 16, 3, stride=2, bias=False)

    def count(layer, inputs, output):
        layer.__flops__ += total(layer, output)

    options = {"as_strings": False, "print_per_layer_stat": False, "backend": "pytorch"}
    macs, _ = ptflops.get_model_complexity_info(
        nn.Sequential(layer), (8, 12, 10), custom_modules_hooks={MetricConv2d: count}, **options
    )
    assert macs == multiply_adds(layer, 6 * 5)


def bent(**arguments) -> nn.Module:
    """A network whose samples move."""
    model = timm.create_model(NAME, num_classes=4, zero_init_last=False, **arguments).eval()
    for layer in model.modules():
        if isinstance(layer, BallConv2d):
            nn.init.normal_(layer.predictor_head().weight, std=0.02)
    return model


def test_openvino():
    openvino = pytest.importorskip("openvino", reason="needs openvino")
    layers = nn.Sequential(MetricConv2d(3, 4, 3, stride=2), nn.ReLU(), DeformConv2d(4, 4, 3, modulated=True))
    for layer in layers[::2]:
        nn.init.normal_(layer.predictor.weight, std=0.1)
    program = openvino.convert_model(layers, example_input=torch.randn(2, 3, 20, 24))
    run = openvino.compile_model(program, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in ((1, 3, 33, 30), (3, 3, 16, 40)):
        image = torch.randn(size)
        torch.testing.assert_close(torch.from_numpy(run(image.numpy())[0]), layers(image).detach(), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_fx_quantisation():
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model, image = bent(), torch.randn(2, 3, 64, 64)
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(), (image,))
    prepared(image)
    quantised = convert_fx(prepared)
    assert sum(isinstance(m, MetricConv2d) for m in quantised.modules()) == 5  # in float32, between integers
    assert not isinstance(quantised.conv1.get_submodule("0"), nn.Conv2d)
    assert (quantised(image) - model(image)).abs().max() < 0.1 * model(image).abs().max()


def test_fusion_with_a_norm():
    layer, norm = MetricConv2d(3, 4, 3).eval(), nn.BatchNorm2d(4).eval()
    nn.init.normal_(layer.predictor.weight, std=0.1)
    nn.init.normal_(norm.running_mean)
    image = torch.randn(1, 3, 8, 9)
    fused = torch.nn.utils.fuse_conv_bn_eval(layer, norm)
    assert isinstance(fused, MetricConv2d)
    torch.testing.assert_close(fused(image), norm(layer(image)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("separable", [False, True])
def test_peft(separable):
    peft = pytest.importorskip("peft", reason="needs peft")
    model, image = bent(conv_cfg={"separable_predictor": separable}), torch.randn(2, 3, 32, 32)
    heads = {layer.predictor_head() for layer in model.modules() if isinstance(layer, BallConv2d)}
    names = [name for name, module in model.named_modules() if module in heads]
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, r=2))
    before = copy_of(tuned)
    train(tuned, lambda: tuned(image).square().sum())
    learned = {key for key, value in tuned.state_dict().items() if not torch.equal(before[key], value)}
    assert {key for key in learned if "lora_" not in key and "running" not in key} <= {
        key for key in learned if key.endswith("num_batches_tracked")
    }
    assert sum("lora_B" in key for key in learned) == len(heads) == 5


@pytest.mark.slow
def test_torch_pruning():
    pruning = pytest.importorskip("torch_pruning", reason="needs torch-pruning")
    model, image = timm.create_model("test_resnet", num_classes=4).eval(), torch.randn(2, 3, 32, 32)
    pruner = pruning.pruner.MagnitudePruner(
        model, image, pruning.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=[model.fc]
    )
    pruner.step()
    expected = model(image)
    layers = convert(model, "metric", "layer[234].*")
    assert {layer.out_channels for layer in layers.values()} == {24, 48}
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-4)
