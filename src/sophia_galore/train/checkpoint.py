"""Checkpoints: a checkpoint on disk is always complete.

It is written into a hidden temporary folder; every file is flushed to disk and its hash is written to a manifest; then
the folder is renamed. A process that is killed leaves either the whole checkpoint or a hidden folder that the next save
removes.

Of the time that a large checkpoint takes, the smaller part is writing to the system's cache. The rest does not touch
what steps change, so it can be done beside them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sophia_galore.errors import CheckpointError, UserError, short
from sophia_galore.model.disk import errno_of, not_saved
from sophia_galore.records import files
from sophia_galore.records.durable import flush, flush_folder
from sophia_galore.records.files import checkpoint_folder
from sophia_galore.records.metrics import Evaluation, evaluations_of
from sophia_galore.records.run import CheckpointManifest
from sophia_galore.records.schema import read_object
from sophia_galore.train.folder import free_name
from sophia_galore.weights.manifest import sha256_of
from sophia_galore.weights.tensor_stream import SHARD_BYTES, TensorStream, read_stream, write_stream

_NAME = re.compile(r"checkpoint-(\d+)")
# Smaller checkpoints are on the disk sooner than a thread has begun.
_AT_ONCE_BYTES = 64 * 2**20
_OPTIMIZER_STATE = re.compile(r"optimizer(-.*)?\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk.

    Args:
        folder: The checkpoint's folder.
        step: The step after which it was saved.
        plan: The plan of the run, as in its `plan.json`.
        config: The run's flattened configuration.
    """

    folder: Path
    step: int
    plan: dict[str, Any]
    config: dict[str, Any]

    def memory_report(self) -> dict[str, Any]:
        """Return the memory report up to this checkpoint; {} if an older version wrote it."""
        path = self.folder / files.MEMORY_REPORT
        return read_object(path) if path.is_file() else {}

    def evaluations(self) -> list[Evaluation]:
        """Return the evaluations up to this checkpoint."""
        return evaluations_of(read_object(self.folder / files.TRAINER_STATE).get("log_history", []))

    def optimizer_state(self) -> TensorStream:
        """Return the optimizer's state, which is read tensor by tensor."""
        return read_stream(optimizer_state_files(self.folder))


def at_once(work: Callable[[], None]) -> None:
    """Carry out work before going on."""
    work()


