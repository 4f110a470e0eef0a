"""Describe the software and the machine that produced a result."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from splitquant_mlx.runtime.memory import memory_bytes

PACKAGES = ("splitquant-mlx", "mlx", "mlx-lm", "numpy", "scikit-learn", "transformers")


def versions() -> dict[str, str]:
    """Return the version of Python and of every package that results depend on."""
    result = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            result[package] = version(package)
    return result


def describe_machine() -> dict[str, str | int]:
    """Return chip, number of cores, operating system and memory_bytes of this machine."""
    import mlx.core as mx

    mac_version = platform.mac_ver()[0]
    system = f"macOS {mac_version}" if mac_version else platform.system()
    return {
        "chip": str(mx.device_info().get("device_name", platform.processor())),
        "cores": os.cpu_count() or 1,
        "system": f"{system} {platform.machine()}",
        "memory_bytes": memory_bytes(),
    }


def made_with() -> dict[str, Any]:
    """Return machine and versions as the fields that a result's JSON stores."""
    return {"machine": describe_machine(), "versions": versions()}
