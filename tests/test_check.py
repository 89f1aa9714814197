"""`python -m timm_metricconv --check`: it passes what is right, and names what is wrong."""

import pytest

from timm_metricconv import check as module
from timm_metricconv.__main__ import main
from timm_metricconv.ops import BACKENDS


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "_speed", lambda backend, device: 2.0)


def few(monkeypatch, *names):
    monkeypatch.setattr(module, "BACKENDS", {name: BACKENDS[name] for name in names})


def test_what_agrees_passes_and_the_exit_status_says_so(monkeypatch, capsys):
    few(monkeypatch, "compiled", "reference", "triton")
    monkeypatch.setattr("sys.argv", ["timm_metricconv", "--check"])
    assert main() == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " on cpu: " in line]
    assert [line.split()[0] for line in lines] == ["compiled", "reference", "triton"]
    assert "agrees" in lines[0] and "in float32" in lines[0] and "times nn.Conv2d" in lines[0]
    assert "does not run: it is written for GPUs" in lines[2] or "agrees" in lines[2]


@pytest.mark.parametrize(
    ("spoil", "verdict"),
    [
        (lambda out, x, weight: out + 0.1, "WRONG in float32: output, "),
        (
            lambda out, x, weight: out + (weight - weight.detach()).sum() * out.detach(),
            "WRONG in float32: gradient of weight",
        ),
        (lambda out, x, weight: 1 / 0, "FAILS in float32: ZeroDivisionError"),
        (lambda out, x, weight: out * float("nan"), "WRONG in float32: output"),
    ],
)
def test_what_is_wrong_is_named(spoil, verdict, monkeypatch):
    few(monkeypatch, "compiled", "reference")
    row = BACKENDS["compiled"]

    def spoilt(x, samples, weight, *others):
        return spoil(row.function(x, samples, weight, *others), x, weight)

    monkeypatch.setitem(BACKENDS, "compiled", row._replace(function=spoilt))
    verdicts = {v.backend: v for v in module.check(["cpu"])}
    assert not verdicts["compiled"].passed and verdicts["compiled"].text.startswith(verdict)
    assert verdicts["reference"].passed
