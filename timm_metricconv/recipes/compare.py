"""The fair comparison: the same network, data and training with each convolution, warm-started and from scratch."""

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Literal, NamedTuple, Optional, Tuple

from pydantic.dataclasses import dataclass
from timm.models import list_models

from ..layers import LAYERS, BallConv2d
from ..models.ball_resnet import FAMILIES
from .config import ConfigError, build, merge, option, read_yaml
from .data import image_size
from .diagnosis import mean_diagnosis, plot_geometry
from .intervals import Difference, mean_interval, paired_difference
from .launch import LaunchConfig, run_all
from .network import count_macs, create_model, parameter_counts
from .report import console, print_table, save_figure, write_summary
from .run import check_same_run, locked, read_curves, write_config
from .settings import RunConfig, Seed, TaskName, TrainConfig
from .train import TASKS

CONVS = ("standard", *reversed(FAMILIES))
# Run where they are named.
OTHERS = tuple(name for name in LAYERS if name not in CONVS)
# Convolutions that differ from another, `conv`, by these arguments of the model or of the training.
_ON_RAYS = {"sampling": "rays", "parametrization": "logspd", "eps_omega": 0.5}  # the default of 0.2.0
VARIANTS = {
    "deform-bounded": {"conv": "deform", "model_args": {"conv_cfg": {"max_offset": 1.0}}},
    "metric-geodesic": {"conv": "metric", "model_args": {"conv_cfg": {"ball": "geodesic"}}},
    "metric-rays": {"conv": "metric", "model_args": {"conv_cfg": _ON_RAYS}},
}
_COLOURS = {
    "standard": "#555555",
    "shifted": "#E69F00",
    "deform": "#56B4E9",
    "metric": "#D55E00",
    "metric-geodesic": "#009E73",
    "active": "#CC79A7",
    "affine": "#0072B2",
}

# Rows may be added to a comparison, and it may go on elsewhere.
ROWS = ("conv", "variants", "init", "kernel", "seeds", "launcher", "gpus_per_run")
# What a comparison sets for each run.
OWN = (
    *("name", "output", "task", "seed", "model", "model_args"),
    *("pretrained", "checkpoint", "kernel_start", "fixed_kernel", "kernels"),
)

# What the runs of a cell start from: the standard network's weights everywhere; everywhere but in the kernels that are
# adaptive in the other networks, which start uniform (the paper's own transfer); or none.
Init = Literal["transfer", "uniform", "scratch"]
_INITS = {"transfer": "warm start", "uniform": "warm start, uniform kernels", "scratch": "from scratch"}


@dataclass
class CompareConfig(LaunchConfig, RunConfig):
    """A comparison."""

    name: str = option("compare", "name of the comparison")
    task: TaskName = option("classification", "what is learnt, from `train`'s data")
    model: str = option("resnet18", "timm's name of the standard network; <name>_metric, _deform, _shifted are ours")
    model_args: Dict[str, Any] = option({}, "arguments of all networks: stem, layout, stages, conv_cfg")
    conv: List[str] = option(list(CONVS), f"which of {', '.join((*CONVS, *OTHERS, *VARIANTS))} and the variants")
    variants: Dict[str, Dict[str, Any]] = option({}, "more of them, {name: {conv, model_args, train}}: what differs")
    init: List[Init] = option(["transfer", "scratch"], "transfer (TL), uniform (the paper's TL), scratch (SC)")
    kernel: List[Literal["learnable", "fixed"]] = option(["learnable", "fixed"], "learnable (LKW), fixed (FKW)")
    seeds: List[Seed] = option([0, 1], "one run for each")
    source: Dict[str, Any] = option({}, "training of the standard classifier that warm starts load; empty: the Hub's")
    checkpoint: Optional[str] = option(None, "warm starts load this .safetensors file of the standard network instead")
    train: Dict[str, Any] = option({}, "training, the same for every run (see scripts/train.py --help)")


class Cell(NamedTuple):
    """A row of the table."""

    conv: str
    init: str
    kernel: str

    @property
    def label(self) -> str:
        """Name of its runs' folders."""
        return "-".join(self)


def _cells(config: CompareConfig) -> Iterator[Cell]:
    for init in config.init:
        for kernel in config.kernel:
            for conv in config.conv:
                yield Cell(conv, init, kernel)


def _variant(config: CompareConfig, conv: str) -> Dict[str, Any]:
    """How a convolution is defined in this comparison."""
    return {**VARIANTS, **config.variants}.get(conv, {"conv": conv})


