"""Configurations: YAML and command line, types, misspelt keys."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional

import pytest

pytest.importorskip("accelerate", reason="needs the extra [recipes]")

from pydantic.dataclasses import dataclass

from timm_metricconv.recipes.compare import CompareConfig
from timm_metricconv.recipes.config import (
    ConfigError,
    RecipeError,
    Settings,
    build,
    from_command_line,
    main,
    option,
    read_yaml,
)
from timm_metricconv.recipes.train import TrainConfig

CONFIGS = Path(__file__).parent.parent / "configs"


@dataclass
class Example(Settings):
    name: str = option("example", "")
    rate: float = option(0.1, "")
    steps: int = option(3, "")
    kind: Literal["a", "no"] = option("a", "")
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
    """Each file's base lies beside it, and a base may have one of its own."""
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "first.yaml").write_text("steps: 8\nrate: 0.5\nnested: {x: 0, z: 3}\n")
    (tmp_path / "bases" / "second.yaml").write_text("base: first.yaml\nsteps: 9\nnested: {x: 1}\n")
    (tmp_path / "child.yaml").write_text("base: bases/second.yaml\nnested: {y: 2}\n")
    config = from_command_line(Example, "", ["--config", str(tmp_path / "child.yaml")])
    assert (config.steps, config.rate, config.nested) == (9, 0.5, {"x": 1, "y": 2, "z": 3})
    assert config.name == "child"


def test_bases_in_a_circle(tmp_path):
    """Also where the same file is written in two ways."""
    (tmp_path / "own.yaml").write_text("base: own.yaml\n")
    (tmp_path / "one.yaml").write_text("base: two.yaml\n")
    (tmp_path / "two.yaml").write_text(f"base: ../{tmp_path.name}/one.yaml\n")
    with pytest.raises(ConfigError, match=r"^base: the files go round in a circle: own.yaml → own.yaml\.$"):
        read_yaml(tmp_path / "own.yaml")
    with pytest.raises(ConfigError, match=r"circle: one.yaml → two.yaml → one.yaml\.$"):
        read_yaml(tmp_path / "one.yaml")


def test_a_flag_may_be_switched_off(tmp_path):
    (tmp_path / "mine.yaml").write_text("flag: true\n")
    assert not from_command_line(Example, "", ["--config", str(tmp_path / "mine.yaml"), "--no-flag"]).flag


@pytest.mark.parametrize("text", ["no", "007", "1.10", "1e-4", "true", "2026-11-24"])
def test_text_stays_text(text):
    """YAML 1.1 would read a boolean, an octal number, a date; and a number's text is not always what was written."""
    assert from_command_line(Example, "", ["--name", text]).name == text


def test_values_without_a_type_of_their_own(tmp_path):
    """Inside a dictionary YAML 1.2 decides, the same in a file and on the command line."""
    words = {"a": "no", "b": "007", "c": "1e-4", "d": "true", "e": "null", "f": "[1, x]", "g": "-3"}
    expected = {"a": "no", "b": "007", "c": 1e-4, "d": True, "e": None, "f": [1, "x"], "g": -3}
    (tmp_path / "mine.yaml").write_text("nested:\n" + "".join(f"  {key}: {word}\n" for key, word in words.items()))
    line = [part for key, word in words.items() for part in (f"--nested.{key}", word)]
    assert from_command_line(Example, "", line).nested == read_yaml(tmp_path / "mine.yaml")["nested"] == expected


def test_a_file_and_a_word_read_alike(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: 007\nkind: no\nflag: yes\nlimit: null\nsizes: 3\n")
    line = "--name 007 --kind no --flag yes --limit null --sizes 3"
    from_file = from_command_line(Example, "", ["--config", str(tmp_path / "mine.yaml")])
    assert from_file == from_command_line(Example, "", line.split()) == Example("007", kind="no", flag=True, sizes=[3])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--epochs 0", "epochs: expected a number greater than 0; got '0'"),
        ("--batch_size -3", "batch_size: expected a number greater than 0; got '-3'"),
        ("--num_classes -1", "num_classes: expected a number greater than or equal to 0; got '-1'"),
        ("--lr 0", "lr: expected a number greater than 0"),
        ("--smoothing 1", "smoothing: expected a number less than 1"),
        ("--hflip 2", "hflip: expected a number less than or equal to 1; got '2'"),
        ("--scale 0.5", "scale: expected|scale: List should have at least 2 items"),
        ("--interpolation linear", "interpolation: expected 'nearest', 'bilinear'"),
        ("--crop_pct -1", "crop_pct: expected a number greater than 0"),
        ("--seed -1", "seed: expected a number greater than or equal to 0"),
        ("--crop_pct 5", "crop_pct: expected a number less than or equal to 1"),
        ("--scale 1 0.5", "scale: expected the least and then the most"),
        ("--lr inf", "lr: expected a finite number"),
        ("--std 1 0 1", "std: expected a number greater than 0"),
        ("--mean 1 2", "mean: expected one number, or one for each of the three channels"),
        ("--auto_augment nonsense", "auto_augment: expected a policy of timm's"),
        ("--auto_augment rand-m9-foo1", "auto_augment: expected a policy of timm's"),
        ("--opt nonsense", "opt: expected an optimiser of timm's, such as .*adamw.*; got 'nonsense'"),
        ("--opt adamv", "opt: expected an optimiser of timm's, such as adam, .*; got 'adamv'"),
        ("--sched nonsense", "sched: expected 'cosine', .* or 'constant'; got 'nonsense'"),
        ("--amp 8", "amp: expected 'no', 'bf16' or 'fp16'; got '8'"),
    ],
)
def test_training_refuses_what_it_cannot_do(arguments, message):
    with pytest.raises(ConfigError, match=message):
        from_command_line(TrainConfig, "", arguments.split())


