"""Limits that follow from what was predicted: what should fit does, what should not is told what would."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sophia_galore.records.memory import MemoryReport
from tiny import write_tiny_data, write_tiny_model
from unit.cli.tiny_run import SETTINGS, Ended, World, json_lines

STEPS = ["training.max_steps=2", "memory.predict=true", "training.batch_size=4", "memory.track_steps=2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Wider than other tiny models, so that the least limit that is taken, 1 MiB, is far below what it needs."""
    made = World(tmp_path_factory.mktemp("world"), quick=False)
    write_tiny_model(made.model, intermediate_size=1024)
    write_tiny_data(made.data, num_records=30)
    made.config.write_text(SETTINGS.format(model=made.model, data=made.data, output=made.folder / "run"))
    return made


def report(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "memory_report.json").read_text())
    return loaded


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in json_lines(folder / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def free(world: World) -> Path:
    """A run without a limit."""
    ended = world.train("free", *STEPS)
    assert ended.code == 0, ended.err
    return world.folder / "free"


@pytest.fixture(scope="module")
def predicted(free: Path) -> int:
    return int(report(free)["predicted_peak_bytes"])


def train(world: World, folder: Path, limit: float, *words: str) -> Ended:
    return world.train(str(folder), *STEPS, f"memory.limit={int(limit)}", *words)


# ---- what is written


def test_the_report_says_what_was_predicted_and_how_a_step_went(free: Path) -> None:
    found = report(free)
    assert found["predicted_ratio"] == pytest.approx(
        found["predicted_peak_bytes"] / found["peak_allocated_bytes"], abs=1e-4
    )
    assert 0.97 < found["predicted_ratio"] < 1.03
    timeline = found["timeline"]
    assert timeline["step"] in (1, 2)
    points = timeline["points"]
    highest = max(sum(point["categories"].values()) for point in points)
    assert highest == max(step["allocated_bytes"] for step in found["steps"])
    assert {point["phase"] for point in points} == {"forward", "head", "backward", "step"}
    assert all(earlier["time_s"] <= later["time_s"] for earlier, later in pairwise(points))
    read = MemoryReport.read(free / "memory_report.json")
    assert read.predicted_peak_bytes == found["predicted_peak_bytes"] and read.timeline is not None


def test_without_prediction_there_is_none_and_the_bits_are_the_same(world: World, free: Path, tmp_path: Path) -> None:
    assert world.train(str(tmp_path), *STEPS, "memory.predict=false").code == 0
    found = report(tmp_path)
    assert found["predicted_peak_bytes"] is None and found["predicted_ratio"] is None
    assert found["timeline"] is not None
    model = (tmp_path / "model.safetensors").read_bytes()
    assert model == (free / "model.safetensors").read_bytes(), "to look ahead changes no number"


def test_without_counting_there_is_no_course(world: World, tmp_path: Path) -> None:
    assert world.train(str(tmp_path), "training.max_steps=1", "memory.predict=true", "memory.track_steps=0").code == 0
    found = report(tmp_path)
    assert found["timeline"] is None and found["predicted_ratio"] is None and found["predicted_peak_bytes"] > 0


# ---- limits


@pytest.mark.parametrize(
    "words",
    [[], ["quantization.enabled=true"], ["optimizer.type=adamw", "engine.keep_layers=2"]],
    ids=["", "int8", "kept"],
)
def test_two_percent_more_than_predicted_is_enough(
    words: list[str], world: World, predicted: int, tmp_path: Path
) -> None:
    if words:
        assert world.train(str(tmp_path / "free"), *STEPS, *words).code == 0
        predicted = report(tmp_path / "free")["predicted_peak_bytes"]
    ended = train(world, tmp_path / "run", 1.02 * predicted, *words)
    assert ended.code == 0, ended.err
    assert report(tmp_path / "run")["peak_allocated_bytes"] <= 1.02 * predicted
    assert "more than there is" not in ended.out, "nothing speaks against it"


def test_a_tenth_less_stops_in_the_probe_step_and_says_what_fits(world: World, predicted: int, tmp_path: Path) -> None:
    ended = train(world, tmp_path / "run", 0.9 * predicted, "memory.placement=device")
    assert ended.code == 1 and "Traceback" not in ended.err
    assert "so that it would stop in the probe step" in ended.out + ended.err, "said before"
    for words in (
        r"Error: The probe step \(",
        r"needs more memory than there is, in (forward|the head|backward)",
        "Largest: ",
    ):
        assert re.search(words, ended.err), ended.err
    told = re.search(r"These settings are expected to fit, with [\d.]+ \w+: (.+)\.", ended.err)
    assert told, ended.err
    assert not (tmp_path / "run").exists(), "nothing was begun"
    # What is advised can be followed to the letter.
    again = train(world, tmp_path / "run", 0.9 * predicted, "memory.placement=device", *told[1].split())
    assert again.code == 0, again.err


def test_left_to_itself_it_lets_layers_stream_and_has_the_same_losses(
    world: World, free: Path, predicted: int, tmp_path: Path
) -> None:
    ended = train(world, tmp_path, 0.9 * predicted, "engine.full_gradients=layer")
    assert ended.code == 0, ended.err
    shown = " ".join(ended.out.split())
    assert "With their optimizer states, " in shown and " live in files (" in shown, "a CPU has no other memory"
    assert "to disk, which wears it" in shown and "more than there is" not in shown
    found = report(tmp_path)
    assert found["peak_allocated_bytes"] <= 0.9 * predicted and found["predicted_peak_bytes"] <= 0.9 * predicted
    assert losses(tmp_path) == losses(free), "to the bit"
    waited, none = (
        [line["waiting_share"] for line in json_lines(folder / "metrics.jsonl") if "tokens_per_second" in line]
        for folder in (tmp_path, free)
    )
    assert len(waited) == len(none) and all(0 <= share <= 1 for share in waited)
    assert set(none) == {None}, "nothing that could be waited for"


def test_where_no_settings_fit_that_is_said(world: World, predicted: int, tmp_path: Path) -> None:
    # All but the last rungs of the ladder are climbed down already, each of which would take a moment.
    least = ["quantization.enabled=true", "optimizer.state_bits=8", "optimizer.galore.projection_bits=4"]
    least += ["training.batch_size=1", "memory.logits_chunk_mib=4"]
    ended = train(world, tmp_path / "run", 2**20, *least)
    assert ended.code == 1 and "No settings fit into memory.limit: with " in ended.err, ended.err
    assert "Raise memory.limit to " in ended.err and "lower training.max_length" in ended.err


def test_a_run_that_may_adapt_finishes_with_the_same_loss(
    world: World, free: Path, predicted: int, tmp_path: Path
) -> None:
    words = ("memory.on_oom=adapt", "engine.full_gradients=layer", "memory.placement=device")
    ended = train(world, tmp_path, 0.95 * predicted, *words)
    assert ended.code == 0, ended.err
    assert "will make micro-batches smaller" in ended.out
    told = r"Memory ran out in .+: from here on micro-batches have [12] rows? instead of 4; the effective batch stays"
    assert re.search(told, ended.out), ended.out
    assert report(tmp_path)["peak_allocated_bytes"] <= 0.95 * predicted
    # Sums over the same examples in another order.
    assert losses(tmp_path) == pytest.approx(losses(free), abs=1e-4)


def test_full_gradients_that_do_not_fit_together_are_formed_apart(
    world: World, free: Path, predicted: int, tmp_path: Path
) -> None:
    ended = train(world, tmp_path, 0.95 * predicted)
    assert ended.code == 0, ended.err
    assert "forms them one matrix after the other" in " ".join(ended.out.split())
    assert json.loads((tmp_path / "plan.json").read_text())["full_gradients"] == "matrix"
    assert report(tmp_path)["peak_allocated_bytes"] <= 0.95 * predicted
    assert losses(tmp_path) == losses(free), "to the bit"


def test_as_many_graphs_as_there_is_room_for_are_kept(world: World, predicted: int, tmp_path: Path) -> None:
    limit = 2.1 * predicted
    ended = train(world, tmp_path, limit, "engine.keep_layers=auto")
    assert ended.code == 0, ended.err
    kept = json.loads((tmp_path / "plan.json").read_text())["keep_layers"]
    found = report(tmp_path)
    assert 1 <= kept < 3
    assert found["peak_allocated_bytes"] <= limit and found["predicted_peak_bytes"] <= limit
