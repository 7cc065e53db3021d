"""An earlier run in the run's folder: move it aside, but never the user's own files.

A new run renames the whole folder of the earlier run. So it first checks that every file in that folder was written by
a run.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from sophia_galore.config import RunConfig
from sophia_galore.config.dump import flatten
from sophia_galore.config.paths import PATH_KEYS, named_paths
from sophia_galore.errors import ConfigError, EnvironmentProblem
from sophia_galore.records import files
from sophia_galore.records.durable import make_folder
from sophia_galore.records.schema import find_json, find_object
from sophia_galore.train.checkpoint import Checkpoint, unlisted_files
from sophia_galore.train.folder import free_name, not_writable

_NUM_SHOWN = 3

# A folder that transformers writes among a tokenizer's files.
_TEMPLATES = "additional_chat_templates"
# Names that transformers gives to model files: for runs of versions that kept no list of their files.
_MODEL = re.compile(
    rf"{files.MODEL_WEIGHTS.pattern}|(generation_)?config\.json|README\.md"
    r"|tokenizer(_config)?\.json|tokenizer\.model(\.v\d+)?|special_tokens_map\.json|added_tokens\.json"
    rf"|chat_template\.(jinja|json)|{_TEMPLATES}|vocab\.(json|txt)|merges\.txt|spiece\.model"
    r"|sentencepiece\.bpe\.model|spm\.model|(pre)?processor_config\.json"
)
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_WORK = re.compile(r"checkpoint-\d+|\.checkpoint-\d+(\.replaced)?\.tmp|\.files\.tmp|\..+\.tmp|\.writable")
# Files that operating systems leave everywhere.
_JUNK = {".DS_Store", "Thumbs.db", "desktop.ini", ".gitkeep"}


def holds_run(folder: Path) -> bool:
    """Return whether a folder holds a run, complete or not."""
    if (folder / files.METRICS).is_file():
        return True
    # A run that was killed after its first file; other programs have a plan.json too, so look into it.
    return "routes" in find_object(folder / files.PLAN)


def foreign_files(folder: Path) -> list[str]:
    """List the files in a folder and in its checkpoints that no run wrote; sorted names."""
    listed = _listed(folder)
    found = []
    for path in folder.iterdir():
        if path.name in _JUNK:
            continue
        if not _is_runs(path, listed):
            found.append(path.name)
        elif _CHECKPOINT.fullmatch(path.name) and path.is_dir():
            found += [f"{path.name}/{more.name}" for more in unlisted_files(path) if more.name not in _JUNK]
    return sorted(found)


def refuse_own_folders(config: RunConfig) -> None:
    """Refuse a run's folder that is or contains the working directory or the home folder."""
    run_folder, home = Path(config.run_folder).resolve(), Path(os.path.expanduser("~")).resolve()
    for place, words in ((Path.cwd(), "the folder that this command runs in"), (home, "your home folder")):
        if run_folder in (place, *place.parents):
            raise ConfigError(
                f"training.output_dir={config.run_folder} is {words}, or one above it.",
                "Choose a folder of its own for the run, such as outputs/my_run.",
            )


def refuse_unsafe_folder(config: RunConfig, config_file: Path | None, checkpoint: Checkpoint | None) -> list[Path]:
    """Refuse a run that would move or replace files of the user, before anything is downloaded.

    Args:
        config: The run's configuration.
        config_file: Its file.
        checkpoint: The checkpoint to resume from.

    Returns:
        Paths that must not be moved, for `open_run_folder`.

    Raises:
        ConfigError: The run's folder is or contains the working directory or the home folder.
        EnvironmentProblem: The run would move or replace files that no run wrote.
    """
    refuse_own_folders(config)
    keep = protected_paths(config, config_file, checkpoint.folder if checkpoint else None)
    refuse_foreign(Path(config.run_folder), going_on=checkpoint, keep=keep)
    return keep


def refuse_foreign(folder: Path, *, going_on: Checkpoint | None, keep: Iterable[Path] = ()) -> None:
    """Refuse a folder in which a run would move or replace files that no run wrote.

    Args:
        folder: The run's folder; it need not exist.
        going_on: The checkpoint to resume from; None: a new run.
        keep: Paths that must not be moved: data, model, configuration.

    Raises:
        EnvironmentProblem: There are such files; nothing was changed.
    """
    _refuse_loose_link(folder)
    here = folder.resolve()
    if not here.is_dir():
        return
    if going_on is not None and going_on.folder.parent.resolve() == here:
        _refuse_in_the_way(folder, here)
        return
    if not holds_run(here):
        _refuse_replacing(folder, here)
        return
    for path in keep:
        if path.exists() and here in (path.resolve(), *path.resolve().parents):
            raise EnvironmentProblem(
                f"{folder} holds an earlier run, which would be moved aside, and {path} with it.",
                "Choose another training.output_dir, or go on with that run: --resume.",
            )
    if found := foreign_files(here):
        raise EnvironmentProblem(
            f"{folder} holds an earlier run, which would be moved aside, and with it what no run wrote: {_few(found)}.",
            "Choose another training.output_dir, or move these files elsewhere.",
        )


