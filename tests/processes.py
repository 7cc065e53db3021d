"""A function in several processes that can talk to each other, as `torchrun` starts them: over gloo, on the CPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from forked import Forked

# None of these tests takes that long; a process that waits for one that failed must not wait for half an hour.
PATIENCE = timedelta(seconds=120)


def in_processes(function: Callable[[], Any], num: int, folder: Path) -> list[Any]:
    """Call a function in forked processes that form a group.

    Args:
        function: What to call in each of them.
        num: Number of processes.
        folder: For what they print and return.

    Returns:
        What each returned, by rank: anything that `torch.save` takes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=folder))

    def child(rank: int) -> Callable[[], int]:
        def body() -> int:
            os.environ |= {
                "GLOO_SOCKET_IFNAME": "lo",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num),
                "LOCAL_WORLD_SIZE": str(num),
            }
            torch.set_num_threads(1)
            dist.init_process_group(
                "gloo", init_method=f"file://{place / 'store'}", rank=rank, world_size=num, timeout=PATIENCE
            )
            torch.save(function(), place / f"{rank}.pt")
            dist.barrier()
            dist.destroy_process_group()
            return 0

        return body

    logs = [(place / f"{rank}.log").open("a", encoding="utf-8") for rank in range(num)]
    children = [Forked(child(rank), log) for rank, log in enumerate(logs)]
    codes = [one.wait() for one in children]
    for log in logs:
        log.close()
    assert not any(codes), "\n".join((place / f"{rank}.log").read_text() for rank in range(num))
    return [torch.load(place / f"{rank}.pt", weights_only=False) for rank in range(num)]
