"""Independent runs through Ray: the table of one machine, also where a machine is lost on the way."""

import threading
import time

import pytest

pytest.importorskip("accelerate", reason="needs the extra [demo]")

from safetensors.torch import load_file

from timm_metricconv.recipes.config import ConfigError
from timm_metricconv.recipes.launch import LaunchConfig, run_all
from timm_metricconv.recipes.train import TrainConfig, TrainingDiverged


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
    """Two nodes of one core each, at RAY_ADDRESS; the second may be killed."""
    ray = pytest.importorskip("ray", reason="needs the extra [cluster]")
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **memory})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    try:
        cluster.second = cluster.add_node(num_cpus=1, object_store_memory=memory["object_store_memory"])
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_lost_machine_changes_nothing(cluster, tmp_path):
    """Each of two nodes trains; one is killed on the way; its run goes on elsewhere, and both end as without Ray."""
    alone = [tiny(tmp_path / f"alone{seed}", seed=seed) for seed in (0, 1)]
    spread = [tiny(tmp_path / f"spread{seed}", seed=seed, epochs=6) for seed in (0, 1)]
    expected = list(run_all(alone, LaunchConfig()))
    unfinished = []

    def kill():
        deadline = time.monotonic() + 240
        while not all((run.folder / "checkpoints" / "epoch_1").exists() for run in spread):
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)
        unfinished.extend(run.folder for run in spread if not (run.folder / "summary.json").exists())
        cluster.remove_node(cluster.second, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    found = list(run_all(spread, LaunchConfig(launcher="ray")))
    killer.join()
    assert len(unfinished) == 2
    timed = ("images_per_second", "seconds")
    for one, other, mine, theirs in zip(found, expected, spread, alone, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
        a, b = (load_file(run.folder / "model" / "model.safetensors") for run in (mine, theirs))
        assert all(a[key].equal(b[key]) for key in a)


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
