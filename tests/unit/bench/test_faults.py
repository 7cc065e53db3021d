"""The campaign against faults: what a disk may hold is neither too kind nor too cruel, and each kind runs."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from documents import ROOT
from faults_disk_model import Change, Recorder, Recording, write_state
from forked import run_forked
from sophia_galore.records.durable import flush, flush_folder

OLD, NEW = b"old" * 700, b"new" * 900


def replace_carelessly(folder: Path) -> None:
    (folder / "beside").write_bytes(NEW)
    os.replace(folder / "beside", folder / "file")


def replace_with_care(folder: Path) -> None:
    (folder / "beside").write_bytes(NEW)
    flush(folder / "beside")
    os.replace(folder / "beside", folder / "file")


def replace_for_certain(folder: Path) -> None:
    replace_with_care(folder)
    flush_folder(folder)


def recorded(act: Callable[[Path], None], tmp_path: Path) -> Recording:
    """What a process did to a folder that held a file already."""
    folder, kept = tmp_path / "folder", tmp_path / "recording"
    folder.mkdir()

    def child() -> int:
        recorder = Recorder(folder)
        (folder / "file").write_bytes(OLD)
        flush(folder / "file")
        flush_folder(folder)
        act(folder)
        recorder.save(kept)
        return 0

    log = tmp_path / "log"
    assert run_forked(child, log) == 0, log.read_text()
    made: Recording = pickle.loads(kept.read_bytes())
    return made


def states(recording: Recording, tmp_path: Path, *, ordered: bool) -> list[bytes | None]:
    """What the file may hold if the power fails after everything."""
    found = []
    for number in range(200):
        target = tmp_path / f"state-{ordered}-{number}"
        write_state(recording, len(recording.events), target, random.Random(number), ordered=ordered)
        path = target / "file"
        found.append(path.read_bytes() if path.exists() else None)
    return found


@pytest.mark.parametrize("ordered", [False, True])
def test_a_file_that_was_not_flushed_may_be_torn(ordered: bool, tmp_path: Path) -> None:
    found = states(recorded(replace_carelessly, tmp_path), tmp_path, ordered=ordered)
    assert {OLD, NEW, b""} < set(found) and None not in found
    assert any(content and 0 in content for content in found if content), "with zeros in it"


@pytest.mark.parametrize("ordered", [False, True])
def test_a_file_that_was_flushed_is_the_old_or_the_new_one(ordered: bool, tmp_path: Path) -> None:
    assert set(states(recorded(replace_with_care, tmp_path), tmp_path, ordered=ordered)) == {OLD, NEW}


@pytest.mark.parametrize("ordered", [False, True])
def test_a_folder_that_was_flushed_has_the_new_one(ordered: bool, tmp_path: Path) -> None:
    assert set(states(recorded(replace_for_certain, tmp_path), tmp_path, ordered=ordered)) == {NEW}


def test_a_rename_is_one_change(tmp_path: Path) -> None:
    recording = recorded(replace_with_care, tmp_path)
    last = [event for event in recording.events if isinstance(event, Change)][-1]
    assert [(name, number is None) for (_, name), number in last.sets] == [("beside", True), ("file", False)]


def campaign(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "faults.py"), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.thorough
def test_each_kind_runs_and_goes_on_where_it_was(tmp_path: Path) -> None:
    output = tmp_path / "faults.jsonl"
    done = campaign("all", "--count", "1", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["kind"] for line in lines[1:]] == [
        "kills",
        "power",
        "mutations",
        "inputs",
        "disk",
        "memory",
        "clock",
    ]
    assert lines[0]["provenance"].keys() >= {"date", "machine", "torch", "commit", "command"}
    assert all(line["counts"] and not line["faults"] for line in lines[1:])
    again = campaign("kills", "clock", "--count", "1", "--output", str(output))
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(output.read_text().splitlines()) == len(lines) + 1, "only where it ran is added"
    table = campaign("--table", str(output), str(output)).stdout
    assert table.count("| 1 |") == 7, "a case that is in two files is counted once"
