"""A run's chat format from the configuration to the exported model: template, end of turns, date."""

from __future__ import annotations

import json

import pytest

from tiny import CHATML
from unit.cli.tiny_run import World, command, json_lines, make_world

DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Its tokenizer has no chat template, and texts end with another token than ChatML's turns."""
    world = make_world(tmp_path_factory.mktemp("world"))
    (world.model / "chat_template.jinja").unlink(missing_ok=True)
    for name, end in (("tokenizer_config", "<unk>"), ("config", 0), ("generation_config", 0)):
        path = world.model / f"{name}.json"
        settings = {key: value for key, value in json.loads(path.read_text()).items() if key != "chat_template"}
        settings["eos_token" if isinstance(end, str) else "eos_token_id"] = end
        path.write_text(json.dumps(settings))
    (world.folder / "dated.jinja").write_text(DATED)
    return world


def on(day: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sophia_galore.data.chat_format.today", lambda: day)


def test_a_base_model_learns_to_end_its_turns(world: World) -> None:
    ended = world.train("base", "model.chat_template=chatml", "training.max_steps=1")
    assert ended.code == 0, ended.err
    assert "ends turns with <|im_end|>" in ended.out.replace("\n", " ")
    folder = world.folder / "base"
    names = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    ids = {entry["content"]: entry["id"] for entry in names}
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [ids["<|im_end|>"], ids["<unk>"]]
    assert json.loads((folder / "plan.json").read_text())["chat_format"]["end_ids"] == [ids["<|im_end|>"]]
    asked = command("generate", str(folder), "What is the capital?", "--max-new-tokens", "3")
    assert asked.code == 0, asked.err


def test_without_a_template_the_remedy_is_named(world: World) -> None:
    ended = world.train("none")
    assert ended.code == 2 and "model.chat_template" in ended.err


def test_a_run_goes_on_on_another_day(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (f"model.chat_template={world.folder / 'dated.jinja'}", "training.max_steps=3")
    on("2026-02-03", monkeypatch)
    assert world.train("whole", *words).code == 0
    assert world.train("stopped", *words, "checkpoint.save_every_steps=2").code == 0
    (world.folder / "stopped" / "model.safetensors").unlink()
    on("2026-02-04", monkeypatch)
    ended = world.train("stopped", *words, "checkpoint.save_every_steps=2", "--resume")
    assert ended.code == 0, ended.err
    losses = [
        [line.get("loss") for line in json_lines(world.folder / run / "metrics.jsonl")] for run in ("whole", "stopped")
    ]
    assert losses[0] == losses[1]
    assert json.loads((world.folder / "stopped" / "plan.json").read_text())["chat_format"]["date"] == "2026-02-03"


def test_another_day_is_other_data(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (f"model.chat_template={world.folder / 'dated.jinja'}", "training.max_steps=3")
    words += ("checkpoint.save_every_steps=2",)
    on("2026-02-03", monkeypatch)
    assert world.train("dated", *words).code == 0
    (world.folder / "dated" / "model.safetensors").unlink()
    ended = world.train("dated", *words, "data.date=2026-02-05", "--resume")
    assert ended.code == 2 and "data" in ended.err


@pytest.mark.parametrize("date", ["2026-13-01", "today", "03.02.2026"])
def test_what_is_no_date(world: World, date: str) -> None:
    ended = world.train("refused", f"data.date={date}")
    assert ended.code == 2 and "data.date" in ended.err
