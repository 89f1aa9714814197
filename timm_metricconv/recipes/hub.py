"""A trained network as a repository of the Hugging Face Hub: weights, timm's config.json and a model card."""

import dataclasses
import json
import os
import shutil
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Optional, Tuple

import timm
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from pydantic.dataclasses import dataclass
from torch import nn

from ..layers import LAYERS, BallConv2d
from .config import ConfigError, Settings, option
from .network import adaptive_layers, create_model
from .run import read_curves

WEIGHTS, SETTINGS, CARD = "model.safetensors", "config.json", "README.md"
# What a card tells of config.yaml. Paths stay at home.
TRAINING_KEYS = (
    *("epochs", "batch_size", "grad_accum", "input_size", "opt", "lr", "predictor_lr", "predictor_regulariser"),
    *("weight_decay", "sched", "warmup_epochs", "clip_grad", "smoothing", "mixup", "cutmix", "auto_augment"),
    *("re_prob", "hflip", "ema_decay", "amp", "fixed_kernel", "seed", "train_images", "val_images", "warp", "val_warp"),
)
CITATION = """@inproceedings{dages2025metric,
  title     = {Metric Convolutions: A Unifying Theory to Adaptive Image Convolutions},
  author    = {Dag{\\`e}s, Thomas and Lindenbaum, Michael and Bruckstein, Alfred M.},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2025}
}"""


@dataclass
class HubConfig(Settings):
    """A push."""

    folder: str = option("", "folder of a training run, or any folder that local-dir: loads")
    repo: Optional[str] = option(None, "owner/name on the Hub")
    dry_run: Optional[str] = option(None, "write the repository into this folder; nothing leaves the machine")
    update: bool = option(False, "commit to a repository that exists")
    private: bool = option(False, "make the repository private")
    license: Optional[str] = option(None, "by default that of the weights the network started from, or apache-2.0")


@dataclasses.dataclass
class Run:
    """What a folder tells about a network; all but the network may be empty."""

    model: nn.Module
    files: Path
    settings: Dict[str, Any]
    training: Dict[str, Any] = dataclasses.field(default_factory=dict)
    summary: Dict[str, Any] = dataclasses.field(default_factory=dict)
    last_epoch: Dict[str, Any] = dataclasses.field(default_factory=dict)


def load(folder: Path) -> nn.Module:
    """The network of a folder, in evaluation mode.

    Raises:
        ConfigError: timm cannot load it.
    """
    try:
        return create_model(f"local-dir:{folder}", {}, pretrained=True).eval()
    except ConfigError as error:
        raise ConfigError(f"folder: timm cannot load {folder}: {error}") from error


def read_run(folder: Path) -> Run:
    """Reads a training run's folder, or a folder with weights and configuration alone.

    Raises:
        ConfigError: A file is missing or broken.
    """
    files = folder / "model" if (folder / "model").is_dir() else folder
    for name in (WEIGHTS, SETTINGS):
        if not (files / name).is_file():
            raise ConfigError(f"folder: there is no {name} in {str(files)!r}; expected a training run or its model/.")
    run = Run(load(files), files, json.loads((files / SETTINGS).read_bytes()))
    if files != folder:
        if (folder / "config.yaml").is_file():
            run.training = yaml.safe_load((folder / "config.yaml").read_bytes())
        if (folder / "summary.json").is_file():
            run.summary = json.loads((folder / "summary.json").read_bytes())
        run.last_epoch = (read_curves(folder) or [{}])[-1]
    return run


