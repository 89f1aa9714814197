"""`python -m timm_metricconv`: versions, devices, and which backends can run here."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__
from .ops import BACKENDS, why_not_on

PACKAGES = ("torch", "torchvision", "timm", "triton", "numba", "safetensors", "huggingface_hub", "accelerate")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Prints what a bug report needs."""
    print(f"timm_metricconv {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        print(f"  {package:<16} {_version(package)}")
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    names = [f"cpu ({torch.get_num_threads()} threads)"]
    names += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    print("devices: " + ", ".join(names))
    for device in devices:
        print(f"backends on {device}, the first that can run is the default:")
        for name in BACKENDS:
            reason = why_not_on(device, name)
            print(f"  {name:<16} {'runs' if reason is None else f'cannot run: {reason}'}")


if __name__ == "__main__":
    main()
