"""The environment of a run: machine, versions, command."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from sophia_galore import __version__
from sophia_galore.records.run import Environment, Machine

_PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "numpy")


def environment(device: torch.device, command: str, machines: Sequence[str], launcher: str) -> dict[str, Any]:
    """Return machine, versions, command and time, for `environment.json`.

    Args:
        device: The device of the arithmetic.
        command: The command line; "" if the run was started from Python.
        machines: The machine of each process, by rank.
        launcher: What started several processes; "" for one.
    """
    on_gpu = device.type == "cuda"
    several = {"processes": tuple(machines), "launcher": launcher} if len(machines) > 1 else {}
    return Environment(
        machine=Machine(
            system=platform.platform(aliased=True, terse=True),
            processor=processor(),
            num_cores=psutil.cpu_count(logical=True),
            num_threads=torch.get_num_threads(),
            memory_bytes=psutil.virtual_memory().total,
            gpu=torch.cuda.get_device_name(device) if on_gpu else None,
            gpu_memory_bytes=torch.cuda.mem_get_info(device)[1] if on_gpu else None,
        ),
        versions={"sophia-galore": __version__, "python": platform.python_version(), **_installed()},
        command=command,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        **several,
    ).to_json()


def processor() -> str:
    """Return the processor's name."""
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
