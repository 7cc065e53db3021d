"""The same configuration gives the same curve, whatever the number of processes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from contract.test_forecast import TOLERANCE
from contract.test_placements import SETTINGS, STORES, words_of
from launched import run_processes
from placed import QUICK, Left, PlacedRuns, assert_same
from sophia_galore.config import load_config
from sophia_galore.distributed import folder as distributed_folder
from sophia_galore.distributed.processes import Processes
from sophia_galore.engine.stepper import Stepper
from sophia_galore.plan.traffic import traffic_of
from sophia_galore.records import files
from sophia_galore.train import agreement
from sophia_galore.train import output as run_output
from sophia_galore.train.callback import Callback
from sophia_galore.train.prepare import prepare
from sophia_galore.train.run import train
from sophia_galore.weights.store import WeightStore

# 18 examples one by one in steps of 5: in each epoch's last step there are 3, so that of 4 processes one has none.
DEALT = (*QUICK, "training.batch_size=1", "training.gradient_accumulation_steps=5")
# The order of sums differs, which changes a gradient by some 1e-7 of itself. A step moves every weight by a rate of
# 0.01, whatever the size of its gradient: 1e-7 grow to the 1e-5 that are promised.
FP32_TOLERANCE = 1e-5
# A weight in bf16 or int8 is rounded up or down by chance, and a gradient that is off by 1e-7 changes that for one
# weight in thousands, by one step of its format. Largest difference of all settings: 2.5e-4.
ROUNDED_TOLERANCE = 1e-3
SOON = {(0, 2), (4, 4), (12, 2), (16, 2), (21, 2)}
SOON_IN_BLOCKS = {(0, 2), (4, 4), (12, 2), (16, 2), (21, 4)}


def cases(soon: Collection[tuple[int, int]], otherwise: pytest.MarkDecorator) -> list[Any]:
    """All settings with 2 and 4 processes; a mark for those that are not run by default."""
    return [
        pytest.param(
            number,
            count,
            id=f"{', '.join(SETTINGS[number])}: {count}",
            marks=[] if (number, count) in soon else [otherwise],
        )
        for number in range(len(SETTINGS))
        for count in (2, 4)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> PlacedRuns:
    return PlacedRuns(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def by_one_process(runs: PlacedRuns) -> Callable[..., Left]:
    @cache
    def left(number: int, *words: str) -> Left:
        output = runs.folder / "-".join(("one", str(number), *words))
        return runs.train(output, SETTINGS[number][2], *DEALT, *words_of(number), *words)

    return left


def by_processes(
    count: int,
    runs: PlacedRuns,
    output: Path,
    family: str,
    *words: str,
    resume: bool = False,
    stops_after: int | None = None,
) -> Left:
    config = runs.config(output, family, *words)

    def one() -> int:
        if stops_after is not None:
            stop_after(stops_after)
        train(config, Callback(), resume=resume)
        return 0

    log = output.with_suffix(".log")
    codes = run_processes(count, one, log)
    assert codes == [0] * count, log.read_text()
    return Left.in_folder(output)


def stop_after(last: int) -> None:
    """Ask this process to stop during a step."""
    take = Stepper.take

    def asking(*given: Any, step: int, factor: float) -> Any:
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(*given, step=step, factor=factor)

    Stepper.take = asking  # type: ignore[method-assign]


@pytest.mark.parametrize(("number", "count"), cases(SOON, pytest.mark.by_hand))
def test_the_curve_does_not_depend_on_the_number_of_processes(
    number: int, count: int, runs: PlacedRuns, by_one_process: Callable[..., Left], tmp_path: Path
) -> None:
    found = by_processes(count, runs, tmp_path / "run", SETTINGS[number][2], *DEALT, *words_of(number))
    expected = by_one_process(number)
    tolerance = FP32_TOLERANCE if SETTINGS[number][0] == "fp32" else ROUNDED_TOLERANCE
    assert len(found.numbers) == len(expected.numbers)
    for own, other in zip(found.numbers, expected.numbers, strict=True):
        assert own.keys() == other.keys()
        assert {key: own[key] for key in ("step", "tokens") if key in own} == {
            key: other[key] for key in ("step", "tokens") if key in other
        }
        for key in {"loss", "eval_loss"} & own.keys():
            assert own[key] == pytest.approx(other[key], rel=tolerance), (own["step"], key)
    assert found.tensors.keys() == expected.tensors.keys()


@pytest.mark.parametrize(("number", "count"), cases(SOON_IN_BLOCKS, pytest.mark.thorough))
def test_with_sum_blocks_no_bit_depends_on_the_number_of_processes(
    number: int, count: int, runs: PlacedRuns, by_one_process: Callable[..., Left], tmp_path: Path
) -> None:
    blocks = "distributed.sum_blocks=4"
    found = by_processes(count, runs, tmp_path / "run", SETTINGS[number][2], *DEALT, *words_of(number), blocks)
    assert_same(found, by_one_process(number, blocks))


@pytest.mark.parametrize("number", [7, *(pytest.param(number, marks=pytest.mark.by_hand) for number in (3, 4, 12, 20))])
def test_two_runs_of_two_processes_are_the_same(number: int, runs: PlacedRuns, tmp_path: Path) -> None:
    first, second = (
        by_processes(2, runs, tmp_path / part / "run", SETTINGS[number][2], *DEALT, *words_of(number))
        for part in ("first", "second")
    )
    assert_same(second, first)


# Of these no state is needed by all, and nothing streams.
SHARDED = (1, 2, 3, 4, 8, 12, 13, 16)


@pytest.mark.parametrize(
    ("number", "count"),
    [
        (1, 2),
        (16, 2),
        *(pytest.param(number, 2, marks=pytest.mark.by_hand) for number in SHARDED if number not in (1, 16)),
        *(pytest.param(number, 4, marks=pytest.mark.by_hand) for number in SHARDED),
    ],
)
def test_no_bit_depends_on_where_states_are(number: int, count: int, runs: PlacedRuns, tmp_path: Path) -> None:
    whole, sharded = (
        by_processes(
            count,
            runs,
            tmp_path / part / "run",
            SETTINGS[number][2],
            *DEALT,
            *words_of(number),
            f"distributed.shard_state={part == 'sharded'}",
        )
        for part in ("whole", "sharded")
    )
    assert_same(sharded, whole)


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.by_hand)])
def test_a_checkpoint_does_not_know_the_number_of_processes(
    sharded: bool, runs: PlacedRuns, by_one_process: Callable[..., Left], tmp_path: Path
) -> None:
    """Two steps by two processes, two by one, and the rest by four."""
    number, output = 1, tmp_path / "run"
    words = [*DEALT, *words_of(number), "checkpoint.save_every_steps=2", f"distributed.shard_state={sharded}"]
    family = SETTINGS[number][2]
    by_processes(2, runs, output, family, *words, stops_after=2)
    by_processes(1, runs, output, family, *words, resume=True, stops_after=4)
    found = by_processes(4, runs, output, family, *words, resume=True)
    for own, other in zip(found.numbers, by_one_process(number).numbers, strict=True):
        for key in {"loss", "eval_loss"} & own.keys():
            assert own[key] == pytest.approx(other[key], rel=FP32_TOLERANCE), own["step"]


@pytest.mark.parametrize("shard_bytes", [None, 4096], ids=["one piece", "pieces of 4 KiB"])
def test_a_checkpoint_is_sent_to_a_machine_that_lacks_it(
    shard_bytes: int | None, runs: PlacedRuns, by_one_process: Callable[..., Left], tmp_path: Path, monkeypatch: Any
) -> None:
    """Each process is in a folder of its own, as on a machine of its own; only the first one's has the run."""
    if shard_bytes:
        monkeypatch.setattr(distributed_folder, "_CHUNK_BYTES", shard_bytes)
    words = runs.words(Path("run"), SETTINGS[1][2], *DEALT, *words_of(1), "checkpoint.save_every_steps=2")

    def each(resume: bool) -> int:
        machine = tmp_path / os.environ["RANK"]
        machine.mkdir(exist_ok=True)
        os.chdir(machine)
        os.environ["LOCAL_RANK"] = "0"
        if not resume:
            stop_after(2)
        train(load_config(None, words), Callback(), resume=resume)
        return 0

    log = tmp_path / "log"
    assert run_processes(2, lambda: each(False), log) == [0, 0], log.read_text()
    assert not (tmp_path / "1" / "run").exists()
    assert run_processes(2, lambda: each(True), log) == [0, 0], log.read_text()
    assert [path.name for path in (tmp_path / "1").iterdir()] == [], "nothing is left on the other machine"
    found = Left.in_folder(tmp_path / "0" / "run")
    for own, other in zip(found.numbers, by_one_process(1).numbers, strict=True):
        for key in {"loss", "eval_loss"} & own.keys():
            assert own[key] == pytest.approx(other[key], rel=FP32_TOLERANCE), own["step"]


