"""The run's folder: an earlier run is moved aside, never written over; what can't be written to is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sophia_galore.errors import EnvironmentProblem
from sophia_galore.records import files as names
from sophia_galore.train.checkpoint import Checkpoint
from sophia_galore.train.earlier_run import open_run_folder
from sophia_galore.train.folder import locked


def earlier_run(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / names.METRICS).write_text(text)
    (folder / "checkpoint-3").mkdir()


def checkpoint_in(run: Path) -> Checkpoint:
    return Checkpoint(run / "checkpoint-3", 3, {}, {})


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    assert open_run_folder(tmp_path / "a" / "b", going_on=None) is None
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_earlier_runs_are_moved_aside_one_after_the_other(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for number, text in enumerate(("first", "second", "third"), 1):
        earlier_run(folder, text) if number == 1 else (folder / names.METRICS).write_text(text)
        moved = open_run_folder(folder, going_on=None)
        assert moved == tmp_path / f"run.previous-{number}"
        assert (moved / names.METRICS).read_text() == text
        assert list(folder.iterdir()) == []
    assert (tmp_path / "run.previous-1" / "checkpoint-3").is_dir()


def test_resuming_leaves_everything_where_it_is(tmp_path: Path) -> None:
    earlier_run(tmp_path / "run", "text")
    assert open_run_folder(tmp_path / "run", going_on=checkpoint_in(tmp_path / "run")) is None
    assert (tmp_path / "run" / names.METRICS).read_text() == "text"
    assert not (tmp_path / "run.previous-1").exists()


@pytest.mark.parametrize("name", [names.TRAINER_STATE, names.METRICS, names.PLAN, names.MODEL, "tokenizer.json"])
def test_a_folder_under_the_name_of_a_file_is_a_clear_error(name: str, tmp_path: Path) -> None:
    earlier_run(tmp_path / "run", "text")
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).mkdir()
    with pytest.raises(EnvironmentProblem, match=name):
        open_run_folder(tmp_path / "run", going_on=checkpoint_in(tmp_path / "run"))
    assert (tmp_path / "run" / name).is_dir()


def test_folders_that_runs_make_are_not_in_the_way(tmp_path: Path) -> None:
    earlier_run(tmp_path / "run", "text")
    for name in (*names.TRACKER_FOLDERS, "additional_chat_templates"):
        (tmp_path / "run" / name).mkdir()
    assert open_run_folder(tmp_path / "run", going_on=checkpoint_in(tmp_path / "run")) is None


def test_going_on_in_another_folder_takes_the_records_along(tmp_path: Path) -> None:
    earlier_run(tmp_path / "from", "its records")
    earlier_run(tmp_path / "run", "another run")
    assert open_run_folder(tmp_path / "run", going_on=checkpoint_in(tmp_path / "from")) == tmp_path / "run.previous-1"
    assert (tmp_path / "run" / names.METRICS).read_text() == "its records"
    assert (tmp_path / "from" / names.METRICS).read_text() == "its records"
    assert (tmp_path / "run.previous-1" / names.METRICS).read_text() == "another run"


def test_two_processes_cant_train_in_one_folder(tmp_path: Path) -> None:
    code = """
import pathlib, sys
from sophia_galore.train.checkpoint import Checkpoint
from sophia_galore.train.folder import locked
with locked(pathlib.Path(sys.argv[1])):
    pass
"""
    other = [sys.executable, "-c", code, str(tmp_path / "run")]
    with locked(tmp_path / "run"):
        refused = subprocess.run(other, capture_output=True, text=True, check=False)
        assert refused.returncode and "Another process is training in" in refused.stderr
    assert subprocess.run(other, check=False).returncode == 0


def test_a_folder_without_a_run_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert open_run_folder(tmp_path / "run", going_on=None) is None
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(EnvironmentProblem, match=r"output folder .*run can't be written to: .+") as caught:
        open_run_folder(tmp_path / "run", going_on=None)
    assert "training.output_dir" in caught.value.remedy
    assert (tmp_path / "run").read_text() == "a file"


@pytest.mark.parametrize("method", ["mkdir", "touch", "rename"])
def test_a_folder_that_cant_be_written_to_is_a_clear_error(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier_run(tmp_path / "run", "text")

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, os.strerror(13), str(self))

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(EnvironmentProblem, match="Permission denied"):
        open_run_folder(tmp_path / "run", going_on=None)
