"""What streaming costs: the bytes that move in a step, and the tokens a step from which that hides behind computation.

    T_move(step)    = read / bandwidth in + written / bandwidth out
    T_compute(step) = 8 P tokens / F          2 P in forward, 2 P when it is recomputed, 4 P in backward
    hidden from     tokens = T_move F / (8 P)

P is the number of parameters (Kaplan et al., arXiv 2001.08361, section 2.1), F what the device computes in a second.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sophia_galore.plan.placements import Streamed
from sophia_galore.plan.route import Route

_OPERATIONS = 8
# Long enough to get past caches and clocks that rise, short enough to wait for.
_MATRIX = 1536
_COPIED_BYTES = 128 * 2**20
_REPEATS = 3


@dataclass(frozen=True)
class Machine:
    """How fast a machine is.

    Args:
        flops: Floating-point operations a second, of matrix products in compute precision.
        host_bytes_per_s: Bytes a second between host memory and device, one way.
        disk_read_bytes_per_s: Bytes a second from disk.
        disk_write_bytes_per_s: Bytes a second to disk, until they are there.
        measured: Whether this was measured; if not, it is what is usual for a laptop with a small card.
    """

    flops: float
    host_bytes_per_s: float
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    measured: bool


USUAL = Machine(10e12, 10e9, 2e9, 1e9, measured=False)
"""A laptop with a small card: half of PCIe 4.0 x8, an NVMe disk, 10 TFLOP/s in bfloat16."""


@dataclass(frozen=True)
class Transfers:
    """What moves in a step, and what that takes.

    Args:
        read_bytes: Bytes to the device.
        written_bytes: Bytes back.
        disk_written_bytes: Part of the latter that is written to disk.
        move_s: Seconds that this takes.
        compute_s: Seconds that the computation of the step takes.
        hidden_from_tokens: Tokens a step from which the computation takes longer.
    """

    read_bytes: int
    written_bytes: int
    disk_written_bytes: int
    move_s: float
    compute_s: float
    hidden_from_tokens: int


def transfers_of(streamed: Streamed, routes: Sequence[Route], num_tokens: int, machine: Machine) -> Transfers:
    """Compute what moves in a step.

    A layer is read in forward, and again in backward with its state; a head is read three times, an embedding that is
    not tied once. State without which weights can't be read, as of late updates, is read each time. Weights and moments
    are written back, bases only at a refresh, which is not counted.

    Args:
        streamed: What streams.
        routes: One for each parameter.
        num_tokens: Tokens of a step.
        machine: How fast the machine is.
    """
    by_name = {route.name: route for route in routes}
    read = {"host": 0, "disk": 0}
    written = {"host": 0, "disk": 0}
    for unit in streamed.units:
        inside = [by_name[name] for name in streamed.inside[unit.name]]
        times = 2 if unit.name in streamed.parts.layers else 3 if unit.name == streamed.parts.head else 1
        read[unit.placement] += times * sum(route.weight_bytes for route in inside)
        read[unit.placement] += sum(route.state_bytes + route.projection_bytes for route in inside if route.spec)
        early = sum(unit.layouts["state"].spans[name].num_bytes for name in unit.early)
        read[unit.placement] += (times - 1) * early
        written[unit.placement] += sum(_written_bytes(route) for route in inside)
    rates_in = {"host": machine.host_bytes_per_s, "disk": machine.disk_read_bytes_per_s}
    rates_out = {"host": machine.host_bytes_per_s, "disk": machine.disk_write_bytes_per_s}
    move_s = sum(read[place] / rates_in[place] + written[place] / rates_out[place] for place in read)
    of_token_s = _OPERATIONS * sum(route.num_elements for route in routes) / machine.flops
    return Transfers(
        sum(read.values()),
        sum(written.values()),
        written["disk"],
        move_s,
        num_tokens * of_token_s,
        int(move_s / of_token_s) + 1 if streamed.units else 0,
    )


def measure(device: torch.device, dtype: torch.dtype, folder: Path) -> Machine:
    """Measure this machine, in about two seconds; some hundred megabytes are written to disk and removed.

    Args:
        device: The compute device.
        dtype: Compute precision.
        folder: A folder on the disk that is measured.

    Raises:
        OSError: The folder can't be written to.
    """
    host = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty_like(host, device=device)

    def copy() -> None:
        there.copy_(host)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    content = np.random.default_rng(0).integers(0, 256, _COPIED_BYTES, dtype=np.uint8).data
    into = memoryview(bytearray(_COPIED_BYTES))
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".speed.", buffering=0) as file:

        def write() -> None:
            file.seek(0)
            file.write(content)
            os.fsync(file.fileno())

        def read() -> None:
            file.seek(0)
            file.readinto(into)

        write_s = _seconds(write, repeats=1)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        read_s = _seconds(read, repeats=1)
    return Machine(
        flops(device, dtype),
        _COPIED_BYTES / _seconds(copy),
        _COPIED_BYTES / read_s,
        _COPIED_BYTES / write_s,
        measured=True,
    )


def flops(device: torch.device, dtype: torch.dtype, size: int = _MATRIX) -> float:
    """Measure the floating-point operations that a device does in a second, in products of matrices.

    Args:
        device: The device.
        dtype: Precision of the matrices.
        size: Their number of rows and columns.
    """
    one = torch.randn(size, size, device=device).to(dtype)

    def multiply() -> None:
        (one @ one).sum().item()

    return 2 * size**3 / _seconds(multiply)


def _written_bytes(route: Route) -> int:
    if route.spec is None:
        return 0
    subspace = route.spec.subspace
    return route.state_bytes + (0 if subspace is not None and subspace.folds_late else route.weight_bytes)


def _seconds(work: Callable[[], None], repeats: int = _REPEATS) -> float:
    """Return the shortest time that some work takes."""
    taken: list[float] = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began_s)
    return min(taken)
