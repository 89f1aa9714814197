"""A recipe's configuration: a dataclass, read from a YAML file and the command line; pydantic checks the types."""

import dataclasses
import difflib
import re
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Type, TypeVar, Union, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, ValidationError, model_validator
from pydantic.dataclasses import dataclass

C = TypeVar("C")
PACKAGE = Path(__file__).parents[1]


class RecipeError(Exception):
    """What stops a recipe and is no defect of the program: scripts print its message and nothing else."""


class ConfigError(RecipeError):
    """A configuration that cannot be used; the message says what was expected, what came, and what to do."""


def option(default: Any, help: str) -> Any:
    """A field of a configuration with its line of `--help`."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False, validate_assignment=True))
class Settings:
    """Base of the configurations: a pydantic dataclass, whose values are checked when they are set.

    Raises:
        ConfigError: A value is of another type or out of its range, in one line.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, values: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(values)
        except ValidationError as error:
            first = error.errors()[0]
            expected = re.sub("^Input should be (?=greater|less)", "expected a number ", first["msg"])
            expected = re.sub("^(Input should be|Value error,)", "expected", expected)
            raise ConfigError(f"{first['loc'][0]}: {expected}; got {first['input']!r}.") from None


def _as_written(value: Any, kind: Any) -> Any:
    """A value of a file or a command line for a field of type `kind`: what is no list is a list of one."""
    if isinstance(value, bool):  # a forgotten value (`--lr`), which pydantic would take for the number 1
        value = str(value).lower()
    return [value] if get_origin(kind) is list and not isinstance(value, (list, tuple)) else value


def build(cls: Type[C], values: Dict[str, Any], where: str = "config") -> C:
    """The configuration `cls` with `values` as a file or a command line has them.

    Raises:
        ConfigError: An unknown key (the nearest known one is named), or a value of another type or out of its range.
    """
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known are: {', '.join(names)}."
            raise ConfigError(f"{where}: unknown key {key!r}. {hint}")
    kinds = get_type_hints(cls)
    return cls(**{key: _as_written(value, kinds[key]) for key, value in values.items()})


