"""`metricconv COMMAND --config quickstart --key value ...`: the scripts of the repository, without a copy of it."""

import sys
from importlib import import_module

# Module and configuration of each command; the function has the command's name.
COMMANDS = {
    "train": ("train", "TrainConfig"),
    "compare": ("compare", "CompareConfig"),
    "validate": ("validate", "ValidateConfig"),
    "predict": ("predict", "PredictConfig"),
    "denoise": ("denoise", "DenoiseConfig"),
    "visualise": ("visualise", "VisualiseConfig"),
    "benchmark": ("benchmark", "BenchmarkConfig"),
    "export": ("export", "ExportConfig"),
    "push": ("hub", "HubConfig"),
}


def main() -> None:
    """Runs the command that the command line names."""
    name = sys.argv.pop(1) if sys.argv[1:] else "--help"
    if name in ("-h", "--help"):
        print(f"{__doc__}\n\ncommands: {', '.join(COMMANDS)}; each has a --help")
        return
    if name not in COMMANDS:
        print(f"error: expected one of {', '.join(COMMANDS)}; got {name!r}.", file=sys.stderr)
        raise SystemExit(2)
    module, settings = COMMANDS[name]
    try:
        from . import config

        recipe = import_module(f".{module}", __package__)
    except ModuleNotFoundError as error:
        extra = "export" if name == "export" else "recipes"
        print(f'error: {error}: {name} needs pip install "timm_metricconv[{extra}]".', file=sys.stderr)
        raise SystemExit(2) from None
    config.main(getattr(recipe, name), getattr(recipe, settings), recipe.__doc__)


if __name__ == "__main__":
    main()
