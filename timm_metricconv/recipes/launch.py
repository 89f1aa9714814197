"""Independent training runs, one after another."""

from typing import Any, Dict, Iterator, Sequence

from .report import console
from .train import TrainConfig, train


def run_all(runs: Sequence[TrainConfig]) -> Iterator[Dict[str, Any]]:
    """The summaries of `runs` in their order, each as soon as it and those before it are there.

    Each run has a folder of its own, goes on from its last checkpoint there, and is only read where it is complete.
    """
    for number, run in enumerate(runs, 1):
        with console.status(f"run {number} of {len(runs)}: {run.name}, seed {run.seed}"):
            result = train(run, quiet=True)
        yield result
