"""A folder of the first process on every machine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sophia_galore.distributed.processes import Processes

_CHUNK_BYTES = 16 * 2**20


@contextmanager
def on_each_machine(processes: Processes, folder: Path, proof: str) -> Iterator[Path]:
    """Send a folder of the first process to the machines that lack it.

    Args:
        processes: The processes of the run.
        folder: The folder, as the first process sees it; the same in all.
        proof: Name of a file in it whose content tells it from other folders at the same place.

    Yields:
        The folder on this machine: the same one or, where it is not, a copy in a temporary folder.
    """
    if processes.is_alone:
        yield folder
        return
    sizes, content = processes.from_first((_sizes(folder), _read(folder / proof)) if processes.is_first else ({}, b""))
    machine = processes.rank - processes.local_rank
    here = {name: (folder / name).stat().st_size for name in sizes if (folder / name).is_file()}
    has_it = here == sizes and _read(folder / proof) == content
    if all(processes.gather(has_it)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="sophia-galore-") as given:
        places = processes.gather((machine, given, has_it))
        # The first process of a machine writes for all of that machine.
        place = next(Path(path) for first, path, _ in places if first == machine)
        writes = processes.local_rank == 0 and not has_it
        if writes and shutil.disk_usage(place).free < sum(sizes.values()):
            writes = False  # said below, by `find_checkpoint`: a file is missing
        for name, size in sizes.items():
            _send(processes, folder / name, place / name if writes else None, size)
        processes.gather(None)  # the copies are complete
        yield folder if has_it else place


def _send(processes: Processes, source: Path, target: Path | None, size: int) -> None:
    """Send a file from the first process, and write it where a target is given."""
    buffer = bytearray(_CHUNK_BYTES)
    reading = source.open("rb") if processes.is_first else None
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    writing = target.open("wb") if target is not None else None
    try:
        for start in range(0, size, _CHUNK_BYTES):
            view = memoryview(buffer)[: min(_CHUNK_BYTES, size - start)]
            if reading is not None:
                reading.readinto(view)
            processes.send(torch.frombuffer(view, dtype=torch.uint8), 0)
            if writing is not None:
                writing.write(view)
    finally:
        for file in (reading, writing):
            if file is not None:
                file.close()


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
