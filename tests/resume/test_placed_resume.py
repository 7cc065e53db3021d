"""A checkpoint of layers that live elsewhere is as good as any other, and stays what it was while the run goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from placed import QUICK, Left, PlacedRuns, assert_same
from sophia_galore.records.files import MANIFEST
from sophia_galore.streaming import checked_file
from sophia_galore.train.callback import Callback
from sophia_galore.train.checkpoint import checkpoints
from sophia_galore.train.folder import streaming_folder
from sophia_galore.train.run import train
from sophia_galore.weights.manifest import sha256_of

FAMILY = "llama, untied"
PLACEMENTS: dict[str, list[str]] = {
    "device": ["memory.placement=device"],
    "host": ["memory.placement=host", "memory.resident_layers=1"],
    "disk": ["memory.placement=disk"],
}
KINDS: dict[str, list[str]] = {
    "galore": ["model.store=bf16", "training.clip_by=model", "training.max_grad_norm=0.5"],
    "adamw": ["optimizer.type=adamw", "optimizer.state_bits=16"],
    "int8": ["quantization.enabled=true", "optimizer.state_bits=8"],
    "int8, folded late": ["quantization.enabled=true", "quantization.fold=refresh", "optimizer.galore.subspace=svd"],
}


class Crash(Exception):
    """What ends a run in its midst."""


class Watcher(Callback):
    """Calls a function after each step."""

    def __init__(self, look: Callable[[int], None]) -> None:
        self._look = look

    def stepped(self, record: dict[str, Any], *, num_steps: int, seconds_left: float) -> None:
        self._look(record["step"])


def crash_after(step: int) -> Watcher:
    def look(done: int) -> None:
        if done == step:
            raise Crash

    return Watcher(look)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> PlacedRuns:
    return PlacedRuns(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs: PlacedRuns) -> Callable[[str], Left]:
    """What an uninterrupted run on the device leaves."""

    @cache
    def left(kind: str) -> Left:
        return runs.train(runs.folder / f"whole-{kind}", FAMILY, *QUICK, *KINDS[kind], *PLACEMENTS["device"])

    return left


@pytest.fixture(scope="module")
def begun(runs: PlacedRuns) -> Callable[[str, str], Path]:
    """The folder of a run that ended without a word after step 5; its checkpoint is that of step 3."""

    @cache
    def folder(kind: str, placement: str) -> Path:
        output = runs.folder / f"begun-{kind}-{placement}"
        config = runs.config(output, FAMILY, *QUICK, *KINDS[kind], *PLACEMENTS[placement])
        with pytest.raises(Crash):
            train(config, crash_after(5))
        return output

    return folder


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        pytest.param(kind, before, after, marks=[] if kind == "galore" else [pytest.mark.by_hand])
        for kind in KINDS
        for before in PLACEMENTS
        for after in PLACEMENTS
        if (before, after) != ("device", "device")
    ],
)
def test_a_run_goes_on_wherever_things_lived_before(
    kind: str,
    before: str,
    after: str,
    runs: PlacedRuns,
    whole: Callable[[str], Left],
    begun: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    output = tmp_path / "run"
    shutil.copytree(begun(kind, before), output)
    assert_same(runs.train(output, FAMILY, *QUICK, *KINDS[kind], *PLACEMENTS[after], resume=True), whole(kind))
    assert not streaming_folder(output).exists()


def hashes(folder: Path) -> dict[str, str]:
    """Hashes of a checkpoint's files now."""
    return {name: sha256_of(folder / name) for name in json.loads((folder / MANIFEST).read_text())["files"]}


@pytest.mark.parametrize("kind", ["galore", pytest.param("int8, folded late", marks=pytest.mark.by_hand)])
def test_what_was_saved_never_changes(kind: str, runs: PlacedRuns, tmp_path: Path) -> None:
    output = tmp_path / "run"
    seen: dict[Path, dict[str, str]] = {}
    links: list[int] = []

    def look(step: int) -> None:
        for saved in checkpoints(output):
            # Called before the step's own checkpoint: one of the last step is linked until its layers are written.
            found = seen.setdefault(saved, hashes(saved))
            assert hashes(saved) == found == json.loads((saved / MANIFEST).read_text())["files"]
            links.extend(path.stat().st_nlink for path in saved.iterdir())
        assert len(checkpoints(output)) <= 2

    words = [*QUICK, *KINDS[kind], *PLACEMENTS["disk"], "checkpoint.save_every_steps=2", "checkpoint.keep_last=2"]
    train(runs.config(output, FAMILY, *words), Watcher(look))
    assert [saved.name for saved in checkpoints(output)] == ["checkpoint-4", "checkpoint-6"]
    for saved in checkpoints(output):
        assert hashes(saved) == json.loads((saved / MANIFEST).read_text())["files"]
    assert all(path.stat().st_nlink == 1 for path in checkpoints(output)[0].iterdir()), "the last one is the run's own"
    assert not streaming_folder(output).exists()


