"""What recipes share about a run: its folder, whether the folder holds that very run, its curves, its progress."""

import csv
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

import yaml
from filelock import SoftFileLock, Timeout
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .config import ConfigError, plain
from .report import console, write_atomic
from .settings import RunConfig

# What may differ when a run goes on: where things are, not what they are. Each loader process has its own augmentation.
PLACES = ("name", "output", "data_dir", "allow_pickle")
LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only this process writes into the folder. The lock of a process that has ended on this machine is taken over.

    Raises:
        ConfigError: Another process writes there (it is named), or nobody can.
    """
    lock = SoftFileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        process, machine, *_ = [*(folder / LOCK).read_text().split(), "?", "?"]
        raise ConfigError(
            f"output: process {process} on {machine} is writing into {folder}. Wait for it or give another --output; "
            f"if there is no such process any more, remove {folder / LOCK}."
        ) from None
    except OSError as error:
        raise ConfigError(f"output: {str(folder)!r} cannot be written to: {error}.") from None
    try:
        yield
    finally:
        lock.release()


def _flat(values: Dict[str, Any], prefix: str = "") -> Dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat: Dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict) and value
        flat.update(_flat(value, f"{prefix}{key}.") if inner else {prefix + key: value})
    return flat


def _same(one: Any, other: Any) -> bool:
    """Whether two values mean the same: `d`, `d/` and `./d` are one folder."""
    return one == other or (isinstance(one, str) and isinstance(other, str) and Path(one) == Path(other))


def _checkpoint_from_run(values: Dict[str, Any]) -> Optional[str]:
    return os.path.relpath(values["checkpoint"], values.get("output") or ".") if values.get("checkpoint") else None


def check_same_run(config: RunConfig, free: Sequence[str] = ()) -> None:
    """Refuses to go on in a folder that holds a run of another configuration.

    Args:
        config: The run.
        free: Keys that may differ besides the places.

    Raises:
        ConfigError: Another key differs; it is named.
    """
    path = config.folder / "config.yaml"
    if not path.exists() or {file.name for file in config.folder.iterdir()} <= {
        path.name,
        LOCK,
    }:  # what ended before its first result is no run
        return
    begun, resolved = yaml.safe_load(path.read_bytes()), plain(config)
    if _checkpoint_from_run(begun) == _checkpoint_from_run(resolved):  # the run was moved, and its checkpoint with it
        begun["checkpoint"] = resolved.get("checkpoint")
    begun, resolved = _flat(begun), _flat(resolved)
    fixed = [k for k in {**resolved, **begun} if k.split(".")[0] not in free and k.split(".")[-1] not in PLACES]
    changed = [key for key in fixed if not _same(begun.get(key), resolved.get(key))]
    if changed:
        what = ", ".join(f"{key} ({begun.get(key)} → {resolved.get(key)})" for key in changed)
        raise ConfigError(
            f"output: {config.folder} holds a run with another {what}. Give another --output or remove it."
        )


def write_config(config: RunConfig) -> None:
    """Writes `config.yaml`, resolved.

    Raises:
        ConfigError: The folder cannot be written to.
    """
    try:
        write_atomic(config.folder / "config.yaml", yaml.safe_dump(plain(config), sort_keys=False))
    except OSError as error:
        raise ConfigError(f"output: {str(config.folder)!r} cannot be written to: {error}.") from None


def read_curves(folder: Path, epochs: Optional[int] = None) -> List[Dict[str, Any]]:
    """The rows of a training run's `curves.csv`, up to `epochs`; none where there is no such file."""
    if not (folder / "curves.csv").exists():
        return []
    with (folder / "curves.csv").open(encoding="utf-8") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return [{**row, "epoch": int(row["epoch"])} for row in rows if epochs is None or row["epoch"] <= epochs]


def progress(hidden: bool = False) -> Progress:
    """A bar that is gone when it is done; none where nobody looks."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=hidden or not console.is_terminal)
