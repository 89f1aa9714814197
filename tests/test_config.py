"""Configurations: YAML and command line, types, misspelt keys."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional

import pytest

pytest.importorskip("accelerate", reason="needs the extra [demo]")

from timm_metricconv.recipes.compare import CompareConfig
from timm_metricconv.recipes.config import ConfigError, build, from_command_line, option, read_yaml
from timm_metricconv.recipes.train import TrainConfig

CONFIGS = Path(__file__).parent.parent / "configs"


@dataclass
class Example:
    name: str = option("example", "")
    rate: float = option(0.1, "")
    steps: int = option(3, "")
    kind: Literal["a", "b"] = option("a", "")
    sizes: List[int] = option([1], "")
    nested: Dict[str, Any] = option({}, "")
    limit: Optional[float] = option(None, "")
    flag: bool = option(False, "")


def test_file_and_overrides(tmp_path):
    (tmp_path / "mine.yaml").write_text("rate: 1e-4\nnested: {a: {b: 1, c: 2}}\n")
    line = "--steps 5 --nested.a.b=7 --sizes 3 4 --flag --limit 2"
    config = from_command_line(Example, "", ["--config", str(tmp_path / "mine.yaml"), *line.split()])
    assert config == Example("mine", 1e-4, 5, "a", [3, 4], {"a": {"b": 7, "c": 2}}, 2.0, True)


def test_base_file(tmp_path):
    (tmp_path / "base.yaml").write_text("steps: 9\nnested: {x: 1}\n")
    (tmp_path / "child.yaml").write_text("base: base.yaml\nnested: {y: 2}\n")
    config = from_command_line(Example, "", ["--config", str(tmp_path / "child.yaml")])
    assert (config.steps, config.nested, config.name) == (9, {"x": 1, "y": 2}, "child")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stps", "3"], "'stps'. Did you mean 'steps'"),
        (["--steps", "many"], "steps: expected int, got 'many'"),
        (["--steps", "1.5"], "steps: expected int"),
        (["--kind", "c"], "kind: expected one of a, b"),
        (["--flag", "3"], "flag: expected bool"),
        (["--nested", "3"], "nested: expected dict"),
        (["--config", "nowhere.yaml"], "no file 'nowhere.yaml'"),
        (["steps=3"], "expected --key value"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        from_command_line(Example, "", arguments)


def test_broken_yaml(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="not YAML"):
        read_yaml(tmp_path / "bad.yaml")


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        from_command_line(TrainConfig, "Trains.", ["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert all(f"--{field.name}" in text for field in fields(TrainConfig))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_training_configs_are_valid(path):
    values = read_yaml(path)
    if "train" in values:
        config = build(CompareConfig, values)
        build(TrainConfig, {**config.train, **config.source})
    elif "epochs" in values and "model" in values:
        build(TrainConfig, values)
    else:
        pytest.skip("belongs to another script, whose tests read it")