# Embedding and head of the second one come by rows.
@pytest.mark.parametrize(("number", "placement"), [(7, "host"), (7, "disk"), (1, "host"), (14, "disk")])
def test_each_process_streams_its_own_copy(number: int, placement: str, runs: PlacedRuns, tmp_path: Path) -> None:
    there, elsewhere = (
        by_processes(
            2,
            runs,
            tmp_path / where / "run",
            SETTINGS[number][2],
            *DEALT,
            *words_of(number),
            f"memory.placement={where}",
        )
        for where in ("device", placement)
    )
    assert_same(elsewhere, there)
    assert not list((tmp_path / placement).glob(".run.streaming*"))


@pytest.mark.parametrize("store", ["int8", "int8, folded late"])
@pytest.mark.parametrize("placement", ["device", "host", "disk"])
def test_copies_that_drifted_apart_are_made_equal(store: str, placement: str, runs: PlacedRuns, tmp_path: Path) -> None:
    """In the second process each tensor of the weights is another one before a checkpoint: the first one's count."""
    words = [*DEALT, *words_of(14), *STORES[store], f"memory.placement={placement}", "training.max_steps=4"]
    words += ["checkpoint.save_every_steps=4", "data.eval_fraction=0", "distributed.shard_state=false"]
    config = runs.config(tmp_path / "run", SETTINGS[14][2], *words)
    equalised = agreement.equalise

    def drifting(processes: Processes, store: WeightStore, states: Any, say: Any) -> None:
        for name, _ in () if processes.is_first else store.items():
            with store.borrow(name, trains=True) as weights:
                for part in weights[name].parts(change=True):
                    for tensor in part.values():
                        tensor.view(-1)[0] = 0
        before = agreement.weights_checksum(store)
        assert len(set(processes.gather(before))) == 2
        equalised(processes, store, states, say)
        assert set(processes.gather(agreement.weights_checksum(store))) == {processes.gather(before)[0]}

    def one() -> int:
        run_output.equalise = drifting  # type: ignore[attr-defined]
        train(config, Callback())
        return 0

    log = tmp_path / "log"
    assert run_processes(2, one, log) == [0, 0], log.read_text()