def test_a_configuration_made_in_python_is_checked_too():
    for wrong in ({"epochs": 0}, {"lr": float("inf")}, {"epoch": 3}, {"conv": ["metric"]}):
        with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}: "):
            TrainConfig(**wrong)
    config = TrainConfig(epochs=3)
    with pytest.raises(ConfigError, match=r"^epochs: "):
        config.epochs = 0
    assert config.epochs == 3


def test_amp_no():
    assert from_command_line(TrainConfig, "", ["--amp", "no"]).amp == "no"
    assert build(TrainConfig, from_command_line(CompareConfig, "", ["--train.amp", "no"]).train).amp == "no"


@pytest.mark.parametrize("key", ["lr", "epochs", "predictor_weight_decay"])
def test_a_forgotten_value_is_no_number(key):
    """YAML's true would be 1 to pydantic."""
    values = from_command_line(CompareConfig, "", [f"--train.{key}"]).train
    with pytest.raises(ConfigError, match=f"{key}: expected a valid (number|integer)"):
        build(TrainConfig, values)


def script(run, *arguments, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", *arguments])
    main(run, Example, "")


@pytest.mark.parametrize(
    "error", [ConfigError("rate: too\nhigh"), RecipeError("high"), OSError("disk full"), ImportError("no x")]
)
def test_a_refusal_is_one_line_and_status_2(error, monkeypatch, capsys):
    def refuse(config):
        raise error

    with pytest.raises(SystemExit) as exit_:
        script(refuse, monkeypatch=monkeypatch)
    message = " ".join(str(error).split())
    assert exit_.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"
    with pytest.raises(type(error)):
        script(refuse, "--debug", monkeypatch=monkeypatch)


def test_a_defect_keeps_its_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        script(lambda config: 1 / 0, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stps", "3"], "'stps'. Did you mean 'steps'"),
        (["--steps", "many"], "steps: expected a valid integer.*; got 'many'"),
        (["--steps", "1.5"], "steps: expected a valid integer"),
        (["--kind", "c"], "kind: expected 'a' or 'no'; got 'c'"),
        (["--flag", "3"], "flag: expected a valid boolean"),
        (["--steps"], "steps: expected a valid integer"),
        (["--rate"], "rate: expected a valid number"),
        (["--nested", "3"], "nested: expected a valid dictionary"),
        (["--nested", "3", "--nested.a", "4"], "nested: '3' is no dictionary, so it has no nested.a"),
        (["--nested.a", "3", "--nested.a.b", "4"], "nested.a: 3 is no dictionary, so it has no nested.a.b"),
        (["--sizes", "3", "x"], "sizes: expected a valid integer.*; got 'x'"),
        (["--config", "a.yaml", "b.yaml"], "--config: expected one file; got a.yaml and b.yaml"),
        (["--config", "nowhere.yaml"], "no file 'nowhere.yaml'"),
        (["--sizes", "[0,1"], "sizes: this is not YAML"),
        (["--steps", "3", "-b", "32"], "'-b': there are no short options"),
        (["-j4"], "'-j4': there are no short options"),
        (["--no-steps"], "steps: expected a valid integer"),
        (["--no-flg"], "unknown key 'no_flg'. Did you mean 'flag'"),
        (["steps=3"], "expected --key value"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ConfigError, match=message):
        from_command_line(Example, "", arguments)


def test_broken_yaml(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="not YAML"):
        read_yaml(tmp_path / "bad.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_text_is_utf_8_whatever_the_locale(encoding, tmp_path):
    """A file of UTF-8, also with a byte order mark, is read so, and what the terminal has no sign for is a `?`."""
    (tmp_path / "mine.yaml").write_text("# ± für ein Maß\nname: Maß ±\nsteps: 4\n", encoding=encoding)
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from test_config import Example, main\n"
        "from timm_metricconv.recipes.report import print_table\n"
        "main(lambda config: print_table([{'a \\xb1 b': config.name, 'n': config.steps}], 't'), Example, '')"
    )
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), "--config", str(tmp_path / "mine.yaml")]
    done = subprocess.run(arguments, env=environment, capture_output=True)
    assert done.returncode == 0 and b"Ma? ?" in done.stdout and b"4" in done.stdout, done.stderr


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