def _network(config: CompareConfig, conv: str) -> Dict[str, Any]:
    """`model` and `model_args` of a training run: the standard network is the converted one with no stage converted."""
    variant = _variant(config, conv)
    conv, arguments = variant["conv"], merge(config.model_args, variant.get("model_args", {}))
    if conv == "standard":
        return {"model": f"{config.model}_metric", "model_args": {**arguments, "stages": []}}
    if f"{config.model}_{conv}" in list_models(f"{config.model}_*"):
        return {"model": f"{config.model}_{conv}", "model_args": arguments}
    return {"model": f"{config.model}_metric", "model_args": {**arguments, "conv": conv}}


def _kernels(config: CompareConfig) -> List[str]:
    """Names of the layers that are adaptive in all networks but the standard one."""
    twin = create_model(f"{config.model}_metric", config.model_args)
    return [name for name, module in twin.named_modules() if isinstance(module, BallConv2d)]


def _train_config(config: CompareConfig, conv: str, **overrides: Any) -> TrainConfig:
    """A training of a convolution: the comparison's, with what its variant and then `overrides` change."""
    own = _variant(config, conv).get("train", {})
    values = {**config.train, "task": config.task, **own, **overrides, **_network(config, conv)}
    return build(TrainConfig, values, where="train")


def _source_checkpoint(config: CompareConfig) -> Optional[str]:
    """Trains the standard network on the source task, once; the file that every warm start loads."""
    if not config.source or config.init == ["scratch"]:
        return config.checkpoint
    folder = config.folder / "source"
    values = {**config.source, "task": "classification", "name": "source", "output": str(folder)}
    (summary,) = run_all([_train_config(config, "standard", **values)], config)
    console.print(f"source task {summary['data']}: the standard network reaches {summary['top1']:.2f} % top-1")
    return str(folder / "model" / "model.safetensors")


def _cost(config: CompareConfig, conv: str) -> Dict[str, Any]:
    task, training = TASKS[config.task], _train_config(config, conv, pretrained=False)
    model = task.network(training, task.datasets(training, training.seed)[0])
    return {**parameter_counts(model), "gmacs": count_macs(model, image_size(training, model.pretrained_cfg))}


def _record(cell: Cell, config: CompareConfig, runs: Dict[int, Dict[str, Any]], cost: Dict[str, Any]) -> Dict[str, Any]:
    """The line of a cell, from the summaries of its runs by seed."""
    scores: Dict[str, Any] = {}
    for score in TASKS[config.task].scores:
        values = [run[score] for run in runs.values()]
        spread = statistics.stdev(values) if len(values) > 1 else None
        scores.update({f"{score}_mean": statistics.mean(values), f"{score}_std": spread, score: values})
    return {
        **cell._asdict(),
        "seeds": list(runs),
        **scores,
        "predicted": max((run["predicted"] for run in runs.values() if "predicted" in run), default=None),
        "vs_standard": None,
        **cost,
        "images_per_second": statistics.median(run["images_per_second"] for run in runs.values()),
        "seconds": sum(run["seconds"] for run in runs.values()),
        "geometry": mean_diagnosis([run["geometry"] for run in runs.values()]),
    }


def _deciding(config: CompareConfig) -> Tuple[str, str]:
    """The score that decides, and its name for people."""
    return next(iter(TASKS[config.task].scores.items()))


def _compare_with_standard(records: List[Dict[str, Any]], score: str) -> None:
    """Fills in `vs_standard`: the difference to the standard convolution of the same row, paired by seed."""
    scores = {tuple(r[key] for key in Cell._fields): dict(zip(r["seeds"], r[score], strict=True)) for r in records}
    for record in records:
        ours, theirs = (
            scores.get((conv, record["init"], record["kernel"]), {}) for conv in (record["conv"], "standard")
        )
        both = [seed for seed in ours if seed in theirs]
        if record["conv"] != "standard":
            difference = paired_difference([ours[seed] for seed in both], [theirs[seed] for seed in both])
            record["vs_standard"] = difference and difference._asdict()


def _versus(record: Dict[str, Any]) -> str:
    if record["predicted"] == 1:
        return "predicts one class"
    if record["vs_standard"] is None:
        return ""
    difference = Difference(**record["vs_standard"])
    return f"{difference.difference:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}] {difference.verdict}"


def _score(mean: float, spread: Optional[float]) -> str:
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"


