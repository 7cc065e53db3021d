"""Weights, states and layer inputs that live elsewhere: opened for a run, and removed at its end however it ends.

Files are in a folder of the run's own, beside its output folder. What a killed run left there is removed; a folder that
holds anything else is the user's, and is refused before a file in it is touched.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sophia_galore.config.size import bytes_in_words
from sophia_galore.distributed.processes import Processes
from sophia_galore.errors import EnvironmentProblem
from sophia_galore.memory.monitor import MemoryMonitor
from sophia_galore.model.disk import writing
from sophia_galore.streaming.open import INPUTS, Streaming, open_streaming
from sophia_galore.train.checkpoint import checkpoints
from sophia_galore.train.folder import locked, streaming_folder
from sophia_galore.train.prepared import Prepared

_OURS = re.compile(r"(weights|state)-\d+\.safetensors(\.new)?")


def open_streamed(
    prepared: Prepared, monitor: MemoryMonitor, at_end: ExitStack, processes: Processes
) -> Streaming | None:
    """Open what moves weights and states that live elsewhere than on the device.

    Args:
        prepared: The prepared run; its folder is locked.
        monitor: Measures memory.
        at_end: Ended with the run: then no more is written, and the files are removed.
        processes: The processes of the run; each has files of its own.

    Returns:
        What moves them; None if nothing lives elsewhere.

    Raises:
        EnvironmentProblem: There is no room for them, or their folder's name is taken.
    """
    streamed, memory = prepared.streamed, prepared.config.memory
    folder = streaming_folder(Path(prepared.config.run_folder), processes.rank)
    on_disk = "disk" in (memory.activations, *streamed.placements.values())
    if not remove_left(Path(prepared.config.run_folder), processes) and on_disk:
        raise EnvironmentProblem(
            f"{folder} holds what is not of this program, but layers that live on disk would be written there.",
            "Move it away, or choose another training.output_dir.",
        )
    if not streamed.units and memory.activations == "device":
        return None
    with keeping(prepared):
        if on_disk:
            at_end.callback(_remove_ours, folder)
        try:
            streaming = open_streaming(
                streamed.units,
                streamed.parts.ends,
                folder=folder,
                device=prepared.device,
                prefetches=memory.prefetch,
                most_rows=streamed.most_rows,
                inputs=memory.activations,
            )
        except MemoryError as error:
            if not streamed.bytes_in("host"):
                raise  # what ran out was not taken for them
            size = bytes_in_words(streamed.bytes_in("host"))
            raise EnvironmentProblem(
                f"Host memory of {size} for weights and states that live there can't be allocated.",
                "Use memory.placement=disk, or auto with a lower memory.host_limit.",
            ) from error
    at_end.callback(streaming.streams.close)
    for buffer in streaming.buffers:
        monitor.tag(buffer, "weights")
    return streaming


@contextmanager
def keeping(prepared: Prepared) -> Iterator[None]:
    """Explain a failure to write files of layers before the first step.

    Args:
        prepared: The prepared run.

    Raises:
        EnvironmentProblem: The disk is full or not writable.
    """
    folder, streamed = Path(prepared.config.run_folder), prepared.streamed

    def way_on() -> str:
        choose = "Or choose another training.output_dir, or memory.placement=host."
        return f"{choose} Checkpoints are not affected: go on with --resume." if checkpoints(folder) else choose

    with writing("What lives on disk", streaming_folder(folder).parent, way_on, needed_bytes=streamed.bytes_in("disk")):
        yield


def remove_left(run_folder: Path, processes: Processes) -> bool:
    """Remove the files of layers that a killed run left: this process's, and those of processes that are no more.

    Args:
        run_folder: The run's folder; none of its processes uses such files now.
        processes: The processes of the run.

    Returns:
        Whether the name of this process's folder is free now; False: something else is there.
    """
    own = streaming_folder(run_folder, processes.rank)
    if processes.local_rank == 0:
        first = streaming_folder(run_folder)
        for path in first.parent.glob(f"{glob.escape(first.name)}-*"):
            number = path.name.removeprefix(f"{first.name}-")
            if number.isdecimal() and int(number) >= processes.count:
                _remove_streamed(path)
    return _remove_streamed(own)


def remove_left_by_finished(run_folder: Path, processes: Processes) -> None:
    """Do the same for a run that is finished: a process may have been killed behind its last step.

    Args:
        run_folder: The run's folder. Nothing is removed while it is locked: then the run is about to do so itself.
        processes: The processes that found the run finished.
    """
    with ExitStack() as held:
        is_free = True
        if processes.is_first:
            try:
                held.enter_context(locked(run_folder))
            except EnvironmentProblem:
                is_free = False
        if processes.from_first(is_free):
            remove_left(run_folder, processes)
        processes.gather(None)  # the lock is held until all are done


def _remove_streamed(folder: Path) -> bool:
    """Remove what an earlier run left that was killed.

    Args:
        folder: The folder of its files.

    Returns:
        Whether the name is free now; False: something else is there, and nothing was removed.
    """
    if not os.path.lexists(folder):
        return True
    if folder.is_symlink() or not folder.is_dir():
        return False
    if not all(_is_ours(path, folder) for path in folder.rglob("*")):
        return False
    _remove_ours(folder)
    return True


def _remove_ours(folder: Path) -> None:
    """Remove the files of a run and, if nothing else is there, their folder."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        if _is_ours(path, folder):
            with contextlib.suppress(OSError):  # what can't be removed costs space, not the run
                path.rmdir() if path.is_dir() else path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _is_ours(path: Path, folder: Path) -> bool:
    if path.parent == folder and path.name == INPUTS:
        return path.is_dir() and not path.is_symlink()
    return path.parent in (folder, folder / INPUTS) and _OURS.fullmatch(path.name) is not None