def test_the_forecast_is_for_one_of_the_processes(runs: PlacedRuns, tmp_path: Path) -> None:
    words = [*words_of(1), "training.batch_size=1", "training.gradient_accumulation_steps=4", "data.packing=true"]
    by_processes(2, runs, tmp_path / "run", "llama, untied", *words)
    report = json.loads((tmp_path / "run" / files.MEMORY_REPORT).read_text())
    assert max(each["peak_allocated_bytes"] for each in report["processes"]) == pytest.approx(
        report["predicted_peak_bytes"], rel=TOLERANCE
    )


def test_what_is_planned_to_be_sent_is_sent(runs: PlacedRuns, tmp_path: Path) -> None:
    # Of 200 steps between two bases, the first of a matrix after step 1 is beyond this run.
    words = [*DEALT, "optimizer.galore.subspace=svd", "optimizer.galore.update_proj_gap=200"]
    by_processes(2, runs, tmp_path / "run", "llama", *words)
    plan = prepare(runs.config(tmp_path / "other", "llama", *words), Callback(), None, 2).plan
    traffic = traffic_of(plan.routes)
    lines = [json.loads(line) for line in (tmp_path / "run" / files.METRICS).read_text().splitlines()]
    sent = [line["summed_bytes"] for line in lines if "loss" in line]
    assert sent == [traffic.whole_bytes, *[traffic.usual_bytes] * (len(sent) - 1)]


def test_the_records_tell_of_each_process(runs: PlacedRuns, tmp_path: Path) -> None:
    by_processes(2, runs, tmp_path / "run", "llama", *DEALT, *words_of(1))
    report = json.loads((tmp_path / "run" / files.MEMORY_REPORT).read_text())
    assert [process["peak_process_bytes"] > 0 for process in report["processes"]] == [True, True]
    environment = json.loads((tmp_path / "run" / files.ENVIRONMENT).read_text())
    assert len(environment["processes"]) == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / files.METRICS).read_text().splitlines()]
    sent = [line["summed_bytes"] for line in lines if "loss" in line]
    assert min(sent) > 0 and max(sent) > min(sent), "whole gradients where a basis is made, projected ones elsewhere"