def plain(config: Any) -> Dict[str, Any]:
    """A configuration as its file gives it back: tuples are lists."""
    return yaml.safe_load(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


class _Loader(yaml.SafeLoader):
    """Scalars as YAML 1.2 has them: `no` and 007 are text, 1e-4 is a number."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern in {
    "null": r"~|null|",
    "bool": r"[Tt]rue|[Ff]alse",
    "int": r"[-+]?(0|[1-9]\d*)",
    "float": r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?|[-+]?\.inf|\.nan",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), None)


def merge(base: Dict[str, Any], update: Dict[str, Any], path: str = "") -> Dict[str, Any]:
    """`base` with the values of `update`, key by key in the dictionaries of both; `path` is their place, for errors."""
    merged = dict(base)
    for key, value in update.items():
        if isinstance(value, dict) and merged.get(key) is not None:
            if not isinstance(merged[key], dict):
                what = f"{path}{key}: {merged[key]!r} is no dictionary"
                raise ConfigError(
                    f"{what}, so it has no {path}{key}.{next(iter(value), '')}; leave one of the two out."
                )
            value = merge(merged[key], value, f"{path}{key}.")
        merged[key] = value
    return merged


def config_file(name: str) -> Path:
    """The file `name`, or else the configuration of this package that has that name.

    Raises:
        ConfigError: There is neither.
    """
    if Path(name).is_file():
        return Path(name)
    # inside the package where it was installed, beside it in a copy of the repository
    folder = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
    ours = {path.stem: path for path in folder.glob("*.yaml")}
    if name not in ours:
        near = difflib.get_close_matches(name, ours, n=1)
        raise ConfigError(f"--config: there is no file {name!r}{f'; did you mean {near[0]!r}?' if near else '.'}")
    return ours[name]


def read_yaml(path: Union[str, Path], derived: Sequence[Path] = ()) -> Dict[str, Any]:
    """A YAML file that holds a mapping; it may name another as `base: other.yaml` (beside it) and say what differs.

    Args:
        path: The file.
        derived: The files whose base it is, the first of them first.

    Raises:
        ConfigError: A file that is missing, is no YAML, holds no mapping or is its own base.
    """
    chain = [*derived, Path(path).resolve()]
    if chain[-1] in derived:
        raise ConfigError(f"base: the files go round in a circle: {' → '.join(file.name for file in chain)}.")
    try:
        data = yaml.load(Path(path).read_bytes(), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"--config: there is no file {str(path)!r}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: this is not YAML: {error}") from None
    if not isinstance(data, (dict, type(None))):
        raise ConfigError(f"{path}: expected `key: value` lines, got a {type(data).__name__}.")
    base = (data or {}).pop("base", None)
    return (data or {}) if base is None else merge(read_yaml(Path(path).parent / str(base), chain), data)


def _overrides(arguments: Sequence[str]) -> Dict[str, Any]:
    """`--a 1 --b.c=2 --flag` → {"a": "1", "b": {"c": 2}, "flag": "true"}.

    A word is text, which its field's type reads; what is inside a dictionary has no such type, so YAML reads it.
    """
    found: List[List[str]] = []  # of a key and its words each
    for word in arguments:
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            found.append([key.replace("-", "_"), text] if equals else [key.replace("-", "_")])
        elif re.fullmatch(r"-[a-zA-Z]\w?", word):
            raise ConfigError(f"command line: {word!r}: there are no short options; --help has the long ones.")
        elif found:
            found[-1].append(word)
        else:
            raise ConfigError(f"command line: expected --key value, got {word!r}.")
    result: Dict[str, Any] = {}
    for key, *words in found:
        typed, words = "." not in key, words or ["true"]
        try:
            read = [w if typed and w[:1] not in "[{" and w != "null" else yaml.load(w, _Loader) for w in words]
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: this is not YAML: {error}") from None
        value = read[0] if len(read) == 1 else read
        for part in reversed(key.split(".")):
            value = {part: value}
        result = merge(result, value)
    return result


def _help(cls: type, description: str) -> str:
    lines = [
        description,
        "",
        "usage: --config FILE.yaml (or quickstart, ...) [--debug] [--key value ...]; the file may hold these keys.",
        "--flag and --no-flag are true and false, and a dash in a key is an underscore.",
        "",
    ]
    for field in dataclasses.fields(cls):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        lines.append(f"  --{field.name:<22} {field.metadata.get('help', '')} (default: {default})")
    return "\n".join(lines)


def from_command_line(cls: Type[C], description: str, arguments: Optional[Sequence[str]] = None) -> C:
    """The configuration that `--config FILE` and the overrides after it describe.

    A configuration with a field `name` gets the file's name there unless it says otherwise.

    Raises:
        ConfigError: See `build`.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments or "-h" in arguments:
        print(_help(cls, description))
        raise SystemExit(0)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    overrides = _overrides(arguments)
    for key in [key for key in overrides if key.startswith("no_") and key[3:] in names and overrides[key] == "true"]:
        del overrides[key]
        overrides[key[3:]] = "false"
    path = overrides.pop("config", None)
    if isinstance(path, list):
        raise ConfigError(f"--config: expected one file; got {' and '.join(path)}.")
    values = {} if path is None else read_yaml(config_file(path))
    if path is not None and "name" in names:
        values.setdefault("name", Path(path).stem)
    return build(cls, merge(values, overrides), where=str(path or "command line"))


def main(run: Callable[[C], Any], cls: Type[C], description: Optional[str]) -> None:
    """Body of a script: reads the configuration and runs it.

    A refusal is one line on stderr and exit status 2, with its traceback where `--debug` is given. A defect of the
    program keeps its traceback in any case.
    """
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a locale without ± or × is no reason to lose a result
    try:
        run(from_command_line(cls, description or "", arguments))
    except (RecipeError, OSError, ImportError) as error:
        if len(arguments) < len(sys.argv) - 1:
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted: the same command goes on from the last checkpoint, if there is one.") from None
