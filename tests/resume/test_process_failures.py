"""What one process of several finds, all act on; none hangs, and nothing is lost."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from contract.test_placements import SETTINGS, words_of
from contract.test_processes import DEALT, stop_after
from documents import ROOT
from forked import Forked
from launched import run_processes, started, wait
from placed import Left, PlacedRuns, assert_same
from resume.crash_run import MOMENTS, kill_at
from sophia_galore.cli.main import main
from sophia_galore.distributed import launch
from sophia_galore.errors import EnvironmentProblem, RunError
from sophia_galore.train.checkpoint import checkpoints
from sophia_galore.train.folder import locked
from tiny import write_tiny_data

# The survivor of a killed process is to end within this time.
SURVIVAL_S = 30
FAMILY = "llama, untied"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> PlacedRuns:
    return PlacedRuns(tmp_path_factory.mktemp("runs"))


def command_words(runs: PlacedRuns, output: Path, family: str, *words: str) -> list[str]:
    config = runs.folder / "empty.yaml"
    config.write_text("{}\n")
    return ["--config", str(config), *runs.words(output, family, *DEALT, *words)]


def command(runs: PlacedRuns, output: Path, family: str, *words: str, resume: bool = False) -> Callable[[], int]:
    arguments = command_words(runs, output, family, *words)
    return lambda: main(["train", *(["--resume"] if resume else []), *arguments])


def rank() -> int:
    return int(os.environ["RANK"])


@pytest.fixture(scope="module")
def undisturbed(runs: PlacedRuns) -> Callable[[int], Left]:
    found: dict[int, Left] = {}

    def left(number: int) -> Left:
        if number not in found:
            output = runs.folder / f"undisturbed-{number}"
            log = output.with_suffix(".log")
            run = command(runs, output, SETTINGS[number][2], *words_of(number))
            assert run_processes(2, run, log) == [0, 0], log.read_text()
            found[number] = Left.in_folder(output)
        return found[number]

    return left


def kills(count: int) -> list[tuple[int, int, str, int]]:
    """Random settings, ranks and moments."""
    draw = random.Random(15)
    moments = {"after a step": 6, "at a weight": 150, "at a refresh": 40, "while saving": 12, "before the rename": 2}
    chosen = []
    for _ in range(count):
        moment = draw.choice(list(moments))
        by_first = moment in ("while saving", "before the rename") or draw.random() < 0.5
        chosen.append((draw.choice((1, 3, 16)), 0 if by_first else 1, moment, draw.randint(1, moments[moment])))
    return chosen


@pytest.mark.parametrize(
    ("number", "victim", "moment", "count"),
    [pytest.param(*each, marks=[] if place < 2 else [pytest.mark.by_hand]) for place, each in enumerate(kills(20))],
)
def test_a_killed_process(
    number: int,
    victim: int,
    moment: str,
    count: int,
    runs: PlacedRuns,
    undisturbed: Callable[[int], Left],
    tmp_path: Path,
) -> None:
    """The other one ends soon and says why; started again, as by the launcher, both go on to the same bits."""
    assert moment in MOMENTS
    run = command(runs, tmp_path / "run", SETTINGS[number][2], *words_of(number))
    log = tmp_path / "log"

    def deadly() -> int:
        if rank() == victim:
            kill_at(moment, count)
        return run()

    with started(2, deadly, log) as children:
        code = wait(children[victim])
        since = time.monotonic()
        other = wait(children[1 - victim])
        assert time.monotonic() - since < SURVIVAL_S
    if code != 0:  # else it was done before its moment came
        assert code == -signal.SIGKILL and other == 1, log.read_text()
        assert "Another process of the run is gone" in log.read_text()
        assert "Traceback" not in log.read_text()
        with started(2, run, log, restarts=1) as children:
            assert [wait(child) for child in children] == [0, 0], log.read_text()
    assert_same(Left.in_folder(tmp_path / "run"), undisturbed(number))


def lacking_memory() -> None:
    """A call of attention in the middle of a step finds no memory."""
    attention, calls = torch.nn.functional.scaled_dot_product_attention, [0]

    def failing(*given: Any, **more: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 30:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return attention(*given, **more)

    torch.nn.functional.scaled_dot_product_attention = failing


def test_memory_that_runs_out_in_one_process(runs: PlacedRuns, tmp_path: Path) -> None:
    run, log = command(runs, tmp_path / "run", FAMILY), tmp_path / "log"

    def lacking() -> int:
        if rank() == 1:
            lacking_memory()
        return run()

    assert run_processes(2, lacking, log) == [1, 1]
    said = log.read_text()
    assert said.count("Error:") == 1 and "memory" in said and "Traceback" not in said


def test_memory_that_runs_out_in_one_process_that_adapts(runs: PlacedRuns, tmp_path: Path) -> None:
    run, log = command(runs, tmp_path / "run", FAMILY, "memory.on_oom=adapt", "training.batch_size=2"), tmp_path / "log"

    def lacking() -> int:
        if rank() == 1:
            lacking_memory()
        return run()

    assert run_processes(2, lacking, log) == [0, 0], log.read_text()


@pytest.mark.parametrize("store", ["fp32", "bf16"])
def test_a_loss_that_is_not_finite(runs: PlacedRuns, tmp_path: Path, store: str) -> None:
    words = ["training.learning_rate=1e9", "optimizer.type=adamw", f"model.store={store}"]
    log = tmp_path / "log"
    assert run_processes(2, command(runs, tmp_path / "run", FAMILY, *words), log) == [1, 1]
    said = log.read_text()
    assert said.count("Error:") == 1 and "Lower training.learning_rate" in said and "Traceback" not in said


@pytest.mark.parametrize("asked", [0, 1])
def test_one_process_is_asked_to_stop(asked: int, runs: PlacedRuns, undisturbed: Any, tmp_path: Path) -> None:
    run, log = command(runs, tmp_path / "run", SETTINGS[1][2], *words_of(1)), tmp_path / "log"

    def stopping() -> int:
        if rank() == asked:
            stop_after(2)
        return run()

    assert run_processes(2, stopping, log) == [0, 0], log.read_text()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    resumed = command(runs, tmp_path / "run", SETTINGS[1][2], *words_of(1), resume=True)
    assert run_processes(2, resumed, log) == [0, 0], log.read_text()
    left, expected = Left.in_folder(tmp_path / "run"), undisturbed(1)
    assert left.numbers == expected.numbers


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.train=missing.json"], "missing.json"),
        (["training.learning_rate=-1"], "learning_rate"),
        (["optimizer.galore.rank=0"], "rank"),
    ],
)
def test_what_the_user_gave_is_refused_once(words: list[str], said: str, runs: PlacedRuns, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run_processes(2, command(runs, tmp_path / "run", FAMILY, *words), log) == [2, 2]
    assert said in log.read_text() and "Traceback" not in log.read_text()
    assert not (tmp_path / "run").exists()


def test_other_data_in_one_process(runs: PlacedRuns, tmp_path: Path) -> None:
    run = command(runs, tmp_path / "run", FAMILY, "data.train=data.json")

    def each() -> int:
        machine = tmp_path / str(rank())
        machine.mkdir()
        write_tiny_data(machine / "data.json", seed=rank())
        os.chdir(machine)
        return run()

    log = tmp_path / "log"
    assert run_processes(2, each, log) == [2, 2], log.read_text()
    assert "Process 1 has other training data than process 0." in log.read_text()


def test_fewer_micro_batches_than_processes(runs: PlacedRuns, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run = command(runs, tmp_path / "run", FAMILY, "training.gradient_accumulation_steps=1")
    assert run_processes(2, run, log) == [2, 2]
    assert log.read_text().count("only 1 micro-batches in a step to deal out") == 1


def test_a_run_that_is_alone_is_not_a_traceback(runs: PlacedRuns, tmp_path: Path) -> None:
    """The other process never comes."""
    log, run = tmp_path / "log", command(runs, tmp_path / "run", FAMILY, "distributed.timeout_minutes=0.02")

    def one() -> int:
        return run() if rank() == 0 else 0

    with started(2, one, log) as children:
        child: Forked = children[0]
        assert wait(child) == 2
    assert "can't reach each other" in log.read_text() and "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("[1] Connection reset by peer", RunError),
        ("Connection closed by peer [127.0.0.1]:4711", RunError),
        ("Broken pipe", RunError),
        ("timed out after 600 seconds", EnvironmentProblem),
        ("Connection refused", EnvironmentProblem),
    ],
)
def test_who_was_there_and_is_gone_was_killed(
    said: str, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError(said)

    monkeypatch.setattr(launch, "rendezvous", fails)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(expected), launch.joined(uses_gpus=False, timeout_minutes=1):
        pass


def test_what_a_killed_process_left_on_disk_is_removed(runs: PlacedRuns, tmp_path: Path) -> None:
    """Also that of a process that the run no longer has, and if the run turns out to be finished."""
    words = ["memory.placement=disk", "training.max_steps=2", "checkpoint.save_every_steps=1"]
    log = tmp_path / "log"

    def leave() -> None:
        for number in (1, 2, 7):
            (tmp_path / f".run.streaming-{number}").mkdir()
            (tmp_path / f".run.streaming-{number}" / "weights-00000.safetensors").touch()
        (tmp_path / ".run.streaming-7" / "notes.txt").touch()  # the user's

    for resume in (False, True):
        leave()
        assert run_processes(2, command(runs, tmp_path / "run", FAMILY, *words, resume=resume), log) == [0, 0]
        assert [path.name for path in tmp_path.glob(".run.streaming*")] == [".run.streaming-7"]
        shutil.rmtree(tmp_path / ".run.streaming-7")
    assert "is finished" in log.read_text()
    leave()
    with locked(tmp_path / "run"):  # as by a run that has written its model, and still uses its files
        assert run_processes(2, command(runs, tmp_path / "run", FAMILY, *words, resume=True), log) == [0, 0]
    assert len(list(tmp_path.glob(".run.streaming*"))) == 3


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launched(words: list[str]) -> str:
    """What a launcher and its processes print; it must end well."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests"))),
        "PYTHON": sys.executable,
    }
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.thorough
def test_the_launcher_starts_them_again(runs: PlacedRuns, undisturbed: Callable[[int], Left], tmp_path: Path) -> None:
    words = command_words(runs, tmp_path / "run", SETTINGS[1][2], *words_of(1))
    script = str(Path(__file__).with_name("dies_once.py"))
    # The fifth record is that of step 4, which no process takes before the checkpoint after step 3 is whole.
    said = launched([*TORCHRUN, "--max-restarts", "1", script, "after a step", "5", "train", *words])
    assert "Going on after step 3" in said
    assert_same(Left.in_folder(tmp_path / "run"), undisturbed(1))


@pytest.mark.thorough
def test_the_example(runs: PlacedRuns, undisturbed: Callable[[int], Left], tmp_path: Path) -> None:
    words = command_words(runs, tmp_path / "run", SETTINGS[1][2], *words_of(1))
    launched(["sh", str(ROOT / "examples" / "torchrun_two_processes.sh"), *words])
    assert_same(Left.in_folder(tmp_path / "run"), undisturbed(1))
