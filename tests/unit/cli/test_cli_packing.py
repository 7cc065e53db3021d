"""Packed and grouped examples through the command line: what is said, what is written, and the same losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unit.cli.tiny_run import World, command, json_lines

SAID: dict[str, tuple[list[str], list[str], list[str]]] = {
    "packed": (["data.packing=true"], ["Packed 18 examples into", "% full", "examples."], ["similar length"]),
    "grouped": (["data.group_by_length=true"], ["Examples of similar length share a micro-batch"], ["Packed"]),
    "grouped one by one": (["data.group_by_length=true", "training.batch_size=1"], ["so nothing is padded"], []),
    "neither": ([], ["18 examples"], ["Packed", "similar length"]),
}


@pytest.mark.parametrize(("words", "said", "unsaid"), SAID.values(), ids=SAID)
def test_the_plan_says_how_full_micro_batches_are(
    words: list[str], said: list[str], unsaid: list[str], world: World
) -> None:
    ended = command("check", "--config", str(world.config), "memory.predict=false", *words)
    assert ended.code == 0, ended.err
    assert all(text in ended.out for text in said), ended.out
    assert not any(text in ended.out for text in unsaid), ended.out


def test_both_at_once_are_refused(world: World) -> None:
    ended = command("check", "--config", str(world.config), "data.packing=true", "data.group_by_length=true")
    assert ended.code == 2
    assert "Leave out data.group_by_length" in ended.err


def test_a_packed_run_has_the_losses_of_one_that_is_not(world: World, tmp_path: Path) -> None:
    """Each step of both holds all examples, so it is the same step."""
    words = ["training.max_steps=3", "training.gradient_accumulation_steps=1", "optimizer.type=adamw"]
    losses: dict[str, list[float]] = {}
    for name, more in {
        "packed": ["data.packing=true", "training.batch_size=18"],
        "padded": ["data.packing=false", "training.batch_size=18"],
    }.items():
        ended = world.train(str(tmp_path / name), *words, *more)
        assert ended.code == 0, ended.err
        losses[name] = [
            line.get("loss", line.get("eval_loss")) for line in json_lines(tmp_path / name / "metrics.jsonl")
        ]
    plan = json.loads((tmp_path / "packed" / "plan.json").read_text())
    assert plan["arrangement"] == "packed" and plan["num_rows"] < 12 and plan["num_train_examples"] == 18
    assert plan["fill_shuffled"] < plan["fill"] <= 1 and plan["steps_per_epoch"] == 1
    assert len(losses["packed"]) == 3 + 4 and losses["packed"] != losses["padded"]
    # Float32 in another order, over three steps of a rate of 0.01: worst seen 1.2e-6 relative.
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-5)
    tokens = [line["tokens"] for line in json_lines(tmp_path / "packed" / "metrics.jsonl") if "tokens" in line]
    assert len(set(tokens)) == 1


def test_a_packed_run_that_runs_out_of_memory_goes_on(world: World, tmp_path: Path) -> None:
    """What `memory.on_oom: adapt` does: the same losses, up to rounding."""
    words = ["data.packing=true", "training.batch_size=4", "training.max_steps=2", "optimizer.type=adamw"]
    words += ["training.probe_step=true", "memory.track_steps=2"]
    whole = world.train(str(tmp_path / "whole"), *words)
    report = json.loads((tmp_path / "whole" / "memory_report.json").read_text())
    limit = int(0.97 * report["peak_allocated_bytes"])
    ended = world.train(str(tmp_path / "less"), *words, f"memory.limit={limit}", "memory.on_oom=adapt")
    assert whole.code == ended.code == 0, ended.err
    assert "from here on" in ended.out
    found, expected = (
        [line.get("loss", line.get("eval_loss")) for line in json_lines(tmp_path / name / "metrics.jsonl")]
        for name in ("less", "whole")
    )
    assert found == pytest.approx(expected, rel=1e-5)