def _table(rows: Dict[str, Any], head: Tuple[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {key} | {value} |" for key, value in rows.items()])


def _text(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _convolution(layers: List[BallConv2d]) -> str:
    """The section on the convolutions of the network."""
    if not layers:
        return "A standard network: no convolution was replaced."
    first = layers[0]
    rows: Dict[str, Any] = {"layers": len(layers), "kind": f"`{type(first).__name__}`"}
    theirs = {*signature(nn.Conv2d).parameters, "backend"}
    for name in (*(key for key in signature(type(first)).parameters if key not in theirs), "max_radius"):
        rows[name] = ", ".join(map(_text, dict.fromkeys(getattr(layer, name) for layer in layers)))
    return _table(rows, ("setting", "value"))


def _results(run: Run) -> Dict[str, str]:
    """Metrics as the card shows them."""
    merged = {**run.last_epoch, **run.summary}
    names = {"top1": ("top-1 (%)", 2), "top5": ("top-5 (%)", 2), "val_loss": ("validation loss", 4)}
    shown = {label: f"{merged[key]:.{digits}f}" for key, (label, digits) in names.items() if key in merged}
    shown["parameters"] = f"{sum(p.numel() for p in run.model.parameters()):,}"
    if merged.get("predictor_params"):
        shown["parameters of predictors"] = f"{merged['predictor_params']:,}"
    return shown


def _data_name(data: str) -> str:
    """A data set's public name: of a local folder its last part alone."""
    return Path(data).name if os.path.isabs(data) or Path(data).exists() else data


def model_card(run: Run, name: str, source: str, license: Optional[str] = None) -> ModelCard:
    """The card of a run.

    Args:
        run: From `read_run`.
        name: Title.
        source: What `timm.create_model` is to be given.
        license: See `HubConfig`.
    """
    layers = adaptive_layers(run.model)
    kinds = {cls: kind for kind, cls in LAYERS.items()}
    kind = kinds[type(layers[0])] if layers else "standard"
    architecture, training = run.settings["architecture"], run.training
    license = license or run.settings.get("pretrained_cfg", {}).get("license") or "apache-2.0"
    data = _data_name(str(training["data"])) if training.get("data") else None
    started = timm.get_pretrained_cfg(training["model"]) if training.get("pretrained") else None
    task = "image-classification"
    results = []
    # a number of some images, or of warped ones, is not the data set's
    if data and "top1" in run.summary and not any(training.get(key) for key in ("val_images", "warp", "val_warp")):
        accuracy = round(run.summary["top1"], 2)
        results = [EvalResult(task, data.split("/")[0], data, "accuracy", accuracy, metric_name="top-1 (%)")]
    metadata = ModelCardData(
        library_name="timm",
        license=license,
        pipeline_tag=task,
        tags=[task, "timm", "timm_metricconv", f"{kind}-convolution"],
        base_model=started.hf_hub_id if started and started.hf_hub_id else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    shown = {key: training[key] for key in TRAINING_KEYS if training.get(key) not in (None, "", [], {})}
    starts = {"pretrained": "pretrained weights", "checkpoint": "a checkpoint"}
    start = next((text for key, text in starts.items() if training.get(key)), "scratch")
    trained = f"On {data}, from {start}, with `scripts/train.py`.\n\n{_table(shown, ('setting', 'value'))}"
    sections = {
        "Convolution": _convolution(layers),
        "Training": trained if training else "No record of the training came with the weights.",
        "Results": _table(_results(run), ("", f"validation images of {data}" if data else "")),
        "Usage": "The import registers the architecture with timm.\n\n```python\n"
        f'import timm\nimport timm_metricconv\n\nmodel = timm.create_model("{source}", pretrained=True).eval()\n```',
        "Licence": license,
        "Citation": f"```bibtex\n{CITATION}\n```",
    }
    text = (
        f"An image classifier: timm's `{architecture}`, with {kind} convolutions and {run.model.num_classes} classes."
    )
    body = f"# {name}\n\n{text}\n" + "".join(f"\n## {title}\n\n{content}\n" for title, content in sections.items())
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}")


def write_repository(config: HubConfig, target: Path) -> ModelCard:
    """Writes weights, configuration and card into `target`, and loads them back.

    Raises:
        ConfigError: See `read_run`.
    """
    run = read_run(Path(config.folder))
    name = (config.repo or config.dry_run or str(target)).rstrip("/").split("/")[-1]
    source = f"hf-hub:{config.repo}" if config.repo else f"local-dir:{name}"
    card = model_card(run, name, source, config.license)
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run.files / WEIGHTS, target / WEIGHTS)
    settings = {**run.settings, "model_args": dict(run.settings.get("model_args", {}))}
    # it stands in the file twice, and transformers' TimmWrapper passes both on
    settings["model_args"].pop("num_classes", None)
    (target / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (target / CARD).write_text(str(card), encoding="utf-8")
    load(target)
    return card


def _explained(error: Exception, repo: str) -> str:
    """One line for what the Hub refused."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    reasons = {
        401: f"{constants.ENDPOINT} does not know this token (401): `hf auth login`, or set HF_TOKEN to a valid one.",
        403: f"this token has no right to write {repo} (403): use a write token of {repo.split('/')[0]} or a member.",
    }
    return f"repo: {reasons.get(status, f'{constants.ENDPOINT} could not be used for {repo} ({reason}).')}"


def push(config: HubConfig) -> str:
    """Pushes a network, or with `dry_run` writes the folder that would be pushed.

    Returns:
        The folder or the address of the commit.

    Raises:
        ConfigError: The folder cannot be used, or the Hub refuses; the message says what to do.
    """
    if not Path(config.folder).is_dir() or not config.folder:
        raise ConfigError(f"folder: there is no folder {config.folder!r}; give --folder runs/<name>.")
    if config.dry_run:
        write_repository(config, Path(config.dry_run))
        print(f"{config.dry_run}: ready, nothing was pushed")
        return config.dry_run
    if not config.repo or config.repo.count("/") != 1:
        raise ConfigError(f"repo: expected owner/name, got {config.repo!r}; or give --dry_run FOLDER.")
    if get_token() is None:
        raise ConfigError("repo: there is no token: run `hf auth login`, or set HF_TOKEN to a write token.")
    api = HfApi()
    with TemporaryDirectory() as folder:
        write_repository(config, Path(folder))
        try:
            api.create_repo(config.repo, private=config.private, exist_ok=True)
            if not config.update:
                there = api.model_info(config.repo)
                # what a failed upload left behind has no file but the Hub's own, and is filled
                empty = {file.rfilename for file in there.siblings or ()} <= {".gitattributes"}
                if not empty or (config.private and not there.private):
                    raise ConfigError(
                        f"repo: {config.repo} exists already: give --update true to commit to it, or another --repo."
                    )
            commit = api.upload_folder(
                repo_id=config.repo, folder_path=folder, commit_message="Upload with timm_metricconv"
            )
        except Exception as error:
            # the HTTP library below huggingface_hub changes from version to version, its exceptions with it
            known = isinstance(error, (HfHubHTTPError, HFValidationError, ValueError, OSError))
            if not known and not type(error).__module__.startswith("http"):
                raise
            raise ConfigError(_explained(error, config.repo)) from error
    print(f"{commit.commit_url}\ntimm.create_model('hf-hub:{config.repo}', pretrained=True) loads it.")
    return commit.commit_url