def _row(record: Dict[str, Any], task: str) -> Dict[str, Any]:
    """What a table for people has room for."""
    shown = {name: label for name, label in TASKS[task].scores.items() if name != "top5"}
    return {
        **{key: record[key] for key in Cell._fields},
        **{f"{label} (%)": _score(record[f"{key}_mean"], record[f"{key}_std"]) for key, label in shown.items()},
        "vs standard, 95 %": _versus(record),
        "params": f"{record['params']:,}",
        "predictors": f"{record['predictor_params']:,}",
        "GMACs": record["gmacs"],
        "images/s": round(record["images_per_second"]),
    }


def _run_folder(config: CompareConfig, cell: Cell, seed: int) -> Path:
    return config.folder / f"{cell.label}-seed{seed}"


def plot_curves(config: CompareConfig, records: List[Dict[str, Any]]):
    """The score over epochs: a panel for each (init, kernel), for each convolution the mean and its 95 % interval."""
    from matplotlib.figure import Figure

    inits, kernels = (list(dict.fromkeys(record[key] for record in records)) for key in ("init", "kernel"))
    figure = Figure(figsize=(5 * len(kernels), 0.8 + 3.6 * len(inits)), layout="constrained")
    panels = figure.subplots(len(inits), len(kernels), squeeze=False, sharex=True, sharey=True)
    score, label = _deciding(config)
    seen: List[float] = []
    lines: Dict[str, Any] = {}
    for record in records:
        cell = Cell(*(record[key] for key in Cell._fields))
        axes = panels[inits.index(cell.init)][kernels.index(cell.kernel)]
        axes.set_title(f"{_INITS[cell.init]}, {cell.kernel} kernels")
        curves = [read_curves(_run_folder(config, cell, seed)) for seed in record["seeds"]]
        epochs = [row["epoch"] for row in curves[0]]
        values = [[curve[i][score] for curve in curves] for i in range(len(epochs))]
        colour = _COLOURS.get(cell.conv)
        (lines[cell.conv],) = axes.plot(epochs, [statistics.mean(v) for v in values], color=colour, marker=".")
        seen += [min(map(min, values)), max(map(max, values))]
        low, high = mean_interval(list(zip(*values, strict=True)))
        axes.fill_between(epochs, low, high, color=colour, alpha=0.15, lw=0)
        axes.grid(alpha=0.3)
    # two seeds' intervals are far wider than what they contain
    panels[0][0].set_ylim(min(seen) - 3, max(seen) + 3)
    for axes in panels[-1]:
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    for row in panels:
        row[0].set_ylabel(f"validation {label} (%)")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3)
    seeds = "–".join(map(str, sorted({len(record["seeds"]) for record in records})))
    figure.suptitle(f"{config.model} on {config.train.get('data', 'digits')}, {seeds} seeds (band: 95 % interval)")
    return figure


def _run(config: CompareConfig, cell: Cell, seed: int, checkpoint: Optional[str], kernels: List[str]) -> TrainConfig:
    """One training. FKW from scratch has uniform kernels in all networks alike."""
    warm = cell.init != "scratch"
    uniform = cell.init == "uniform" or (cell.init == "scratch" and cell.kernel == "fixed")
    return _train_config(
        config,
        cell.conv,
        name=cell.label,
        output=str(_run_folder(config, cell, seed)),
        seed=seed,
        pretrained=warm and checkpoint is None,
        checkpoint=checkpoint if warm else None,
        kernel_start="uniform" if uniform else "model",
        fixed_kernel=cell.kernel == "fixed",
        kernels=kernels,
    )


def _check(config: CompareConfig) -> None:
    """Refuses what cannot be run before anything runs."""
    for name, variant in config.variants.items():
        strange = sorted(variant.keys() - {"conv", "model_args", "train"})
        taken = name in CONVS + OTHERS or VARIANTS.get(name, variant) != variant
        if strange or variant.get("conv") not in CONVS + OTHERS or taken:
            raise ConfigError(
                f"variants.{name}: expected a name of its own, conv (one of {', '.join(CONVS + OTHERS)}), and "
                f"model_args and train for what differs; got {variant}."
            )
    convs = (*CONVS, *OTHERS, *VARIANTS, *config.variants)
    unknown = [conv for conv in config.conv if conv not in convs]
    if unknown:
        raise ConfigError(f"conv: expected some of {', '.join(convs)}; got {unknown}.")
    if f"{config.model}_metric" not in list_models("*_metric"):
        known = ", ".join(name.removesuffix("_metric") for name in list_models("*_metric"))
        raise ConfigError(f"model: expected one of {known}; got {config.model!r}.")
    for key in ("conv", "init", "kernel", "seeds"):
        if not getattr(config, key):
            raise ConfigError(f"{key}: the list is empty, there is nothing to compare.")
        if len(set(getattr(config, key))) < len(getattr(config, key)):
            raise ConfigError(f"{key}: expected different ones; got {getattr(config, key)}.")
    for conv in ("standard", *config.variants):
        for key in OWN:
            if key in {**config.train, **_variant(config, conv).get("train", {})}:
                raise ConfigError(f"train.{key}: the comparison sets it for each run; leave it out.")
        _train_config(config, conv)
    build(TrainConfig, config.source, where="source")
    if config.checkpoint and (config.source or not Path(config.checkpoint).is_file()):
        raise ConfigError(f"checkpoint: expected a file, and no source beside it; got {config.checkpoint!r}.")


