"""Find the other processes of the same attempt in a store that may hold what an earlier attempt wrote.

A launcher that starts processes again after a failure may give them the store of the failed ones. A process that read
the address of a dead one there would wait for it in vain. So the first process draws a word for the attempt, and tells
it to the others one by one: each proves by a word of its own that it is not an earlier one.
"""

from __future__ import annotations

import secrets
import time
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore  # type: ignore[attr-defined]

_PLACE = "sophia_galore/meeting"
_WAIT_S = 0.02


def meet(store: Any, rank: int, count: int, timeout: timedelta) -> PrefixStore:
    """Return a part of the store in which no earlier attempt has written.

    Args:
        store: Shared by all processes.
        rank: Number of this process.
        count: Number of processes.
        timeout: How long to wait for the others.

    Raises:
        RuntimeError: They did not come.
    """
    own, end = secrets.token_hex(8), time.monotonic() + timeout.total_seconds()
    if rank == 0:
        missing = set(range(1, count))
        while missing:
            for other in list(missing):
                theirs = _read(store, f"{other}/word")
                if _read(store, f"{other}/knows") == own:
                    missing.remove(other)
                elif theirs:
                    # Of an earlier attempt, perhaps: then nobody takes it, and the right one follows.
                    store.set(f"{_PLACE}/{other}/answer", f"{theirs} {own}")
            _pause(missing, end, f"process {min(missing, default=0)} did not come")
        return PrefixStore(f"{_PLACE}/{own}", store)
    store.set(f"{_PLACE}/{rank}/word", own)
    while True:
        theirs, _, word = _read(store, f"{rank}/answer").partition(" ")
        if theirs == own:
            store.set(f"{_PLACE}/{rank}/knows", word)
            return PrefixStore(f"{_PLACE}/{word}", store)
        _pause({0}, end, "process 0 did not come")


def _read(store: Any, key: str) -> str:
    return store.get(f"{_PLACE}/{key}").decode() if store.check([f"{_PLACE}/{key}"]) else ""


def _pause(missing: set[int], end: float, problem: str) -> None:
    if missing and time.monotonic() > end:
        raise RuntimeError(problem)
    if missing:
        time.sleep(_WAIT_S)
