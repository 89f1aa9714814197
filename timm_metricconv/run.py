"""`python -m timm_metricconv.run script.py …`: a script of timm's that knows our models, as do its child processes."""

import os
import runpy
import sys
from pathlib import Path

import timm_metricconv  # noqa: F401


def main() -> None:
    """Runs the script with the arguments that follow it."""
    del sys.argv[0]
    if not sys.argv or not Path(sys.argv[0]).is_file():
        print(f"expected the path of a script, got {sys.argv[0] if sys.argv else 'nothing'}", file=sys.stderr)
        sys.exit(2)
    startup = str(Path(__file__).parent / "startup")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (startup, os.environ.get("PYTHONPATH"))))
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as `python script.py` has it
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
