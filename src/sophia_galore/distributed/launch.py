"""Join the processes that `torchrun` started."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from sophia_galore.distributed.meeting import meet
from sophia_galore.distributed.processes import WHY_GONE, Processes
from sophia_galore.errors import EnvironmentProblem, RunError, SophiaGaloreError, short

# How the end of a process that was there before shows in a connection to it.
_GONE = ("reset by peer", "closed by peer", "Broken pipe", "closed by remote peer")


def num_processes() -> int:
    """Return the number of processes of this run: as `torchrun` says, or 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(*, uses_gpus: bool, timeout_minutes: float) -> Iterator[Processes]:
    """Join the other processes of a run; a single process joins nothing.

    Args:
        uses_gpus: Whether tensors on GPUs are sent as well (by NCCL; the rest, and all on CPUs, by Gloo).
        timeout_minutes: How long a process waits for another one.

    Yields:
        The processes. If the code in the context fails, the others are told.

    Raises:
        EnvironmentProblem: The others can't be reached.
        RunError: One of them was there, and is gone.
    """
    if num_processes() == 1:
        yield Processes()
        return
    timeout = timedelta(minutes=timeout_minutes)
    try:
        shared, rank, count = next(rendezvous("env://", timeout=timeout))
        store = meet(shared, rank, count, timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if uses_gpus else "gloo", store=store, rank=rank, world_size=count, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        if any(words in str(error) for words in _GONE):
            raise RunError(f"Another process of the run ended before all had met: {short(error)}.", WHY_GONE) from error
        raise EnvironmentProblem(
            f"The processes of this run can't reach each other: {short(error)}.",
            "Start them with torchrun; on several machines, with an address and a port that all of them can reach.",
        ) from error
    processes = Processes(rank, count, int(os.environ.get("LOCAL_RANK", "0")), store)
    try:
        yield processes
    except SophiaGaloreError as error:
        said = processes.failing(error)
        if said is error:
            raise
        raise said from error
    finally:
        dist.destroy_process_group()


def launcher() -> str:
    """Return what started this process: the same for all that it started on this machine, also after a failure."""
    return f"{socket.gethostname()}:{os.getppid()}" if num_processes() > 1 else ""


def is_first_process() -> bool:
    """Return whether this process speaks for all, as `torchrun` says."""
    return os.environ.get("RANK", "0") == "0" or num_processes() == 1


def is_first_on_machine() -> bool:
    """Return whether this process is the first of those that `torchrun` started on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or num_processes() == 1


def uses_gpus(device: str) -> bool:
    """Return whether the arithmetic of a run is on a GPU.

    Args:
        device: `training.device`.
    """
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
