"""What pyproject.toml declares is what the code imports, and its lowest versions are those that CI installs."""

import ast
import graphlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import timm_metricconv

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML parser")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The distribution that brings a module, where the two names differ.
DISTRIBUTION = {
    "PIL": "pillow",
    "llvmlite": "numba",  # which needs one release of it
    "pytorch_grad_cam": "grad-cam",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "triton": "torch",  # which needs one release of it, on Linux alone
    "yaml": "pyyaml",
}
# Measured beside ours where it is installed: no dependency.
RIVALS = {"deformops"}
BY_NAME = {"find_spec", "import_module", "importorskip", "need"}
OUTER = ("recipes/", "viz.py")  # what the extras are for


def requirements(*extras):
    """The requirements of these extras and of the extras that they name, or the package's own."""
    groups = PROJECT["optional-dependencies"]
    lines = [line for extra in extras for line in groups[extra]] if extras else PROJECT["dependencies"]
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            yield from requirements(*requirement.extras)
        else:
            yield requirement


def names(found):
    return {canonicalize_name(requirement.name) for requirement in found}


def imports(*paths):
    """The distributions that these files import, whether by a statement or by name."""
    modules = set()
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            modules |= {node.args[0].value} if function in BY_NAME else set()
    ours = {PROJECT["name"], *(path.stem for path in paths)}
    tops = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - ours - RIVALS
    return {canonicalize_name(DISTRIBUTION.get(top, top)) for top in tops}


def sources(outer):
    package = ROOT / "timm_metricconv"
    files = [path for path in package.rglob("*.py") if path.relative_to(package).as_posix().startswith(OUTER) == outer]
    assert files
    return files


def test_types_are_shipped():
    """In the installed package, where mypy looks."""
    assert (Path(timm_metricconv.__file__).parent / "py.typed").exists()


def test_wheel_has_every_module_and_configuration(tmp_path):
    """And the source archive what the wheel is built from."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    left = shutil.ignore_patterns(".*", "__pycache__", "build", "docs", "results", "runs", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=left)
    for build in ("wheel", "sdist"):
        code = f"from setuptools import build_meta; build_meta.build_{build}({str(tmp_path)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "timm_metricconv").rglob("*.py")}
    configs = {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    (wheel,), (archive,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    assert package | {f"timm_metricconv/{name}" for name in configs} <= set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(archive) as files:
        assert package | configs | {"setup.py"} <= {name.partition("/")[2] for name in files.getnames()}


def test_imports_go_one_way():
    """Whoever reads a file need not have read those that stand on it; what only the types need counts too."""
    package = ROOT / "timm_metricconv"
    files = {path.relative_to(ROOT).with_suffix("").parts: path for path in package.rglob("*.py")}
    graph = {}
    for module, path in files.items():
        for node in (node for node in ast.walk(ast.parse(path.read_text())) if getattr(node, "level", 0)):
            base = (*module[: len(module) - node.level], *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                candidates = [(*base, alias.name), (*base, alias.name, "__init__"), base, (*base, "__init__")]
                graph.setdefault(module, set()).add(next(part for part in candidates if part in files))
    assert len(graph) > 40
    graphlib.TopologicalSorter(graph).prepare()  # raises and names the circle
    order = ["geometry", "ops", "layers", "models", "viz", "recipes"]
    pairs = {(module[1], other[1]) for module, others in graph.items() for other in others}
    inner = [(one, other) for one, other in pairs if one in order and other in order and one != other]
    assert ("layers", "ops") in inner and ("ops", "geometry") not in inner
    assert all(order.index(one) > order.index(other) for one, other in inner)


def test_core_imports_what_it_declares():
    assert imports(*sources(outer=False)) == names(requirements())


def test_recipes_import_what_an_extra_declares():
    extras = [name for name in PROJECT["optional-dependencies"] if name not in ("docs", "test", "test-all", "dev")]
    assert imports(*sources(outer=True)) <= names(requirements()) | names(requirements(*extras))


def test_export_needs_its_own_extra_alone():
    """README installs no [recipes] for it."""
    recipes = ROOT / "timm_metricconv" / "recipes"
    files = [recipes / "export.py"]
    for file in files:
        siblings = [node.module for node in ast.walk(ast.parse(file.read_text())) if getattr(node, "level", 0) == 1]
        files += [path for path in (recipes / f"{name}.py" for name in siblings) if path not in files]
    assert {path.stem for path in files} >= {"export", "config", "network"}
    assert imports(*files) - names(requirements("export")) <= names(requirements()) | {"safetensors"}  # timm's own


def test_tests_import_what_their_extra_declares():
    """[dev] is [test-all] and what does not go with the lowest versions; tests of Ray are left out where it is not."""
    declared = names(requirements()) | names(requirements("dev", "cluster"))
    assert imports(*(ROOT / "tests").glob("*.py")) <= declared


@pytest.mark.parametrize("folder, extras", [("scripts", ()), ("docs", ("recipes", "data"))])
def test_scripts_import_no_more_than_the_package(folder, extras):
    assert imports(*(ROOT / folder).rglob("*.py")) <= names(requirements()) | names(requirements(*extras))


def test_demo_imports_what_its_extra_declares():
    assert imports(*(ROOT / "demo").glob("*.py")) <= names(requirements()) | names(requirements("app"))


def test_lowest_versions_are_those_that_ci_installs():
    """A bound that is raised in one place alone was never tested."""
    text = "\n".join(path.read_text() for path in (ROOT / ".ci").glob("lowest*.txt"))
    pinned = {canonicalize_name(name): version for name, version in re.findall(r"^(\S+)==(\S+)", text, re.MULTILINE)}
    declared = {
        canonicalize_name(requirement.name): next(s.version for s in requirement.specifier if s.operator == ">=")
        for requirement in [*requirements(), *requirements("test-all")]
    }
    assert pinned == declared
