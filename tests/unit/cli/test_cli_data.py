"""What a user sees and finds of the data: bad records stopped at or listed, folders with parts, several data sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unit.cli.tiny_run import World, command, json_lines

SHORT = ["checkpoint.save_every_steps=1", "training.lr_scheduler_type=constant"]


def good(number: int) -> dict[str, object]:
    return {"instruction": f"what is {number}", "output": f"{number} it follows"}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Twelve good records, and six bad ones of several kinds."""
    rows: list[object] = [good(number) for number in range(12)]
    rows[3:3] = [{"instruction": "q", "output": ""}] * 4
    rows.insert(1, {"instruction": "q", "output": "a", "weight": 0.5})
    lines = [json.dumps(row) for row in rows]
    lines.append('{"instruction": "cut o')
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_bad_records_stop_a_run_that_then_leaves_nothing(world: World, mixed: Path) -> None:
    ended = world.train("stopped", f"data.train={mixed}")
    assert ended.code == 2
    assert "6 of 18 records can't be used:" in ended.err
    assert [f"{mixed}:{line}:" in ended.err for line in (2, 5, 6, 7, 8, 18)] == [True] * 5 + [False]
    assert "- and 1 more" in ended.err and "`weight` is 0.5" in ended.err
    assert "data.on_bad_record: skip" in ended.err and "Traceback" not in ended.err
    assert not (world.folder / "stopped").exists()


def test_skipped_records_are_listed_and_a_resumed_run_skips_them_too(world: World, mixed: Path) -> None:
    words = [f"data.train={mixed}", "data.on_bad_record=skip", *SHORT]
    ended = world.train("skipped", *words, "training.max_steps=2")
    assert ended.code == 0, ended.err
    assert "6 records can't be used and are left out; bad_records.jsonl in the run's folder lists them." in ended.out
    folder = world.folder / "skipped"
    listed = json_lines(folder / "bad_records.jsonl")
    assert [record["where"] for record in listed] == [f"{mixed}:{line}" for line in (2, 5, 6, 7, 8, 18)]
    assert "`output` is empty" in listed[1]["reason"] and listed[1]["remedy"]
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["num_bad"] == 6 and plan["num_train_examples"] + plan["num_eval_examples"] == 12

    before = (folder / "bad_records.jsonl").read_text()
    resumed = world.train("skipped", *words, "training.max_steps=3", "--resume")
    assert resumed.code == 0, resumed.err
    assert (folder / "bad_records.jsonl").read_text() == before

    clean = mixed.with_name("clean.jsonl")
    clean.write_text("".join(json.dumps(good(number)) + "\n" for number in range(12)))
    checked = command("check", "--json", "--config", str(world.config), f"data.train={clean}")
    assert json.loads(checked.out)["data_fingerprint"] == plan["data_fingerprint"]


def test_a_folder_and_a_list_are_named_file_by_file(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for name, first in (("train", 0), ("validation", 20), ("test", 40)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(good(first + n)) + "\n" for n in range(4)))
    more = tmp_path / "more.csv"
    more.write_text("Instruction;Output\nwhat is so;one\nwhat is two;two\n")
    config = tmp_path / "config.yaml"
    config.write_text(world.config.read_text().replace(", eval_fraction: 0.2", ""))
    words = [f"data.train=[{folder}, {{path: {more}, weight: 2}}]", "training.max_steps=1"]
    ended = World(tmp_path).train("run", *words)
    assert ended.code == 0, ended.err
    for line in (
        f"{folder}/train.jsonl: train, 4 records, alpaca",
        f"{folder}/validation.jsonl: eval, 4 records, alpaca",
        f"{folder}/test.jsonl: left alone",
        f"{more}: train, 2 records, alpaca (semicolons between the columns; "
        "Instruction, Output read as instruction, output)",
        f"{folder}, {more}, train: 8 of 8 records",
        "What is evaluated on is the folder's own validation part; nothing is held out.",
    ):
        assert line in ended.out
    # The configuration that the run wrote down says the same.
    written = tmp_path / "run" / "run_config.yaml"
    fingerprint = json.loads((tmp_path / "run" / "plan.json").read_text())["data_fingerprint"]
    config.write_text(written.read_text())
    again = World(tmp_path).train("again")
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "again" / "plan.json").read_text())["data_fingerprint"] == fingerprint
