"""`metricconv`: the scripts as commands, and what a wheel needs for them."""

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="needs the extra [recipes]")

from timm_metricconv.recipes import command
from timm_metricconv.recipes.config import ConfigError, config_file

ROOT = Path(__file__).parent.parent


def run(*words, monkeypatch):
    monkeypatch.setattr("sys.argv", ["metricconv", *words])
    command.main()


def test_every_script_is_a_command():
    calls = [re.search(r"^    main\((\w+), (\w+),", path.read_text(), re.M) for path in (ROOT / "scripts").glob("*.py")]
    assert {call[1]: call[2] for call in calls} == {name: config for name, (_, config) in command.COMMANDS.items()}


@pytest.mark.parametrize("name", command.COMMANDS)
def test_each_has_its_help(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(name, "--help", monkeypatch=monkeypatch)
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and "usage: " in text and ": python " not in text
    run(monkeypatch=monkeypatch)
    assert name in capsys.readouterr().out


def test_refusals_are_one_line(monkeypatch, capsys):
    for words, message in (
        (["trian"], "expected one of train, "),
        (["train", "--config", "quickstrat"], "'quickstart'"),
    ):
        with pytest.raises(SystemExit) as exit_:
            run(*words, monkeypatch=monkeypatch)
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm_metricconv.recipes.train", None)
    with pytest.raises(SystemExit) as exit_:
        run("train", monkeypatch=monkeypatch)
    assert exit_.value.code == 2 and 'pip install "timm_metricconv[recipes]"' in capsys.readouterr().err


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # a folder is no configuration
    ours = config_file("digits")  # of the package as it is installed, or of this copy of the repository
    assert ours.name == "digits.yaml" and ours.read_text() == (ROOT / "configs" / "digits.yaml").read_text()
    (tmp_path / "quickstart").write_text("")
    assert config_file("quickstart") == Path("quickstart")
    with pytest.raises(ConfigError, match="there is no file 'elsewhere"):
        config_file("elsewhere.yaml")
