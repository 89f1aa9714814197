"""Fine-tuning: timm gives data, augmentation, optimiser, schedule, loss and EMA; accelerate gives devices and state."""

import copy
import json
import math
import os
import shutil
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, set_seed
from safetensors import SafetensorError
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from .config import ConfigError, RecipeError
from .data import class_count, image_size
from .diagnosis import diagnose, first_not_finite, plot_geometry, sample_images, strayed
from .network import check_images, parameter_counts, parameter_groups, predictor_regulariser
from .report import console, csv_text, print_table, save_figure, write_atomic
from .run import check_same_run, locked, progress, read_curves, write_config
from .segment import SEGMENTATION
from .settings import TaskName, TrainConfig
from .tasks import CLASSIFICATION, Task

TASKS: Dict[TaskName, Task] = {"classification": CLASSIFICATION, "segmentation": SEGMENTATION}
# Steps between two looks at the loss: a look waits for the device.
CHECK_EVERY = 50


class TrainingDiverged(RecipeError):
    """The loss is no number any more."""


def make_accelerator(amp: str, **options: Any) -> Accelerator:
    """An accelerator, also of another precision than the one before it in this process.

    Raises:
        ConfigError: There is no such precision on this machine.
    """
    if AcceleratorState._shared_state.get("_mixed_precision", amp) != amp:
        AcceleratorState._reset_state()
    try:
        # without `cpu`, accelerate takes two processes on a machine without accelerator for two runs
        accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=amp, **options)
    except ValueError as error:
        raise ConfigError(f"amp={amp!r}: {error}") from None
    if amp == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("amp='fp16' needs a GPU and there is none; on a CPU take 'bf16' or 'no'.")
    return accelerator


def make_optimiser(model: nn.Module, config: TrainConfig) -> Tuple[Optimizer, Scheduler]:
    """The optimiser, and the schedule that sets its learning rates at the beginning of each epoch."""
    groups = parameter_groups(
        model,
        weight_decay=config.weight_decay,
        predictor_lr=config.predictor_lr,
        predictor_weight_decay=config.predictor_weight_decay,
        decay_all=config.decay_all,
    )
    try:
        optimiser = create_optimizer_v2(groups, opt=config.opt, lr=config.lr)
    except (AssertionError, ImportError, TypeError, ValueError) as error:  # by what it needs and is not there
        raise ConfigError(f"opt={config.opt!r}: {error}") from None
    # timm's own 90 epochs between decays mean its 300
    interval = max(1, round(0.3 * config.epochs)) if config.sched == "step" else None
    milestones = sorted({max(1, round(share * config.epochs)) for share in (0.3, 0.6, 0.9)})
    try:
        schedule, _ = create_scheduler_v2(
            optimiser,
            sched=config.sched,
            num_epochs=config.epochs,
            decay_epochs=config.decay_epochs or interval,
            decay_milestones=config.decay_milestones or milestones,
            decay_rate=config.power if config.sched == "poly" else config.decay_rate,
            stable_timescale=config.warmup_epochs or 1,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=min(1e-5, config.lr / 100) if config.warmup_lr is None else config.warmup_lr,
            min_lr=config.min_lr,
        )
    except ValueError as error:
        raise ConfigError(f"sched={config.sched!r} with epochs={config.epochs}: {error}") from None
    return optimiser, schedule


def learning_rate(optimiser: Optimizer) -> float:
    """The rate of all but the predictors; 0 where nothing has one."""
    scaled = (group["lr"] / group["lr_scale"] for group in optimiser.param_groups if group["lr_scale"])
    return next(scaled, 0.0)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have a full disk's error each
        raise RecipeError(f"{folder} cannot be written to; what was complete is kept. {error}") from error


class _Checkpoints:
    """`checkpoints/epoch_N`, a complete accelerate state each: written aside, moved into place, then older ones go."""

    def __init__(self, folder: Path, accelerator: Accelerator):
        self.folder, self.accelerator = folder / "checkpoints", accelerator

    def _complete(self) -> List[Path]:
        found = [path for path in self.folder.glob("epoch_*") if path.suffix != ".tmp"]
        return sorted(found, key=lambda path: int(path.name.split("_")[1]))

    def resume(self) -> int:
        """Loads the newest state and returns the number of epochs that are done."""
        complete = self._complete()
        if not complete:
            return 0
        self.accelerator.load_state(str(complete[-1]))
        return int(complete[-1].name.split("_")[1])

    def save(self, epoch: int) -> None:
        temporary, final = self.folder / f"epoch_{epoch}.tmp", self.folder / f"epoch_{epoch}"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with _writing(self.folder):
            self.accelerator.save_state(str(temporary), safe_serialization=True)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            os.replace(temporary, final)
            for older in self._complete()[:-1]:
                shutil.rmtree(older)
        self.accelerator.wait_for_everyone()


