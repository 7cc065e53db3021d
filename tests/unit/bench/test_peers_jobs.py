"""What bench/peers.py measures, in which order, and what it makes of a side that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import peers
from peers_sides import BASE, SIDES, Work

WORK = Work("model", "data.json", steps=4, batch_size=3, accumulation=2, max_length=96, eval_examples=8, seed=0)
LAYERWISE = "trainer-galore-layerwise"
REFUSAL = "ValueError: Layerwise galore_adamw_layerwise does not support gradient accumulation!"


class Children:
    """Stands for the processes: remembers the tasks and answers them."""

    def __init__(self, answers: Any) -> None:
        self.tasks: list[dict[str, Any]] = []
        self._answers = answers

    def __call__(self, task: dict[str, Any], work: Work, threads: int | None) -> dict[str, Any]:
        self.tasks.append(task)
        if task["task"] == "saving" and "resume_from" not in task:
            for step in (2, 4):
                (Path(task["output"]) / f"checkpoint-{step}").mkdir(parents=True)
        return dict(self._answers(task))


def bench(monkeypatch: pytest.MonkeyPatch, answers: Any) -> tuple[peers.Bench, Children]:
    children = Children(answers)
    monkeypatch.setattr(peers, "child", children)
    return peers.Bench(WORK, None, {}), children


def test_sides_take_turns_and_begin_with_another_one_each_time() -> None:
    rates = {"a": (1.0, 2.0), "b": (3.0,)}
    found = list(peers.jobs(["a", "b"], 2, rates))
    assert found[0].kind == "start"
    timed = [(job.side, job.rate, job.turn) for job in found if job.kind == "timing"]
    assert timed == [("a", 1.0, 0), ("b", 3.0, 0), ("b", 3.0, 1), ("a", 1.0, 1), ("a", 2.0, None)]
    assert [job.side for job in found if job.kind == "resume"] == ["a", "b"]
    assert len(set(found)) == len(found)
    assert {job.kind for job in peers.jobs(["a"], 1, rates, [])} == {"start", "timing"}


def test_a_side_that_refuses_accumulation_takes_one_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(task: dict[str, Any]) -> dict[str, Any]:
        return {"peak_tracked_bytes": 5} if task.get("one_micro_batch") else {"failed": REFUSAL}

    one, children = bench(monkeypatch, answers)
    job = peers.Job("memory", LAYERWISE, 1e-3)
    assert one.measure(job) == {"peak_tracked_bytes": 5, "instead_of": REFUSAL}
    assert one.measure(job) == {"peak_tracked_bytes": 5, "instead_of": REFUSAL}
    # What is known is not tried again.
    assert [task.get("one_micro_batch", False) for task in children.tasks] == [False, True, True]


def test_other_sides_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    one, children = bench(monkeypatch, lambda task: {"failed": "no"})
    assert one.measure(peers.Job("memory", "trainer-galore", 1e-3)) == {"failed": "no"}
    assert len(children.tasks) == 1


@pytest.mark.parametrize(
    ("resumed", "expected"),
    [
        ({"sha256": "a"}, {"same_bits": True}),
        ({"sha256": "b"}, {"same_bits": False, "reason": "it ends with other weights"}),
        ({"failed": "UnpicklingError: no"}, {"same_bits": False, "reason": "UnpicklingError: no"}),
    ],
)
def test_what_resuming_comes_to(
    resumed: dict[str, Any], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, children = bench(monkeypatch, lambda task: resumed if "resume_from" in task else {"sha256": "a"})
    assert one.measure(peers.Job("resume", "trainer-galore", 1e-3)) == expected
    first, second = children.tasks
    assert second["resume_from"] == str(Path(first["output"]) / "checkpoint-2")
    assert second["output"] != first["output"]


@pytest.mark.parametrize(("turn", "evaluated"), [(0, True), (1, False), (None, True)])
def test_the_loss_is_measured_once_a_rate(turn: int | None, evaluated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one, children = bench(monkeypatch, lambda task: {"eval_loss": 2.0} if task["task"] == "evaluation" else {})
    line = one.measure(peers.Job("timing", "ours-galore", 1e-3, turn))
    assert line == ({"eval_loss": 2.0} if evaluated else {})
    assert [task["task"] for task in children.tasks] == ["timing", *(["evaluation"] if evaluated else [])]


def test_rates_are_given_by_side() -> None:
    rates = peers.parse_rates(["trainer-galore=1e-3,2e-4"])
    assert rates["trainer-galore"] == (1e-3, 2e-4)
    assert rates["ours-adamw"] == SIDES["ours-adamw"].rates
    for wrong, said in (("galore=1", "no side 'galore'"), ("ours-adamw=0", "above 0"), ("ours-adamw=x", "x")):
        with pytest.raises(ValueError, match=said):
            peers.parse_rates([wrong])


def test_lines_are_kept_and_only_what_is_missing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answers(task: dict[str, Any]) -> dict[str, Any]:
        if task["side"] == "trainer-apollo":
            return {"failed": "ImportError: no apollo"}
        kinds: dict[str, dict[str, Any]] = {
            "timing": {"steps": [[10, 1.0], [10, 1.0]], "peak_process_bytes": 1},
            "memory": {"peak_tracked_bytes": 1},
            "saving": {"sha256": "a"},
            "evaluation": {"eval_loss": 2.0},
        }
        return kinds[task["task"]] | {"threads": 1}

    _, children = bench(monkeypatch, answers)
    model, output = tmp_path / "model", tmp_path / "out.jsonl"
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr("sophia_galore.model.source.resolve_model", lambda *_: type("M", (), {"folder": model}))
    words = ["peers.py", "--output", str(output), "--turns", "1", "--steps", "4", "--sides"]
    monkeypatch.setattr(sys, "argv", [*words, "trainer-apollo"])
    peers.main()
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    # A side that could not take its first run is not asked for anything else; the base is always there.
    assert [(line["kind"], line["side"]) for line in lines] == [
        ("start", BASE),
        ("timing", BASE),
        ("timing", "trainer-apollo"),
        ("memory", BASE),
        ("resume", BASE),
    ]
    for line in lines:
        assert {"date", "machine", "versions", "commit", "command", "work"} <= set(line)
    children.tasks.clear()
    monkeypatch.setattr(sys, "argv", [*words, "trainer-apollo", "ours-adamw"])
    peers.main()
    assert {task["side"] for task in children.tasks} == {"ours-adamw"}
    monkeypatch.setattr(sys, "argv", ["peers.py", "--output", str(output), "--table"])
    capsys.readouterr()
    peers.main()
    shown = capsys.readouterr().out
    assert "could not run: ImportError: no apollo" in shown
    assert "| ours, AdamW |" in shown
    monkeypatch.setattr(sys, "argv", [*words[:-2], "5", "--turns", "1"])
    with pytest.raises(SystemExit):
        peers.main()
    assert "other work" in capsys.readouterr().err
