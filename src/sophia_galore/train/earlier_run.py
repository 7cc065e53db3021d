"""What of a folder may be moved aside: a run, and nothing that a run did not write.

A new run moves the run that lies in its folder out of the way, the whole folder at once. So everything in it has to
be a run's: what else lies there is somebody's, and nobody asked to have it moved.
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
from sophia_galore.records.schema import find_json, find_object
from sophia_galore.train.checkpoint import Checkpoint, unlisted_files
from sophia_galore.train.folder import not_writable

_NUM_SHOWN = 3

# Files of models as transformers names them: for runs of versions that kept no list of their own.
_MODEL = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|(generation_)?config\.json|README\.md"
    r"|tokenizer(_config)?\.json|tokenizer\.model(\.v\d+)?|special_tokens_map\.json|added_tokens\.json"
    r"|chat_template\.(jinja|json)|additional_chat_templates|vocab\.(json|txt)|merges\.txt|spiece\.model"
    r"|sentencepiece\.bpe\.model|spm\.model|(pre)?processor_config\.json"
)
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_WORK = re.compile(r"checkpoint-\d+|\.checkpoint-\d+(\.replaced)?\.tmp|\.files\.tmp|\..+\.tmp|\.writable")
# What systems leave everywhere, and nobody misses.
_JUNK = {".DS_Store", "Thumbs.db", "desktop.ini", ".gitkeep"}


def holds_run(folder: Path) -> bool:
    """Whether a run was begun in a folder."""
    if (folder / files.METRICS).is_file():
        return True
    # Killed between its first two files; but others call their files plan.json too.
    return "routes" in find_object(folder / files.PLAN)


def foreign_files(folder: Path) -> list[str]:
    """What lies in a folder, or in a checkpoint in it, and was not written by a run: names, sorted."""
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
    """Refuse to train where moving an earlier run aside would move the folder that we work in away, or all of ours."""
    run_folder, home = Path(config.run_folder).resolve(), Path(os.path.expanduser("~")).resolve()
    for place, words in ((Path.cwd(), "the folder that this command runs in"), (home, "your home folder")):
        if run_folder in (place, *place.parents):
            raise ConfigError(
                f"training.output_dir={config.run_folder} is {words}, or one above it.",
                "Choose a folder of its own for the run, such as outputs/my_run.",
            )


def refuse_unsafe_folder(config: RunConfig, config_file: Path | None, checkpoint: Checkpoint | None) -> list[Path]:
    """Refuse a run that would move or replace what is not a run's, as far as that is known before its model is.

    Args:
        config: What was asked.
        config_file: Where that was read from.
        checkpoint: Where the run goes on from, if it does.

    Returns:
        What must stay where it is, for `open_run_folder`.

    Raises:
        ConfigError: The run's folder is one in which no run belongs.
        EnvironmentProblem: The run would move or replace what is not a run's.
    """
    refuse_own_folders(config)
    keep = protected_paths(config, config_file, checkpoint.folder if checkpoint else None)
    refuse_foreign(Path(config.run_folder), going_on=checkpoint, keep=keep)
    return keep


def refuse_foreign(folder: Path, *, going_on: Checkpoint | None, keep: Iterable[Path] = ()) -> None:
    """Refuse a folder in which a run would move or replace what no run wrote.

    Args:
        folder: The run's folder; it need not exist.
        going_on: Where the run goes on from; None: a new run.
        keep: What must stay where it is: data, model, configuration.

    Raises:
        EnvironmentProblem: It would; nothing was changed.
    """
    _refuse_loose_link(folder)
    here = folder.resolve()
    if not here.is_dir() or (going_on is not None and going_on.folder.parent.resolve() == here):
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
    """Make the run's folder; another run in it is moved aside, never written over.

    Args:
        folder: The run's folder.
        going_on: Where the run goes on from; None: a new run.
        keep: What must stay where it is: data, model, configuration.

    Returns:
        Where the earlier run was moved to, or None.

    Raises:
        EnvironmentProblem: The folder can't be made or written to, or holds what is not a run's.
    """
    try:
        # Again, right before it counts: hours may have gone by since the first look.
        refuse_foreign(folder, going_on=going_on, keep=keep)
        # Behind a link the folder is moved that it leads to, on its own disk, and the link stays good.
        here = folder.resolve()
        moved = None
        begun = going_on.folder.parent.resolve() if going_on is not None else None
        if begun != here and here.is_dir() and holds_run(here):
            moved = _free_name(here)
            here.rename(moved)
        here.mkdir(parents=True, exist_ok=True)
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
    """What a run must not move: the paths that its configuration names, and the folder that the command runs in.

    Args:
        config: What was asked.
        *more: Further paths, such as the configuration's file.
    """
    values = flatten(config)
    named = [path for key in PATH_KEYS if key != "training.output_dir" for path in named_paths(values[key])]
    return [*named, *(path for path in more if path is not None), Path.cwd()]


def _refuse_replacing(folder: Path, here: Path) -> None:
    """A folder without a run is written into; what lies there under a name that a run writes would be lost."""
    found = sorted(path.name for path in here.iterdir() if path.name in files.RUN_FILES or _MODEL.fullmatch(path.name))
    saved = sorted(path.name for path in here.glob("checkpoint-*") if _WORK.fullmatch(path.name))
    if found or saved:
        raise EnvironmentProblem(
            f"{folder} holds no run, but files under names that a run writes to: {_few([*found, *saved])}.",
            "Choose another training.output_dir: they would be replaced.",
        )


def _refuse_loose_link(folder: Path) -> None:
    """A link whose target is not there: most likely a disk that is not mounted."""
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():
            raise EnvironmentProblem(
                f"{path} is a link to {os.readlink(path)}, which is not there.",
                "Mount that disk, make that folder, or choose another training.output_dir.",
            )


def _is_runs(path: Path, listed: set[str]) -> bool:
    name = path.name
    known = name in files.RUN_FILES or name in listed or _MODEL.fullmatch(name) or _WORK.fullmatch(name)
    # A link leads to what is not in the folder; a run makes none.
    return bool(known) and not path.is_symlink()


def _listed(folder: Path) -> set[str]:
    found = find_json(folder / files.WRITTEN)
    return {name for name in found if isinstance(name, str)} if isinstance(found, list) else set()


def _free_name(folder: Path) -> Path:
    number = 1
    while os.path.lexists(aside := folder.with_name(f"{folder.name}.previous-{number}")):
        number += 1
    return aside


def _few(found: list[str]) -> str:
    more = len(found) - _NUM_SHOWN
    return ", ".join(found[:_NUM_SHOWN]) + (f" and {more} more" if more > 0 else "")
