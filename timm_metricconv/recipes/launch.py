"""Independent training runs: one after another, or spread by Ray over cores, GPUs and machines."""

import os
import socket
from typing import Any, Dict, Iterator, Literal, Sequence

from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass

from .config import ConfigError, RecipeError, Settings, option
from .run import LOCK
from .settings import TrainConfig
from .train import train

# How often a run is started again whose worker or machine was lost.
RETRIES = 3


@dataclass
class LaunchConfig(Settings):
    """Where independent runs are trained."""

    launcher: Literal["here", "ray"] = option("here", "here (one after another) or ray (a machine or RAY_ADDRESS)")
    gpus_per_run: NonNegativeFloat = option(0.0, "launcher=ray: GPUs of a run; without one a run has a core")


def run_all(runs: Sequence[TrainConfig], config: LaunchConfig) -> Iterator[Dict[str, Any]]:
    """The summaries of `runs` in their order, each as soon as it and those before it are there.

    Each run has a folder of its own, goes on from its last checkpoint there, and is only read where it is complete.

    Raises:
        ConfigError: A run's configuration cannot be used, or Ray or enough GPUs are missing.
        RecipeError: A run diverged, or its worker was lost too often.
    """
    if config.launcher == "ray":
        yield from _with_ray(runs, config)
        return
    for number, run in enumerate(runs, 1):
        yield train(run, quiet=True, label=f"run {number} of {len(runs)}, {run.name}, seed {run.seed}: ")


def _train_in(folder: str, run: TrainConfig) -> Dict[str, Any]:
    # a run's paths start where the command was given; the machines of a cluster share that folder
    os.chdir(folder)
    import ray

    lock, alive = run.folder / LOCK, {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    if lock.exists() and not alive & set(lock.read_text().split()):  # of a machine that is lost
        lock.unlink()
    return train(run, quiet=True)


def _with_ray(runs: Sequence[TrainConfig], config: LaunchConfig) -> Iterator[Dict[str, Any]]:
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
    except ImportError:
        raise ConfigError('launcher: "ray" needs Ray: pip install "timm_metricconv[cluster]".') from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "")
        host, _, port = address.rpartition(":")
        try:
            if port.isdigit() and "/" not in host:  # Ray itself would wait for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(log_to_driver=False)  # the cluster at RAY_ADDRESS, or one of this machine alone
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(f"launcher: there is no cluster at RAY_ADDRESS={address}: {error}") from None
    gpus = ray.cluster_resources().get("GPU", 0)
    if gpus < config.gpus_per_run:
        raise ConfigError(f"gpus_per_run: expected at most the cluster's {gpus:g} GPUs; got {config.gpus_per_run:g}.")
    task = ray.remote(num_cpus=1, num_gpus=config.gpus_per_run, max_retries=RETRIES)(_train_in)
    tasks = [task.remote(os.getcwd(), run) for run in runs]
    for run, result in zip(runs, tasks, strict=True):
        try:
            yield ray.get(result)
        except RayTaskError as error:
            if isinstance(error.cause, (RecipeError, OSError)):
                raise error.cause from None
            raise  # a defect, with the worker's traceback
        except RayError as error:
            raise RecipeError(
                f"{run.name}, seed {run.seed}: its worker was lost {RETRIES + 1} times ({error}); the same command "
                "goes on from its last checkpoint."
            ) from None
