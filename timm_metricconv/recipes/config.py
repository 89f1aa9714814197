"""A recipe's configuration: a dataclass, read from a YAML file and the command line; a misspelt key is refused."""

import dataclasses
import difflib
import sys
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    List,
    Literal,
    Optional,
    Sequence,
    Type,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

C = TypeVar("C")


class RecipeError(Exception):
    """What stops a recipe and is no defect of the program: scripts print its message and nothing else."""


class ConfigError(RecipeError, ValueError):
    """A configuration that cannot be used; the message says what was expected, what came, and what to do."""


def option(default: Any, help: str) -> Any:
    """A field of a configuration with its line of `--help`."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def _refuse_unknown(key: str, known: Sequence[str], where: str) -> None:
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known are: {', '.join(known)}."
        raise ConfigError(f"{where}: unknown key {key!r}.{hint}")


def _coerce(key: str, value: Any, kind: Any) -> Any:
    """`value` as a field of type `kind`; YAML reads 1e-4 as a string, so numbers are tried."""
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin is Union:
        if value is None and type(None) in get_args(kind):
            return None
        return _coerce(key, value, next(k for k in get_args(kind) if k is not type(None)))
    if origin is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{key}: expected one of {', '.join(map(str, get_args(kind)))}, got {value!r}.")
        return value
    if origin in (list, List):
        if not isinstance(value, (list, tuple)):
            value = [value]
        item = (get_args(kind) or (Any,))[0]
        return [_coerce(key, v, item) for v in value]
    if origin in (dict, Dict):
        kind = dict
    if kind in (float, int) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
            if kind is float or number == int(number):
                return kind(number)
        except ValueError:
            pass
    if kind is str and isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{key}: expected {kind.__name__}, got {value!r}.")


def read_yaml(path: Union[str, Path]) -> Dict[str, Any]:
    """A YAML file that holds a mapping; it may name another as `base: other.yaml` (beside it) and say what differs."""
    try:
        data = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"--config: there is no file {str(path)!r}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: this is not YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, got a {type(data).__name__}.")
    base = data.pop("base", None)
    return data if base is None else _merge(read_yaml(Path(path).parent / base), data)


def plain(config: Any) -> Dict[str, Any]:
    """A configuration as its file gives it back: tuples are lists."""
    return yaml.safe_load(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def build(cls: Type[C], values: Dict[str, Any], where: str = "config") -> C:
    """The configuration `cls` with `values`, each checked against its field's type.

    Raises:
        ConfigError: An unknown key (the nearest known one is named) or a value of the wrong type.
    """
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        _refuse_unknown(key, names, where)
    return cls(**{key: _coerce(key, value, hints[key]) for key, value in values.items()})


def _overrides(arguments: Sequence[str]) -> Dict[str, Any]:
    """`--a 1 --b.c=2 --flag` → {"a": 1, "b": {"c": 2}, "flag": True}; values are YAML."""
    result: Dict[str, Any] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"command line: expected --key value, got {word!r}.")
        key, equals, text = word[2:].partition("=")
        if not equals:
            following: List[str] = []
            while words and not words[0].startswith("--"):
                following.append(words.pop(0))
            text = following[0] if len(following) == 1 else f"[{', '.join(following)}]" if following else "true"
        *parents, last = key.replace("-", "_").split(".")
        target = result
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = yaml.safe_load(text)
    return result


def _merge(base: Dict[str, Any], update: Dict[str, Any]) -> Dict[str, Any]:
    merged = dict(base)
    for key, value in update.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _help(cls: type, description: str) -> str:
    lines = [description, "", "usage: --config FILE.yaml [--key value ...]; keys, which the file may hold as well:", ""]
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
    overrides = _overrides(arguments)
    path = overrides.pop("config", None)
    values: Dict[str, Any] = {}
    if path is not None:
        values = read_yaml(path)
        if any(field.name == "name" for field in dataclasses.fields(cls)):  # type: ignore[arg-type]
            values.setdefault("name", Path(path).stem)
    return build(cls, _merge(values, overrides), where=str(path or "command line"))


def main(run: Callable[[C], Any], cls: Type[C], description: Optional[str]) -> None:
    """Body of a script: reads the configuration and runs; a refusal is one line on stderr and exit status 2."""
    try:
        run(from_command_line(cls, description or ""))
    except (RecipeError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted: the same command goes on from the last checkpoint.") from None
