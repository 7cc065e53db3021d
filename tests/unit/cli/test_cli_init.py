"""`init`: a configuration to begin with, from nothing but an installed package."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from sophia_galore.config import load_config
from sophia_galore.config.starter import formats_for
from unit.cli.tiny_run import World, command


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# Words, what is asked for then: model, data, store, int8, state_bits, limit in MiB.
WRITTEN = [
    ([], ("smollm2-135m", "data/sample_data.json", "bf16", False, 32, None)),
    (["--memory", "4GiB"], ("smollm2-135m", "data/sample_data.json", "fp32", False, 32, 4096)),
    (["--model", "qwen2-0.5b", "--memory", "2GiB"], ("qwen2-0.5b", "data/sample_data.json", "bf16", False, 32, 2048)),
    (["-m", "Qwen/Qwen2-7B", "--memory", "8GiB"], ("Qwen/Qwen2-7B", "data/sample_data.json", "bf16", True, 8, 8192)),
    (
        ["-m", "me/mine", "-d", "my data/é.jsonl", "--memory", "6GiB"],
        ("me/mine", "my data/é.jsonl", "bf16", True, 8, 6144),
    ),
    (["-m", "./a: b", "-d", "x#y.json", "--memory", "none"], ("./a: b", "x#y.json", "bf16", False, 32, None)),
    (["-m", "$$x", "-d", "$$y"], ("$x", "$y", "bf16", False, 32, None)),
]


@pytest.mark.parametrize(
    ("words", "expected"), WRITTEN, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_what_is_written_can_be_read(words: list[str], expected: tuple[object, ...]) -> None:
    ended = command("init", *words)
    assert ended.code == 0, ended.err
    assert "Train with: sophia-galore train --config config.yaml" in ended.out
    config = load_config(Path("config.yaml"))
    limit = config.memory.limit
    found = (config.model.name, config.data.train, config.model.store, config.quantization.int8)
    assert (*found, config.optimizer.state_bits, limit and limit // 2**20) == expected
    text = Path("config.yaml").read_text(encoding="utf-8")
    assert all(line.strip() for line in text.split("\n\n")) and text.count("#") > 15
    # One word changes it, as everywhere.
    assert load_config(Path("config.yaml"), ["quantization.enabled=true"]).quantization.int8


@pytest.mark.parametrize("memory", ["lots", "4", "0"])
def test_a_memory_that_is_none(memory: str) -> None:
    ended = command("init", "--memory", memory)
    assert ended.code == 2 and "--memory" in ended.err
    assert not Path("config.yaml").exists()


@pytest.mark.parametrize(
    ("memory_gib", "millions", "expected"),
    [(None, 100, "bf16"), (8, None, "int8"), (24, 135, "fp32"), (4, 494, "fp32"), (2, 494, "bf16"), (8, 7000, "int8")],
)
def test_formats_follow_size_and_memory(memory_gib: int | None, millions: int | None, expected: str) -> None:
    found = formats_for(memory_gib and memory_gib * 2**30, millions and millions * 10**6)
    assert ("int8" if found.int8 else found.store) == expected


def test_nothing_is_written_over() -> None:
    Path("config.yaml").write_text("mine")
    ended = command("init")
    assert ended.code == 2 and "config.yaml exists already" in ended.err and "--force" in ended.err
    assert Path("config.yaml").read_text() == "mine"
    assert command("init", "--output", "new/other.yaml").code == 0
    assert command("init", "--force").code == 0
    assert load_config(Path("config.yaml")) == load_config(Path("new/other.yaml"))
    Path("folder").mkdir()
    assert command("init", "--output", "folder", "--force").code == 2


class Typed(io.StringIO):
    """A terminal at which somebody types."""

    def isatty(self) -> bool:
        return True


def test_what_is_not_given_is_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from sophia_galore.cli import init as module

    monkeypatch.setattr(sys, "stdin", Typed("me/mine\n\n"))
    monkeypatch.setattr(sys, "stderr", shown := Typed())
    module.init(memory="3GiB", output=Path("config.yaml"))
    assert shown.getvalue().count("[") == 2 and "[smollm2-135m]" in shown.getvalue()
    config = load_config(Path("config.yaml"))
    assert (config.model.name, config.data.train) == ("me/mine", "data/sample_data.json")


@pytest.mark.parametrize("words", [["train"], ["check"], ["plan"]])
def test_without_a_configuration_it_is_said_how_to_get_one(words: list[str]) -> None:
    ended = command(*words)
    assert ended.code == 2 and "No configuration is named" in ended.err and "sophia-galore init" in ended.err
    assert command("init").code == 0
    assert "Name it: --config config.yaml" in command(*words).err
    # A file that was named is looked for, and nothing else.
    assert "rnu.yaml does not exist" in command(words[0], "--config", "rnu.yaml").err


def test_from_init_to_an_answer(world: World) -> None:
    """What an installed package does in an empty folder; one step is enough to see that it hangs together."""
    assert command("init", "--model", str(world.model), "--data", str(world.data)).code == 0
    quick = ["training.max_steps=1", "training.max_length=64", "optimizer.galore.rank=8", "memory.predict=false"]
    ended = command("train", "--config", "config.yaml", *quick, "memory.track_steps=0")
    assert ended.code == 0, ended.err
    ended = command("generate", "outputs/model-galore", "x", "--max-new-tokens", "2")
    assert ended.code == 0, ended.err
    assert torch.get_num_threads()


def test_paths_on_the_command_line_are_expanded(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path / "place"))
    assert command("init", "--output=~/a.yaml").code == 0
    assert command("init", "--output", "$PLACE/b.yaml").code == 0
    assert (tmp_path / "a.yaml").is_file() and (tmp_path / "place" / "b.yaml").is_file()
    ended = command("train", "--config=~/missing.yaml")
    assert f"{tmp_path}/missing.yaml does not exist" in ended.err
    cases = (
        ["train", "--config=$NOWHERE/x.yaml"],
        ["train", "--config", str(world.config), "--resume=$NOWHERE/x"],
        ["export", "$NOWHERE/x", "--to", "fp32", "--output", "y"],
        ["export", "x", "--to", "fp32", "--output", "$NOWHERE/y"],
        ["generate", "$NOWHERE/x", "What is $5?"],
        ["report", "$NOWHERE/x"],
        ["compare", "$NOWHERE/x.yaml", "--seeds", "2"],
        ["download", "$NOWHERE/x"],
        ["prepare-data", "--output", "$NOWHERE/x"],
    )
    for words in cases:
        ended = command(*words)
        assert ended.code == 2 and "'NOWHERE'" in ended.err and "is not set" in ended.err, words
