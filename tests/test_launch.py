"""Independent runs through Ray: the table of one machine, also where a machine is lost on the way."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="needs the extra [recipes]")

from timm_metricconv.recipes.compare import CompareConfig, compare
from timm_metricconv.recipes.config import ConfigError
from timm_metricconv.recipes.launch import LaunchConfig, run_all
from timm_metricconv.recipes.run import read_curves
from timm_metricconv.recipes.train import TrainConfig, TrainingDiverged

COMPARE = Path(__file__).parent.parent / "scripts" / "compare.py"
MEMORY = 80 * 2**20

NETWORK = {"stem": "cifar", "layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
TRAIN = {"data": "digits/0-1", "input_size": 8, "batch_size": 64, "epochs": 10, "workers": 0}


@pytest.fixture
def cluster(monkeypatch):
    """At RAY_ADDRESS: a head that has no core for runs, and one machine `cluster.lost` that has one."""
    ray = pytest.importorskip("ray", reason="needs the extra [cluster]")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's own 15 starves beside other work
    head = {"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    try:
        cluster.lost = cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def epochs_done(folder):
    """Of the newest complete checkpoint."""
    names = [path.name for path in (folder / "checkpoints").glob("epoch_*") if path.suffix != ".tmp"]
    return max((int(name.split("_")[1]) for name in names), default=0)


def untimed(records):
    return [{key: value for key, value in r.items() if key not in ("images_per_second", "seconds")} for r in records]


@pytest.mark.slow
def test_a_lost_machine_changes_nothing(cluster, set_threads, tmp_path):
    """A machine is killed in the middle of a run; another goes on after its last epoch, and the table is the same."""
    set_threads(1)  # what Ray gives a task that has one core; sums in another order end in other bits
    values = {
        "model": "test_resnet",
        "model_args": NETWORK,
        "conv": ["metric", "standard"],
        "init": ["scratch"],
        "kernel": ["learnable"],
        "seeds": [0],
        "train": TRAIN,
    }
    spread = tmp_path / "spread"
    first = spread / "metric-scratch-learnable-seed0"
    (tmp_path / "compare.yaml").write_text(json.dumps({**values, "output": str(spread)}))
    arguments = ["--config", str(tmp_path / "compare.yaml"), "--launcher", "ray"]
    with (tmp_path / "log").open("w") as log:
        command = subprocess.Popen([sys.executable, str(COMPARE), *arguments], stdout=log, stderr=log)
    try:
        while command.poll() is None and not epochs_done(first):
            time.sleep(0.01)
        cluster.remove_node(cluster.lost, allow_graceful=False)
        done = epochs_done(first)
        before = read_curves(first, done)
        assert 1 <= done < TRAIN["epochs"], (tmp_path / "log").read_text()
        (first / ".lock").write_text("1\nlost.machine\n")  # all nodes of this cluster have one name
        cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
        assert command.wait(600) == 0, (tmp_path / "log").read_text()
    finally:
        command.kill()
    # the seconds of an epoch are in its row: the epochs before the loss were not trained again
    assert read_curves(first, done) == before and len(before) == done
    alone = compare(CompareConfig(**values, output=str(tmp_path / "alone")))
    assert untimed(json.loads((spread / "summary.json").read_text())) == json.loads(json.dumps(untimed(alone)))


@pytest.mark.slow
def test_refusals_cross_the_wire(cluster, tmp_path):
    """What stops a run stops the comparison with the run's own words, and a defect keeps its traceback."""
    config = LaunchConfig(launcher="ray")

    def through_ray(**changes):
        values = {"model": "test_resnet_metric", "model_args": NETWORK, **TRAIN, "output": str(tmp_path / "run")}
        return list(run_all([TrainConfig(**{**values, **changes})], config))

    with pytest.raises(ConfigError, match=r"^model: resnet19_metric cannot be loaded: Unknown model"):
        through_ray(model="resnet19_metric")
    with pytest.raises(TrainingDiverged, match=r"^the loss is nan"):
        through_ray(opt="sgd", lr=1e30)
    with pytest.raises(TypeError, match=r"launch\.py.*in _train_in"):
        list(run_all([None], config))
    with pytest.raises(ConfigError, match="gpus_per_run: expected at most the cluster's 0 GPUs; got 8"):
        list(run_all([], LaunchConfig(launcher="ray", gpus_per_run=8)))


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install "timm_metricconv\[cluster\]"'):
        list(run_all([], LaunchConfig(launcher="ray")))


def test_no_cluster_at_the_address(monkeypatch):
    pytest.importorskip("ray", reason="needs the extra [cluster]")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"launcher: there is no cluster at RAY_ADDRESS=127.0.0.1:1: .*refused"):
        list(run_all([], LaunchConfig(launcher="ray")))
