"""What a run was carried out with: machine, versions, command. Numbers mean little without them."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from sophia_galore import __version__

_PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "numpy")


def environment(device: torch.device, command: str) -> dict[str, Any]:
    """Machine, versions, command and time, as plain data.

    Args:
        device: Where the arithmetic runs.
        command: What was typed; "" if the run was not started by a command.

    Returns:
        `machine` (its parts; memory in bytes), `versions` by package, `command`, `started` (UTC, ISO 8601).
    """
    return {
        "machine": {
            "system": platform.platform(aliased=True, terse=True),
            "processor": processor(),
            "num_cores": psutil.cpu_count(logical=True),
            "num_threads": torch.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "gpu_memory_bytes": torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None,
        },
        "versions": {"sophia-galore": __version__, "python": platform.python_version(), **_installed()},
        "command": command,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _installed() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an optional one
    return found
