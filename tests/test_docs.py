"""README and docs: their code runs, their commands parse, their files exist, and the API page's names resolve."""

import csv
import inspect
import os
import pkgutil
import re
import runpy
import shlex
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("pydantic", reason="needs the extra [recipes]")

from timm_metricconv import DeformConv2d, MetricConv2d
from timm_metricconv.recipes.config import ConfigError, build, from_command_line
from timm_metricconv.recipes.intervals import mean_interval

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# What the code of a page imports besides the package's own dependencies.
NEEDS = {"quickstart": ("accelerate", "rich", "sklearn"), "export": ("onnx", "onnxscript")}
NEEDS |= {"large_kernels": ("accelerate", "rich")}
LAUNCH = {"multi_gpu", "num_processes", "node_rank"}  # of `accelerate launch`
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:python|accelerate launch [^`\n]*?) ?\bscripts/(\w+)\.py([^`\n]*)")
FILE = re.compile(
    r"(?<![\w/.])(?:configs|scripts|docs|tests|timm_metricconv|\.ci)/[\w./*-]*\.(?:yaml|py|md|png|json)\b"
)
MODULE = re.compile(r"(?<![\w/])(?:geometry|layers|models|ops|recipes)/\w+\.py\b")
TEST = re.compile(r"(?<![\w/])test_\w+\.py\b")


def ids(path):
    return path.stem


def run_blocks(page):
    """Runs a page's code in the current folder, all blocks in one namespace, which is returned."""
    text, namespace = page.read_text(), {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        # empty lines in front, so that a traceback has the page's line numbers
        source = "\n" * text[: block.start(1)].count("\n") + block[1]
        exec(compile(source, str(page), "exec"), namespace)
    return namespace


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=ids)
def test_code_runs(page, tmp_path, monkeypatch):
    for package in NEEDS.get(page.stem, ()):
        pytest.importorskip(package, reason=f"{page.name} shows {package}")
    monkeypatch.chdir(tmp_path)
    Path("results").symlink_to(ROOT / "results")
    run_blocks(page)
    torch._dynamo.reset()


def script_config(name):
    """The configuration class of a script."""
    for package in ("accelerate", "rich"):
        pytest.importorskip(package, reason="the scripts need the extra [recipes]")
    namespace = runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))
    return next(value for key, value in namespace.items() if key.endswith("Config"))


SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))


def parse(cls, words):
    """The configuration that a command line gives, its dictionaries checked against what they are passed to."""
    config = from_command_line(cls, "", words)
    training = [config]
    if hasattr(config, "train"):
        train_config = script_config("train")
        training += [build(train_config, {**config.train, **config.source})]
    for one in training:
        layer = getattr(one, "model_args", {}).get("conv_cfg", {})
        known = inspect.signature(MetricConv2d).parameters | inspect.signature(DeformConv2d).parameters
        assert set(layer) <= set(known)
    return config


def comments(path):
    """The comments of a YAML file, as lines."""
    return "\n".join(line.partition("#")[2] for line in path.read_text().splitlines() if "#" in line)


def commands(text):
    """(script, words) of each command in a text."""
    for name, rest in COMMAND.findall(text.replace("\\\n", " ")):
        yield name, shlex.split(rest.split("&&")[0], comments=True)


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=ids)
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text() if page.suffix == ".md" else comments(page)
    for name, words in commands(text):
        assert name in SCRIPTS, f"there is no scripts/{name}.py"
        if "--help" not in words:
            parse(script_config(name), words)


def accepts(script, words):
    try:
        parse(script_config(script), words)
    except ConfigError:
        return False
    return True


def test_options_in_prose_exist():
    """`--half true`, `--train.epochs 30`: each is a key of some script; timm's scripts write `--initial-checkpoint`."""
    keys = {field.name for name in SCRIPTS for field in fields(script_config(name))}
    keys |= {"config", "debug", "help", "key"} | LAUNCH
    for page in PAGES:
        assert set(re.findall(r"`--(\w+)(?![\w-])", page.read_text())) <= keys, page.name


@pytest.mark.parametrize("path", CONFIGS, ids=ids)
def test_configurations_and_the_options_in_their_comments(path):
    """Each file belongs to a script, and that script has the keys that the file's comments name."""
    owners = [name for name in SCRIPTS if accepts(name, ["--config", str(path)])]
    assert owners
    keys = {field.name for name in owners for field in fields(script_config(name))} | {"config"}
    assert {word.split(".")[0] for word in re.findall(r"--(\w[\w.]*)", comments(path))} <= keys | LAUNCH


