"""What is examined: a device, the folder where runs go, and tiny runs between the two."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from sophia_galore.doctor.gpus import used_bytes
from sophia_galore.doctor.trials import Trials
from sophia_galore.engine.determinism import repeatable
from sophia_galore.errors import EnvironmentProblem
from sophia_galore.plan.device import choose_device
from sophia_galore.train.folder import nearest_folder

OPTION = "--device "


@dataclass(frozen=True)
class Subject:
    """What is examined.

    Args:
        device_name: auto, cpu, cuda or mps.
        runs: The folder where runs go; it need not exist.
        work: An empty folder for the examination, which is removed later.
        gpu_bytes: What was taken of each GPU's memory before this process used one, by the GPU's id.
    """

    device_name: str
    runs: Path
    work: Path
    gpu_bytes: dict[str, int] = field(default_factory=dict)

    @cached_property
    def device(self) -> torch.device:
        """The device.

        Raises:
            EnvironmentProblem: There is none of that name, or it is not supported.
        """
        return choose_device(self.device_name, OPTION)

    @property
    def has_device(self) -> bool:
        """Whether the device can be used."""
        try:
            return bool(self.device)
        except EnvironmentProblem:
            return False

    @cached_property
    def trials(self) -> Trials:
        """The tiny runs."""
        return Trials(self.work / "self-test", self.device)


@contextmanager
def subject_of(device_name: str, runs: Path) -> Iterator[Subject]:
    """Make a folder for an examination, on the disk where runs go if that can be written to.

    Args:
        device_name: As in `Subject`.
        runs: As in `Subject`.
    """
    used = used_bytes()
    for place in (nearest_folder(runs), None):  # None: the system's own
        with suppress(OSError):
            made = tempfile.TemporaryDirectory(prefix=".sophia-galore-doctor-", dir=place, ignore_cleanup_errors=True)
            break
    else:
        raise EnvironmentProblem(
            f"Neither {nearest_folder(runs)} nor the folder for temporary files can be written to.",
            "Free some space, or name another place with --folder.",
        )
    with made as work:
        subject = Subject(device_name, runs, Path(work), used)
        # cuBLAS must know before its first use that its results have to repeat.
        with repeatable(subject.device if subject.has_device else torch.device("cpu")):
            yield subject