def save_checkpoint(
    run_folder: Path,
    step: int,
    *,
    optimizer_state: TensorStream,
    write_model: Callable[[Path], None],
    documents: Mapping[str, Any],
    keep_last: int,
    keep_steps: Collection[int] = (),
    needed_bytes: int = 0,
    shard_bytes: int = SHARD_BYTES,
    beside: Callable[[Callable[[], None]], None] = at_once,
) -> Path:
    """Write `checkpoint-STEP`, then delete the oldest ones beyond `keep_last`.

    Args:
        run_folder: The run's folder.
        step: The step that was just finished.
        optimizer_state: Named tensors, written one after the other.
        write_model: Writes the model's files into a folder.
        documents: JSON documents by file name.
        keep_last: Number of checkpoints to keep.
        keep_steps: Steps whose checkpoints are kept as well, however old.
        needed_bytes: About how many bytes are written, for the error message; 0: unknown.
        shard_bytes: Most bytes of the optimizer's state in a file.
        beside: Carries out what is left when a large checkpoint's files are written: flushing, hashing and the rename.
            Until it has, there is no checkpoint; an error of the disk may come only there.

    Returns:
        The checkpoint's folder.

    Raises:
        EnvironmentProblem: The disk is full or not writable; earlier checkpoints are untouched.
    """
    final = checkpoint_folder(run_folder, step)
    unfinished = run_folder / f".checkpoint-{step}.tmp"

    def complete() -> None:
        with _reporting(unfinished, final, needed_bytes):
            replaced = _finish(unfinished, final, step)
        if replaced is not None:
            _move_unlisted_files(replaced, final)
        others = [path for path in checkpoints(run_folder) if path != final]
        stay = {checkpoint_folder(run_folder, number) for number in keep_steps}
        for old in others[: max(0, len(others) + 1 - keep_last)]:
            if old not in stay:
                _delete(old)
        remove_unfinished(run_folder)

    with _reporting(unfinished, final, needed_bytes):
        for left in run_folder.glob(".checkpoint-*.tmp"):
            shutil.rmtree(left)
        unfinished.mkdir(parents=True)
        write_model(unfinished)
        stem = files.OPTIMIZER_STATE.removesuffix(".safetensors")
        write_stream(unfinished, stem, optimizer_state, shard_bytes=shard_bytes, indexed=False)
        for name, document in documents.items():
            (unfinished / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        num_bytes = sum(path.stat().st_size for path in unfinished.iterdir())
    (at_once if num_bytes < _AT_ONCE_BYTES else beside)(complete)
    return final


def _finish(unfinished: Path, final: Path, step: int) -> Path | None:
    """Flush and hash what was written, and give it its name; return the folder that had it, if it is to be deleted."""
    hashes = {path.name: _hash_and_flush(path) for path in sorted(unfinished.iterdir())}
    manifest = unfinished / files.MANIFEST
    document = CheckpointManifest.made(step, hashes).to_json()
    manifest.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    _hash_and_flush(manifest)
    flush_folder(unfinished)
    replaced = _make_room(final)
    os.replace(unfinished, final)
    flush_folder(final.parent)
    return replaced


@contextlib.contextmanager
def _reporting(unfinished: Path, final: Path, needed_bytes: int) -> Iterator[None]:
    """Remove an unfinished checkpoint after an error; say what to do if it is the disk's."""
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if errno_of(error) is None and not isinstance(error, OSError | SafetensorError):
            raise
        run_folder = final.parent
        raise not_saved(final.name, run_folder, error, _after_failed_save(run_folder), needed_bytes) from error


def remove_unfinished(run_folder: Path) -> None:
    """Remove checkpoints that were half written or half deleted; what can't be removed costs space, not the run.

    Args:
        run_folder: The run's folder; it is locked.
    """
    for left in run_folder.glob(".checkpoint-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def checkpoints(run_folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in run_folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if is_checkpoint(path)]


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a complete checkpoint."""
    return (folder / files.MANIFEST).is_file()


def optimizer_state_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint that hold the optimizer's state.

    Args:
        folder: A checkpoint.

    Raises:
        UserError: Its manifest can't be read.
    """
    listed = CheckpointManifest.read(folder / files.MANIFEST).files
    return sorted(folder / name for name in listed if _OPTIMIZER_STATE.fullmatch(name))


def unlisted_files(folder: Path) -> list[Path]:
    """List the files in a checkpoint's folder that are not in its manifest: the user put them there. Sorted.

    Args:
        folder: A checkpoint; without a manifest, all of its files are the user's.
    """
    manifest = CheckpointManifest.find(folder / files.MANIFEST)
    saved = {*manifest.files, files.MANIFEST} if manifest else set()
    return sorted(path for path in folder.iterdir() if path.name not in saved)


def find_checkpoint(run_folder: Path, asked: Path | None) -> Checkpoint:
    """Find and verify the checkpoint to resume from.

    Args:
        run_folder: The run's folder.
        asked: The checkpoint, or the folder of a run, that the user named; None: the newest of `run_folder`.

    Returns:
        The verified checkpoint.

    Raises:
        CheckpointError: There is none, or it is damaged; the previous one is offered.
    """
    if asked is not None and checkpoints(asked):
        run_folder, asked = asked, None  # a run's folder means its newest checkpoint
    if asked is not None:
        if not is_checkpoint(asked):
            raise CheckpointError(
                f"{asked} is not a complete checkpoint: it holds no {files.MANIFEST}.",
                _try_another(checkpoints(asked.parent) if asked.parent.is_dir() else []),
            )
        return _verify(asked, [path for path in checkpoints(asked.parent) if path != asked])
    found = checkpoints(run_folder)
    if not found:
        raise CheckpointError(
            f"{run_folder} holds no complete checkpoint to resume from.",
            "Start without --resume; to get checkpoints, set checkpoint.save_every_steps.",
        )
    return _verify(found[-1], found[:-1])


def _make_room(final: Path) -> Path | None:
    """Move a folder of the checkpoint's name out of the way; return its new place if it is to be deleted."""
    if not os.path.lexists(final):
        return None
    if is_checkpoint(final) and not final.is_symlink():
        replaced = final.with_name(f".{final.name}.replaced.tmp")
        os.replace(final, replaced)
        return replaced
    # No checkpoint of ours, whatever it is called: keep it.
    os.replace(final, free_name(final))
    return None


def _move_unlisted_files(replaced: Path, final: Path) -> None:
    """Move the user's files from a replaced checkpoint into the new one."""
    with contextlib.suppress(OSError):
        for path in unlisted_files(replaced):
            if not os.path.lexists(final / path.name):
                os.replace(path, final / path.name)


def _delete(checkpoint: Path) -> None:
    """Delete the files of a checkpoint's manifest. A failure costs disk space, not the run."""
    if checkpoint.is_symlink():
        return  # the user moved it elsewhere to keep it
    with contextlib.suppress(OSError, UserError):
        if not unlisted_files(checkpoint):
            # Renamed first, so that a half-deleted folder is not taken for a checkpoint.
            renamed = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
            checkpoint.rename(renamed)
            shutil.rmtree(renamed, ignore_errors=True)
            return
        saved = CheckpointManifest.read(checkpoint / files.MANIFEST).files
        # The manifest first: without it, the folder is no checkpoint.
        for name in (files.MANIFEST, *saved):
            (checkpoint / name).unlink()


def _verify(folder: Path, others: list[Path]) -> Checkpoint:
    try:
        manifest = CheckpointManifest.read(folder / files.MANIFEST)
        if manifest.sha256 not in ("", manifest.digest):
            raise CheckpointError(
                f"{folder} is damaged: {files.MANIFEST} is not what was written.", _try_another(others)
            )
        for name, digest in manifest.files.items():
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} is damaged: {name} is missing.", _try_another(others))
            if sha256_of(folder / name) != digest:
                raise CheckpointError(f"{folder} is damaged: {name} is not what was written.", _try_another(others))
        plan, config = (read_object(folder / name) for name in (files.PLAN, files.FLAT_CONFIG))
        # Manifests of earlier versions have no digest of their own.
        state = read_object(folder / files.TRAINER_STATE) if files.TRAINER_STATE in manifest.files else {}
        if (done := state.get("global_step", manifest.step)) != manifest.step:
            raise CheckpointError(
                f"{folder} is damaged: it is of step {manifest.step}, says {files.MANIFEST}, and of {done}, says "
                f"{files.TRAINER_STATE}.",
                _try_another(others),
            )
        return Checkpoint(folder, manifest.step, plan, config)
    except CheckpointError:
        raise
    except (OSError, UserError) as error:
        raise CheckpointError(f"{folder} is damaged: {short(error)}.", _try_another(others)) from error


def _try_another(others: list[Path]) -> str:
    if not others:
        return "There is no other checkpoint: start without --resume."
    return f"Go on from another one: --resume {max(others, key=lambda path: int(path.name.split('-')[1]))}"


def _hash_and_flush(path: Path) -> str:
    flush(path)
    return sha256_of(path)


def _after_failed_save(run_folder: Path) -> str:
    """Say how to continue after a checkpoint could not be saved."""
    if not checkpoints(run_folder):
        return "There is no earlier checkpoint: start again, with checkpoint.save_every_steps to lose less."
    return "Earlier checkpoints are untouched: go on with --resume; a lower checkpoint.keep_last takes less room."