def _with_earlier_rows(config: CompareConfig) -> CompareConfig:
    """The comparison with the rows and seeds that its folder has already: a smaller command drops nothing."""
    if not any(config.folder.glob("*-seed*/summary.json")):
        return config
    earlier = build(CompareConfig, read_yaml(config.folder / "config.yaml"))
    for name, variant in earlier.variants.items():
        now = {**VARIANTS, **config.variants}.get(name, variant)
        if now != variant:
            raise ConfigError(
                f"variants.{name}: expected {variant}, as {config.folder} has runs of it; got {now}. Give it another "
                "name, or another --output."
            )
    lists = ("conv", "init", "kernel", "seeds")
    rows = {key: list(dict.fromkeys([*getattr(earlier, key), *getattr(config, key)])) for key in lists}
    return replace(config, variants={**earlier.variants, **config.variants}, **rows)


def _complete_runs(config: CompareConfig, cell: Cell) -> Dict[int, Dict[str, Any]]:
    files = {seed: _run_folder(config, cell, seed) / "summary.json" for seed in config.seeds}
    return {seed: json.loads(file.read_bytes()) for seed, file in files.items() if file.exists()}


def compare(config: CompareConfig) -> List[Dict[str, Any]]:
    """Runs every cell of {conv} × {init} × {kernel} with every seed, skipping what is complete, and reports.

    Writes `summary.json`, `summary.csv`, `summary.md`, `curves.png` and `geometry.png` into `config.folder`, each run
    into a folder of its own below it. The summary is of all complete runs there, those of earlier commands too.

    Returns:
        The records of `summary.json`.

    Raises:
        ConfigError: The configuration cannot be used.
    """
    _check(config)
    # data and networks are seen to be there before the folder is made: a refused command leaves nothing behind
    costs, kernels = {conv: _cost(config, conv) for conv in config.conv}, _kernels(config)
    with locked(config.folder):
        return _compare(config, costs, kernels)


def _compare(config: CompareConfig, costs: Dict[str, Dict[str, Any]], kernels: List[str]) -> List[Dict[str, Any]]:
    """What is left to do in a folder that is this process's alone; `costs` by convolution."""
    check_same_run(config, free=ROWS)
    runs = [(cell, seed) for cell in _cells(config) for seed in config.seeds]
    config = _with_earlier_rows(config)
    costs = {conv: costs[conv] if conv in costs else _cost(config, conv) for conv in config.conv}
    write_config(config)
    checkpoint = _source_checkpoint(config)
    score, label = _deciding(config)
    trainings = [_run(config, cell, seed, checkpoint, kernels) for cell, seed in runs]
    done = sum((run.folder / "summary.json").exists() for run in trainings)
    console.print(f"{config.folder}: {len(runs)} trainings of {trainings[0].epochs} epochs, {done} of them complete")
    for number, ((cell, seed), result) in enumerate(zip(runs, run_all(trainings, config), strict=True), 1):
        console.print(f"[{number:>3}/{len(runs)}] {cell.label:<28} seed {seed}: {label} {result[score]:6.2f} %")
    complete = {cell: _complete_runs(config, cell) for cell in _cells(config)}
    records = [_record(cell, config, done, costs[cell.conv]) for cell, done in complete.items() if done]
    _compare_with_standard(records, score)
    rows = [_row(record, config.task) for record in records]
    write_summary(config.folder, records, f"{config.name}: {label} of {config.model}", rows)
    save_figure(plot_curves(config, records), config.folder / "curves.png")
    reports = {(f"{_INITS[r['init']]}, {r['kernel']} kernels", r["conv"]): r["geometry"] for r in records}
    save_figure(plot_geometry(reports, _COLOURS), config.folder / "geometry.png")
    print_table(rows, f"{config.name}: {config.folder}")
    return records