def open_run_folder(folder: Path, *, going_on: Checkpoint | None, keep: Iterable[Path] = ()) -> Path | None:
    """Make the run's folder; an earlier run in it is moved aside, never overwritten.

    Args:
        folder: The run's folder.
        going_on: The checkpoint to resume from; None: a new run.
        keep: Paths that must not be moved: data, model, configuration.

    Returns:
        The new folder of the earlier run, or None.

    Raises:
        EnvironmentProblem: The folder can't be made or written to, or holds files that no run wrote.
    """
    try:
        # Checked again: hours may have passed since the first check.
        refuse_foreign(folder, going_on=going_on, keep=keep)
        # Move the target of a link, on its own disk; the link stays valid.
        here = folder.resolve()
        moved = None
        begun = going_on.folder.parent.resolve() if going_on is not None else None
        if begun != here and here.is_dir() and holds_run(here):
            moved = free_name(here)
            here.rename(moved)
        make_folder(here)
        probe = here / ".writable"
        probe.touch()
        probe.unlink()
        if begun is not None and begun != here:
            for name in (files.METRICS, files.ANSWERS):
                if (begun / name).exists():
                    shutil.copyfile(begun / name, here / name)
        return moved
    except OSError as error:
        raise not_writable(folder, error) from error


def protected_paths(config: RunConfig, *more: Path | None) -> list[Path]:
    """Return paths that a run must not move: those in its configuration, and the working directory.

    Args:
        config: The run's configuration.
        *more: Further paths, such as the configuration's file.
    """
    values = flatten(config)
    named = [path for key in PATH_KEYS if key != "training.output_dir" for path in named_paths(values[key])]
    return [*named, *(path for path in more if path is not None), Path.cwd()]


def _refuse_replacing(folder: Path, here: Path) -> None:
    """Refuse a folder without a run that holds files under names that a run writes."""
    found = _under_runs_names(here)
    saved = sorted(path.name for path in here.glob("checkpoint-*") if _WORK.fullmatch(path.name))
    if found or saved:
        raise EnvironmentProblem(
            f"{folder} holds no run, but files under names that a run writes to: {_few([*found, *saved])}.",
            "Choose another training.output_dir: they would be replaced.",
        )


def _under_runs_names(here: Path) -> list[str]:
    """Return what is in a folder under names that a run writes to, checkpoints aside; sorted."""
    return sorted(path.name for path in here.iterdir() if path.name in files.RUN_FILES or _MODEL.fullmatch(path.name))


def _refuse_in_the_way(folder: Path, here: Path) -> None:
    """Refuse a run's folder in which there are folders under names of files that it writes as it goes on."""
    folders = {*files.TRACKER_FOLDERS, _TEMPLATES}
    if found := [name for name in _under_runs_names(here) if name not in folders and (here / name).is_dir()]:
        raise EnvironmentProblem(
            f"{folder} holds folders under names of files that the run writes: {_few(found)}.",
            "Move them elsewhere, or rename them.",
        )


def _refuse_loose_link(folder: Path) -> None:
    """Refuse a link whose target is missing, most likely a disk that is not mounted."""
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():
            raise EnvironmentProblem(
                f"{path} is a link to {os.readlink(path)}, which is not there.",
                "Mount that disk, make that folder, or choose another training.output_dir.",
            )


def _is_runs(path: Path, listed: set[str]) -> bool:
    name = path.name
    known = name in files.RUN_FILES or name in listed or _MODEL.fullmatch(name) or _WORK.fullmatch(name)
    # A run makes no links.
    return bool(known) and not path.is_symlink()


def _listed(folder: Path) -> set[str]:
    found = find_json(folder / files.WRITTEN)
    return {name for name in found if isinstance(name, str)} if isinstance(found, list) else set()


def _few(found: list[str]) -> str:
    more = len(found) - _NUM_SHOWN
    return ", ".join(found[:_NUM_SHOWN]) + (f" and {more} more" if more > 0 else "")