def test_commands_are_found():
    """The tests above see the commands: guards the regular expression."""
    found = [name for page in [*PAGES, *CONFIGS] for name, _ in commands(page.read_text())]
    assert set(found) == set(SCRIPTS) and len(found) > 30


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=ids)
def test_files_and_links_exist(page):
    text = page.read_text()
    places = [ROOT / mention for mention in FILE.findall(text)]
    places += [ROOT / "timm_metricconv" / mention for mention in MODULE.findall(text)]
    places += [ROOT / "tests" / mention for mention in TEST.findall(text)]
    if page.suffix == ".md":
        links = re.findall(r"\]\(([^)\s]+)\)", text)
        places += [page.parent / link.partition("#")[0] for link in links if "://" not in link]
    missing = [os.path.relpath(place, ROOT) for place in places if not list(ROOT.glob(os.path.relpath(place, ROOT)))]
    assert not missing


TABLE = re.compile(r"^<!-- (results/\S+\.csv) \| (.+) -->\n\n?((?:\|.*\n)+)", re.MULTILINE)
VALUE = re.compile(r"{(?:(results/\S+\.csv) )?(\S+?)}")


def read_csv(path):
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def as_shown(value, text):
    """A number of a CSV file with the digits and the sign that a table's text has; other values as they are."""
    try:
        number = float(value)
    except ValueError:
        return value
    sign = "+" if text[:1] in ("+", "-", "−") else ""
    decimals = re.fullmatch(r"\D*[\d,]*\.?(\d*)(e[-+]\d+)?", text)
    grouped, form = "," if "," in text else "", "e" if decimals and decimals[2] else "f"
    return f"{number:{sign}{grouped}.{len(decimals[1]) if decimals else 9}{form}}"


def cell_of(template, row, cell, root):
    """What a cell should be: {column} is the row's, {results/OTHER.csv column} that of the row with the same name."""

    def look_up(other, column):
        if not other:
            return row[column]
        names = [key for key in ("conv", "init", "kernel") if key in row]
        found = [r[column] for r in read_csv(root / other) if all(r[key] == row[key] for key in names)]
        return found[0] if found else ""

    values = [look_up(*place) for place in VALUE.findall(template)]
    if not any(values):
        return "" if values else template
    pattern = re.sub(r"\\{.*?\\}", "(.*?)", re.escape(template))
    texts = re.fullmatch(pattern, cell)
    texts = texts.groups() if texts else [""] * len(values)
    shown = iter([as_shown(value, text) for value, text in zip(values, texts, strict=True)])
    return VALUE.sub(lambda _: next(shown), template)


def check_tables(text, root):
    """Each table after a comment `results/FILE.csv | {column} | {column} ± {column}` has the file's rows, in order."""
    for file, templates, table in TABLE.findall(text):
        rows = read_csv(root / file)
        shown = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in table.splitlines()[2:]]
        assert len(shown) == len(rows), f"{file} has {len(rows)} rows, the table {len(shown)}"
        for cells, row in zip(shown, rows, strict=True):
            pairs = zip(templates.split(" | "), cells, strict=True)
            expected = [cell_of(template, row, cell, root) for template, cell in pairs]
            assert cells == expected, f"{file} says | {' | '.join(expected)} |"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_tables_are_what_the_results_say(page):
    text = page.read_text()
    assert len(TABLE.findall(text)) == text.count("<!-- results/")  # none is overlooked
    check_tables(text, ROOT)