@pytest.mark.parametrize("has_links", [True, False])
def test_each_changed_byte_is_written_once(
    has_links: bool, runs: PlacedRuns, whole: Callable[[str], Left], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW changes everything in each step. Behind a checkpoint a file begins anew, with its header."""
    output, folder = tmp_path / "run", streaming_folder(tmp_path / "run")
    written = 0
    by_step: dict[int, int] = {}
    linked: dict[int, bool] = {}
    write_all = checked_file.write_all

    def counted(file: Any, content: memoryview, place: int) -> None:
        nonlocal written
        written += len(content)
        write_all(file, content, place)

    def look(step: int) -> None:
        nonlocal written
        by_step[step], written = written, 0
        linked[step] = any(path.stat().st_nlink > 1 for path in folder.iterdir())
        sizes[step] = sum(path.stat().st_size for path in folder.iterdir())
        headers[step] = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.iterdir())

    sizes: dict[int, int] = {}
    headers: dict[int, int] = {}
    monkeypatch.setattr(checked_file, "write_all", counted)
    if not has_links:

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", refuse)
    words = [*QUICK, *KINDS["adamw"], *PLACEMENTS["disk"], "memory.prefetch=false", "data.eval_fraction=0.2"]
    train(runs.config(output, FAMILY, *words), Watcher(look))
    for step in (2, 3, 5, 6):  # checkpoints are made after steps 3 and 6
        assert by_step[step] == sizes[step] - headers[step], f"step {step}: what changed"
    assert by_step[4] == (sizes[4] if has_links else sizes[4] - headers[4])
    assert not any(linked.values()), "a step writes all that is linked anew"
    assert_same(Left.in_folder(output), whole("adamw"))
    links = {path.stat().st_nlink for path in checkpoints(output)[-1].iterdir()}
    assert links == ({1, 2} if has_links else {1}), "the last checkpoint and the final model are the same files"


@pytest.mark.parametrize(
    ("kind", "placement"),
    [
        ("galore", "disk"),
        pytest.param("galore", "host", marks=pytest.mark.by_hand),
        pytest.param("int8, folded late", "disk", marks=pytest.mark.by_hand),
        pytest.param("adamw", "disk", marks=pytest.mark.by_hand),
    ],
)
def test_the_best_model_comes_back(kind: str, placement: str, runs: PlacedRuns, tmp_path: Path) -> None:
    words = [*QUICK, *KINDS[kind], "training.load_best_model=true", "training.eval_every_steps=1"]
    rate = 8 if kind.startswith("int8") else 0.5  # so high that the last model is not the best
    words += [f"training.learning_rate={rate}", "training.lr_scheduler_type=constant"]
    left = [runs.train(tmp_path / where / "run", FAMILY, *words, *PLACEMENTS[where]) for where in ("device", placement)]
    lines = [json.loads(line) for line in (tmp_path / placement / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["exported_step"] < 6, "else nothing came back"
    assert_same(left[1], left[0])


@pytest.mark.signals
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.by_hand)])
def test_a_run_that_is_stopped_saves_and_removes_its_files(
    number: signal.Signals, runs: PlacedRuns, whole: Callable[[str], Left], tmp_path: Path
) -> None:
    output = tmp_path / "run"

    def stop(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), number)

    words = [*QUICK, *KINDS["galore"], *PLACEMENTS["disk"]]
    assert not train(runs.config(output, FAMILY, *words), Watcher(stop)).finished
    assert checkpoints(output)[-1].name in ("checkpoint-4", "checkpoint-5")
    assert not streaming_folder(output).exists()
    left = runs.train(output, FAMILY, *words, resume=True)
    assert left.numbers == whole("galore").numbers
    last = [name for name in whole("galore").tensors if name.startswith(("run/", "checkpoint-6/"))]
    assert {name: left.tensors[name] for name in last} == {name: whole("galore").tensors[name] for name in last}