class _Average(ModelEmaV3):
    """timm's average of the weights, with the count of steps that its warm-up needs, also after a resume."""

    steps: Tensor

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, decay, use_warmup=True)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def add(self, model: nn.Module) -> None:
        """Takes the weights after a step of the optimiser in."""
        self.steps.add_(1)
        self.update(model, int(self.steps))


def save_model(model: nn.Module, config: TrainConfig, target: Path) -> None:
    """Writes a folder that loads the network again: of a classifier `timm.create_model("local-dir:…")`."""
    temporary = target.with_name(f"{target.name}.tmp")
    # safetensors refuses channels-last strides
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    with _writing(target):
        TASKS[config.task].save(plain, config, temporary)
    target.mkdir(parents=True, exist_ok=True)
    for file in temporary.iterdir():
        os.replace(file, target / file.name)
    temporary.rmdir()


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, loader: DataLoader, accelerator: Accelerator, channels_last: bool = True
) -> Tensor:
    """What a task measures of each image of a prepared loader `[N, M]`, all processes together."""
    model.eval()
    rows = []
    for images, target in loader:
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            output = model(images)
        rows.append(accelerator.gather_for_metrics(task.measure(output.float(), target)).cpu())
    return torch.cat(rows)


class _Trainer:
    """One run: what `train` needs at hand between epochs."""

    def __init__(
        self, config: TrainConfig, quiet: bool, prepare: Optional[Callable[[nn.Module], None]], label: str = ""
    ):
        self.config, self.quiet, self.label = config, quiet, label
        self.task = TASKS[config.task]
        self.accelerator = make_accelerator(
            config.amp,
            gradient_accumulation_steps=config.grad_accum,
            # the order of an epoch follows from (seed, epoch) alone, so a resumed run sees the same images
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
            step_scheduler_with_optimizer=False,
        )
        self.main = self.accelerator.is_main_process
        set_seed(config.seed)
        with self.accelerator.main_process_first():  # one process downloads
            train_set, val_set = self.task.datasets(config, config.seed)
        model = self.task.network(config, train_set)
        if prepare is not None:
            prepare(model)
        channels, size = model.pretrained_cfg["input_size"][0], image_size(config, model.pretrained_cfg)
        image = torch.zeros(1, channels, size, size)
        check_images(model.eval(), image)
        if config.batch_size == 1:  # a norm cannot learn from one image whose features are 1×1
            check_images(model.train(), image, "Give a larger --batch_size.")
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if self.main and not quiet:
            images = [f"{len(part):,}" if hasattr(part, "__len__") else "a stream of" for part in (train_set, val_set)]
            console.print(
                f"{config.data}: {images[0]} images to train on, {images[1]} to validate on, "
                f"{class_count(config, train_set)} classes; "
                f"{config.model}: {parameter_counts(model)['params']:,} parameters on {self.accelerator.device}"
            )
        optimiser, self.scheduler = make_optimiser(model, config)
        loaders = (
            self.task.loader(config, train_set, model.pretrained_cfg, True),
            self.task.loader(config, val_set, model.pretrained_cfg, False),
        )
        # the first five of five classes are all of them
        few = class_count(config, train_set) <= 5
        self.scores = {key: name for key, name in self.task.scores.items() if key != "top5" or not few}
        self.model, self.optimiser, self.train_loader, self.val_loader = self.accelerator.prepare(
            model, optimiser, *loaders
        )
        self.ema = _Average(self.bare, config.ema_decay) if config.ema_decay else None
        if self.ema:
            self.accelerator.register_for_checkpointing(self.ema)
        # of the optimiser in an epoch; 0 where nobody knows
        batches = len(self.train_loader) if hasattr(self.train_loader, "__len__") else 0
        self.steps = math.ceil(batches / config.grad_accum)
        self.mixup = None
        if config.mixup or config.cutmix:
            if config.batch_size % 2:
                raise ConfigError(f"batch_size={config.batch_size}: mixup and cutmix mix pairs; give an even number.")
            classes = self.bare.num_classes
            self.mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=classes)
        self.loss = self.task.loss(config)
        self.strayed: Set[str] = set()  # layers that were remarked on
        self.second_order = getattr(optimiser, "is_second_order", False)

    @property
    def bare(self) -> nn.Module:
        """The network without its distribution wrapper."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def evaluated(self) -> nn.Module:
        """The network whose accuracy counts: the EMA where there is one."""
        return self.ema.module if self.ema else self.model

    def remark_on_average(self) -> None:
        """Says so where the average of the weights would reach back to before the run."""
        decay, steps = self.config.ema_decay, self.config.epochs * self.steps
        if decay and 1 / (1 - decay) > steps > 0:
            console.print(
                f"ema_decay: {decay:g} averages {1 / (1 - decay):,.0f} steps, and this run has {steps:,}: the average "
                f"is still warming up when it ends (its decay is then {self.ema.get_decay(steps):.3f})."
            )

    def remark_on_samples(self) -> None:
        """Says so, once for a layer, where samples have left the image."""
        line = strayed(self.bare, diagnose(self.bare, sample_images(self.val_loader, 8)))
        if line and line.partition(":")[0] not in self.strayed:
            self.strayed.add(line.partition(":")[0])
            console.print(line)

    def _step(self, images: Tensor, target: Tensor, place: str) -> Tensor:
        config = self.config
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.mixup:
            images, target = self.mixup(images, target)
        with self.accelerator.accumulate(self.model):
            with self.accelerator.autocast():
                loss = self.loss(self.model(images), target)
            if config.predictor_regulariser:
                loss = loss + config.predictor_regulariser * predictor_regulariser(self.bare)
            if self.accelerator.device.type == "cpu":  # costs nothing, and finds the very weights that gave the loss
                self._check(loss.detach(), images, place)
            self.accelerator.backward(loss, create_graph=self.second_order)
            if config.clip_grad and self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_grad)
            self.optimiser.step()
            self.optimiser.zero_grad()
            if self.ema and self.accelerator.sync_gradients:
                self.ema.add(self.bare)
        return loss.detach()

    def _check(self, loss: Tensor, images: Tensor, place: str) -> None:
        """Refuses a loss that is no number, and names the first layer whose output is none on the last images."""
        if loss.isfinite():
            return
        with self.accelerator.autocast():
            layer = first_not_finite(self.bare, images)
        first = f"The first output that is not finite is that of {layer}" if layer else "All layers' outputs are finite"
        raise TrainingDiverged(
            f"the loss is {loss:g} in {place}. {first}. A lower --lr, --warmup_epochs or --clip_grad may help (in "
            f"another --output); the last epoch that was complete is kept in {self.config.folder}."
        )

    def epoch(self, epoch: int) -> Dict[str, Any]:
        """One epoch of training and a validation; the row of `curves.csv`."""
        # All randomness of an epoch follows from (seed, epoch, process), so resuming needs no more than the weights.
        set_seed(self.config.seed + 100_003 * (epoch + 1), device_specific=True)
        if hasattr(self.train_loader, "set_epoch"):
            self.train_loader.set_epoch(epoch)
        self.scheduler.step(epoch)
        self.model.train()
        started, images_seen, steps = time.perf_counter(), 0, 0
        total = torch.zeros((), device=self.accelerator.device)
        with progress(hidden=not self.main or (self.quiet and not self.label)) as bar:
            size = len(self.train_loader) if hasattr(self.train_loader, "__len__") else None
            task = bar.add_task(f"{self.label}epoch {epoch + 1}/{self.config.epochs}", total=size)
            for images, target in self.train_loader:
                steps, images_seen = steps + 1, images_seen + len(target)
                place = f"epoch {epoch + 1}, step {steps}"
                total += self._step(images, target, place)
                bar.advance(task)
                if steps % CHECK_EVERY == 0:
                    self._check(total, images, place)
        if steps:
            self._check(total, images, place)
        loss = float(self.accelerator.reduce(total, reduction="mean"))
        seconds = time.perf_counter() - started
        measured = evaluate(self.task, self.evaluated, self.val_loader, self.accelerator, self.config.channels_last)
        return {
            "epoch": epoch + 1,
            "lr": learning_rate(self.optimiser),
            "train_loss": loss / max(steps, 1),
            **self.task.summarise(measured),
            "images_per_second": images_seen * self.accelerator.num_processes / seconds,
            "seconds": time.perf_counter() - started,
        }


def _print_epoch(row: Dict[str, Any], scores: Dict[str, str]) -> None:
    if row["epoch"] == 1:
        named = ((name, 7) for name in scores.values())
        heads = ("lr", 9), ("train loss", 10), ("val loss", 9), *named, ("images/s", 9)
        console.print("epoch", *(f"{text:>{width}}" for text, width in heads))
    console.print(
        f"{row['epoch']:>5} {row['lr']:>9.2e} {row['train_loss']:>10.4f} {row['val_loss']:>9.4f}",
        *(f"{row[score]:>7.2f}" for score in scores),
        f"{row['images_per_second']:>9.0f}",
    )


def train(
    config: TrainConfig, *, quiet: bool = False, prepare: Optional[Callable[[nn.Module], None]] = None, label: str = ""
) -> Dict[str, Any]:
    """Trains, or goes on with a run that was stopped; a complete run is only read, or goes on where `epochs` are more.

    Writes into `config.folder`: `config.yaml` (resolved), `curves.csv`, `checkpoints/`, `model/` and `best/` (the
    weights of the last epoch and of the one with the best score, the EMA's where there is one) and, at the end,
    `summary.json` and (not where `quiet`) `geometry.png`.

    Args:
        config: The run.
        quiet: No progress, no table and no picture.
        prepare: Called with the new network before training, e.g. to freeze parts of it.
        label: What stands before the bar of each epoch, which is then there also where `quiet`.

    Returns:
        The content of `summary.json`: model, data, epochs, the task's scores (top1, top5), params, predictor_params,
        images_per_second, seconds, geometry (see `diagnose`).

    Raises:
        ConfigError: The configuration cannot be used, or the folder holds another run.
        TrainingDiverged: The loss is not finite; the last good checkpoint is kept.
    """
    file = config.folder / "summary.json"
    ended = json.loads(file.read_bytes()) if file.exists() else None
    longer = ended is not None and config.epochs > ended["epochs"]
    free = ["epochs"] if longer else []
    check_same_run(config, free)
    if ended and not longer:
        if not quiet:
            console.print(f"{config.folder} is complete, and only read.")
        return ended
    trainer = _Trainer(config, quiet, prepare, label)
    with locked(config.folder) if trainer.main else nullcontext():
        check_same_run(config, free)  # another command may have run there while this one read its data
        return _run(trainer)


def _run(trainer: _Trainer) -> Dict[str, Any]:
    """All epochs that are not done, and the summary."""
    config, quiet, folder = trainer.config, trainer.quiet, trainer.config.folder
    if trainer.main:
        write_config(config)
        if not quiet:
            trainer.remark_on_average()
    checkpoints = _Checkpoints(folder, trainer.accelerator)
    done = checkpoints.resume()
    rows = read_curves(folder, done)
    if done and trainer.main and not quiet:
        console.print(f"going on after epoch {done} of {config.epochs} in {folder}")
    for epoch in range(done, config.epochs):
        rows.append(trainer.epoch(epoch))
        if trainer.main:
            write_atomic(folder / "curves.csv", csv_text(rows))
            network = trainer.ema.module if trainer.ema else trainer.bare
            save_model(network, config, folder / "model")
            if rows[-1] is _best(config, rows):
                save_model(network, config, folder / "best")
            if not quiet:
                _print_epoch(rows[-1], trainer.scores)
                trainer.remark_on_samples()
        checkpoints.save(epoch + 1)
    network, images = trainer.ema.module if trainer.ema else trainer.bare, sample_images(trainer.val_loader)
    summary = {**_summary(config, trainer.bare, rows), "geometry": diagnose(network, images)}
    if trainer.main:
        write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        if not quiet:
            hidden = {"geometry", *trainer.task.scores} - {*trainer.scores}
            print_table([{k: v for k, v in summary.items() if k not in hidden}], f"{config.name}: {folder}")
            if summary["geometry"]:
                save_figure(plot_geometry({("", config.model): summary["geometry"]}, {}), folder / "geometry.png")
    trainer.accelerator.free_memory()
    return summary


def _best(config: TrainConfig, rows: List[Dict[str, Any]]) -> Dict[str, Any]:
    """The epoch with the highest deciding score, the first of them; one without a score (NaN) is below all."""
    score = next(iter(TASKS[config.task].scores))
    return max(rows, key=lambda row: (not math.isnan(row[score]), row[score]))


def _summary(config: TrainConfig, model: nn.Module, rows: List[Dict[str, Any]]) -> Dict[str, Any]:
    # the first epoch warms up allocators and file caches
    speeds = sorted(row["images_per_second"] for row in (rows[1:] or rows))
    return {
        "model": config.model,
        "data": config.data,
        "epochs": config.epochs,
        "best_epoch": _best(config, rows)["epoch"],
        **{score: rows[-1][score] for score in TASKS[config.task].scores},
        **{key: rows[-1][key] for key in ("predicted",) if key in rows[-1]},
        **parameter_counts(model),
        "images_per_second": speeds[len(speeds) // 2],
        "seconds": sum(row["seconds"] for row in rows),
    }
