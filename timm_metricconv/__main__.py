"""`python -m timm_metricconv`: versions, devices, which backends can run here; `--check`: whether they are right."""

import argparse
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__
from .check import check
from .ops import BACKENDS, why_not_on

PACKAGES = ("torch", "torchvision", "timm", "triton", "numba", "safetensors", "huggingface_hub", "accelerate")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main() -> int:
    """Prints what a bug report needs, or the verdicts of `check`; the exit status is 1 where a backend is wrong."""
    parser = argparse.ArgumentParser(prog="python -m timm_metricconv", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare every backend with the reference, and time it")
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    if parser.parse_args().check:
        passed = True
        for verdict in check(devices):
            print(f"{verdict.backend:<12} on {verdict.device}: {verdict.text}", flush=True)
            passed &= verdict.passed
        return 0 if passed else 1
    print(f"timm_metricconv {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        print(f"  {package:<16} {_version(package)}")
    names = [f"cpu ({torch.get_num_threads()} threads)"]
    names += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    print("devices: " + ", ".join(names))
    for device in devices:
        print(f"backends on {device}, the first that can run is the default (--check compares them):")
        for name in BACKENDS:
            reason = why_not_on(device, name)
            print(f"  {name:<16} {'runs' if reason is None else f'cannot run: {reason}'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
