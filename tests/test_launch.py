"""Independent runs through Ray: the table of one machine, also where a machine is lost on the way."""

import threading
import time

import pytest

pytest.importorskip("accelerate", reason="needs the extra [demo]")

from safetensors.torch import load_file

from timm_metricconv.recipes.config import ConfigError
from timm_metricconv.recipes.launch import LaunchConfig, run_all
from timm_metricconv.recipes.train import TrainConfig, TrainingDiverged

MEMORY = 80 * 2**20


def epochs_done(run):
    """Of the newest complete checkpoint."""
    names = [path.name for path in (run.folder / "checkpoints").glob("epoch_*") if path.suffix != ".tmp"]
    return max((int(name.split("_")[1]) for name in names), default=0)


def tiny(output, **changes):
    values = {
        "model": "test_resnet_deform",
        "model_args": {"stem": "cifar", "layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]},
        "data": "digits/0-1",
        "input_size": 8,
        "batch_size": 64,
        "epochs": 6,
        "workers": 0,
        "output": str(output),
    }
    return TrainConfig(**{**values, **changes})


@pytest.fixture
def cluster(monkeypatch):
    """A head without cores and one node with a core, at RAY_ADDRESS."""
    ray = pytest.importorskip("ray", reason="needs the extra [cluster]")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": MEMORY})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    try:
        cluster.node = cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.skip(reason="unfinished: never seen to pass; the killer thread seems to be refused by remove_node")
def test_a_lost_machine_changes_nothing(cluster, tmp_path):
    """The node is killed after the first epoch; the run goes on on another, and all ends as without Ray."""
    alone = [tiny(tmp_path / f"alone{seed}", seed=seed) for seed in (0, 1)]
    spread = [tiny(tmp_path / f"spread{seed}", seed=seed) for seed in (0, 1)]
    expected = list(run_all(alone, LaunchConfig()))
    killed_after = []

    def kill():
        deadline = time.monotonic() + 300
        while not (done := epochs_done(spread[0])) and time.monotonic() < deadline:
            time.sleep(0.01)
        cluster.remove_node(cluster.node, allow_graceful=False)
        killed_after.append(done)
        cluster.add_node(num_cpus=1, object_store_memory=MEMORY)

    killer = threading.Thread(target=kill)
    killer.start()
    found = list(run_all(spread, LaunchConfig(launcher="ray")))
    killer.join()
    assert 1 <= killed_after[0] < spread[0].epochs
    timed = ("images_per_second", "seconds")
    for one, other, mine, theirs in zip(found, expected, spread, alone, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
        a, b = (load_file(run.folder / "model" / "model.safetensors") for run in (mine, theirs))
        assert all(a[key].equal(b[key]) for key in a)


@pytest.mark.skip(reason="unfinished: never run to its end")
def test_refusals_cross_the_wire(cluster, tmp_path):
    """What stops a run stops the comparison with the run's own words."""
    ray = LaunchConfig(launcher="ray")
    with pytest.raises(ConfigError, match=r"^model: resnet19_metric cannot be loaded: Unknown model"):
        list(run_all([tiny(tmp_path / "run", model="resnet19_metric")], ray))
    with pytest.raises(TrainingDiverged, match=r"^the loss is nan"):
        list(run_all([tiny(tmp_path / "run", opt="sgd", lr=1e30)], ray))
    with pytest.raises(ConfigError, match="gpus_per_run: expected at most the cluster's 0 GPUs; got 8"):
        list(run_all([], LaunchConfig(launcher="ray", gpus_per_run=8)))


def test_without_ray(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install "timm_metricconv\[cluster\]"'):
        list(run_all([], LaunchConfig(launcher="ray")))