def test_a_table_that_differs_is_found(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.csv").write_text("conv,top1,gain,params\nm,90.126,0.5,1234\nn,90,,6.38e-05\n")
    (tmp_path / "results" / "b.csv").write_text("conv,top1\nn,80.5\nm,70.25\n")
    text = (
        "<!-- results/a.csv | {conv} | {top1} [{gain}] | {results/b.csv top1} | {params} -->\n\n"
        "| conv | top-1 | b | parameters |\n|---|---|---|---|\n"
        "| m | 90.13 [+0.5] | 70.2 | 1,234 |\n| n | 90 [] | 80.5 | 6.4e-05 |\n"
    )
    check_tables(text, tmp_path)
    more = text + "| o | 1 | 1 | 1 |\n"
    wrongs = [
        text.replace(*pair)
        for pair in (("90.13", "90.12"), ("| m |", "| x |"), ("70.2", "70.3"), ("+0.5", "-0.5"), ("6.4e", "6.3e"))
    ]
    for wrong in (*wrongs, more):
        with pytest.raises(AssertionError, match=r"a\.csv"):
            check_tables(wrong, tmp_path)


DIFFERENCE = re.compile(r"([+−-]?\d+\.\d) \[([+−-]?\d+\.\d), ([+−-]?\d+\.\d)\]")


def differences(root):
    """Every difference of two rows of results by seed, and of two such differences, each with its interval, rounded.

    The second is what a gain has more of in one start, or with one set of data, than in another.
    """
    by_seed, scores = runpy.run_path(str(ROOT / "results" / "tables.py"))["by_seed"], {}
    for file in sorted((root / "results").glob("*.csv")):
        for row in read_csv(file):
            if "seeds" in row:
                scores[(file.name, row["init"], row["kernel"]), row["conv"]] = by_seed(row)

    def minus(a, b):
        return {seed: a[seed] - b[seed] for seed in a if seed in b}

    single = {(a, b): minus(scores[a], scores[b]) for a in scores for b in scores if a != b}
    gains = defaultdict(list)
    for ((where, ours), (also, theirs)), gain in single.items():
        if where == also:
            gains[ours, theirs].append(gain)
    double = [minus(a, b) for several in gains.values() for a in several for b in several if a is not b]
    by_length = defaultdict(list)
    for difference in [*single.values(), *double]:
        by_length[len(difference)].append(list(difference.values()))
    found = set()
    for length, values in by_length.items():
        if length > 1:
            array = np.array(values).T
            found |= set(zip(*(column.round(1) for column in (array.mean(0), *mean_interval(array))), strict=True))
    return found


def check_differences(text, found):
    """Each `1.2 [0.3, 2.1]` outside a table from a file is one of them; a page may show it as a loss."""
    for shown in DIFFERENCE.finditer(" ".join(TABLE.sub("", text).split())):
        numbers = tuple(float(number.replace("−", "-")) for number in shown.groups())
        assert numbers in found, f"no results say {shown[0]}"


def test_differences_in_prose_are_what_the_results_say():
    found = differences(ROOT)
    for page in PAGES:
        check_differences(page.read_text(), found)


def test_a_difference_that_no_results_say_is_found(tmp_path):
    (tmp_path / "results").mkdir()
    rows = ["conv,init,kernel,seeds,top1", "m,s,l,0 1 2,3 4 8", "n,s,l,0 1 2,1 3 3", "m,t,l,0 1,5 5", "n,t,l,0 1,1 6"]
    (tmp_path / "results" / "a.csv").write_text("\n".join(rows) + "\n")
    found = differences(tmp_path)
    check_differences("2.7 [−2.5,\n+7.8] and −2.7 [−7.8, 2.5]; 1.5 [-30.3, 33.3]; of the two 0.0 [−25.4, 25.4]", found)
    for wrong in ("2.8 [−2.5, 7.8]", "2.7 [−2.5, 7.9]", "+2.7 [2.5, 7.8]"):
        with pytest.raises(AssertionError, match="no results say"):
            check_differences(f"a gain of {wrong}", found)


def test_navigation_has_every_page():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = {page for entry in navigation for page in entry.values()}
    assert named == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_api_page_names_what_there_is():
    pytest.importorskip("accelerate", reason="the recipes need the extra [recipes]")
    text = (ROOT / "docs" / "api.md").read_text()
    entries = re.findall(r"^::: (\S+)\n((?:    .*\n)*)", text, re.MULTILINE)
    assert len(entries) > 30
    for name, options in entries:
        found = pkgutil.resolve_name(name)
        for member in re.findall(r"\w+", "".join(re.findall(r"members: \[(.*)\]", options))):
            assert hasattr(found, member), f"{name} has no {member}"


@pytest.mark.slow
def test_batch_independence_script(tmp_path, monkeypatch):
    """Its mixed ball is the page's formula, and it runs."""
    for package in ("accelerate", "rich", "sklearn"):
        pytest.importorskip(package, reason="the script trains")
    monkeypatch.chdir(ROOT)
    script = runpy.run_path("docs/batch_independence.py")
    page = run_blocks(ROOT / "docs" / "batch_independence.md")
    layer, x = page["layer"], page["x"]
    layer.__class__ = script["MixedConv2d"]
    mixed = layer.positions(x)
    layer.__class__ = MetricConv2d
    torch.testing.assert_close(mixed, page["positions"](x, mixed=True), rtol=1e-4, atol=1e-5)
    script["DATA"]["digits"]["data"] = "digits/0-1"  # fewer images
    result = script["run"]("digits", {"eps_omega": 0.9}, mixed=True, epochs=2, seed=0, folder=str(tmp_path))
    assert all(0 <= value <= 100 for value in result.values()) and len(result) == 7
