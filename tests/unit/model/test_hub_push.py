"""A model goes to the hub: its files and nothing else, against a hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from fake_hub import MODEL, FakeHub, taking_uploads
from sophia_galore.cli.main import main
from sophia_galore.model.export import convert_model
from sophia_galore.model.source_files import SOURCE_TENSORS
from sophia_galore.records.files import INT8_FILE
from sophia_galore.weights.int8 import Int8Format
from tiny import write_tiny_model

PRIVATE = ["plan.json", "metrics.jsonl", "run_config.yaml", "environment.json", "optimizer.safetensors", "answers.json"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with taking_uploads(monkeypatch) as hub:
        yield hub


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    folder = write_tiny_model(tmp_path / "model")
    for name in PRIVATE:
        (folder / name).write_text("{}")
    save_file({"state": torch.zeros(2)}, folder / "optimizer.safetensors")
    (folder / "plan.json").write_text('{"num_steps": 5}')
    (folder / "trainer_state.json").write_text('{"global_step": 5, "max_steps": 5}')
    (folder / "README.md").write_text("# A card\n")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize("private", [False, True])
def test_the_model_is_uploaded_and_its_records_are_not(
    private: bool, hub: FakeHub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(model), MODEL, *(["--private"] if private else [])]) == 0
    said = capsys.readouterr().out
    assert hub.made is not None and hub.made["name"] == "tiny" and hub.made["organization"] == "someone"
    assert hub.made.get("visibility") == ("private" if private else None)
    expected = ["README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(hub.pushed) == [*expected, "tokenizer.json", "tokenizer_config.json"]
    assert all((model / name).read_bytes() == content for name, content in hub.pushed.items())
    assert all(f"  {name}  " in said for name in hub.pushed), "they are listed first"
    assert f"{hub.url}/{MODEL}" in said


def test_shards_go_with_their_index(hub: FakeHub, model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00001.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["push", str(model), MODEL]) == 0
    assert {"model.safetensors.index.json", "model-00001-of-00001.safetensors"} <= set(hub.pushed)


def test_a_second_push_adds_to_the_repository(hub: FakeHub, model: Path) -> None:
    assert main(["push", str(model), MODEL]) == 0
    (model / "README.md").write_text("# Another card\n")
    assert main(["push", str(model), MODEL]) == 0
    assert hub.pushed["README.md"] == b"# Another card\n"


def test_gguf_files_go_with_their_modelfile(hub: FakeHub, tmp_path: Path) -> None:
    for name in ("x-F16.gguf", "Modelfile", "README.md", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert main(["push", str(tmp_path), MODEL]) == 0
    assert sorted(hub.pushed) == ["Modelfile", "README.md", "x-F16.gguf"]


def unfinished(folder: Path) -> None:
    (folder / "trainer_state.json").write_text('{"global_step": 3, "max_steps": 5}')


def eight_bits(folder: Path) -> None:
    (folder.parent / "int8").mkdir()
    convert_model(folder, folder.parent / "int8", Int8Format())
    (folder / "model.safetensors").unlink()
    (folder.parent / "int8" / INT8_FILE).rename(folder / INT8_FILE)
    (folder / "plan.json").unlink()


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def no_tokenizer(folder: Path) -> None:
    for path in (*folder.glob("tokenizer*"), folder / "chat_template.jinja"):
        path.unlink()


def own_names(folder: Path) -> None:
    (folder / SOURCE_TENSORS).write_text("{}")


REFUSED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "unfinished": (unfinished, "is not finished", "Let it go to its end"),
    "eight bits": (eight_bits, "eight bits", "--to bf16"),
    "own names": (own_names, "names of this project", "--to bf16"),
    "cut short": (cut_short, "bytes instead of", "run"),
    "no tokenizer": (no_tokenizer, "tokenizer", "tokenizer.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_whole_model_stays_here(
    case: str, hub: FakeHub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said, remedy = REFUSED[case]
    change(model)
    assert main(["push", str(model), MODEL]) == 2
    shown = capsys.readouterr().err
    assert said in shown and remedy in shown and "Traceback" not in shown
    assert hub.log == [], "the hub heard nothing"


ANSWERS = {
    401: ("does not know who uploads", "hf auth login"),
    403: ("does not let you write", "Check its owner"),
    500: ("answers HTTP 500", "Try again later"),
}


@pytest.mark.parametrize("status", ANSWERS)
def test_what_the_hub_refuses(
    status: int, hub: FakeHub, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refuse = (status, {})
    assert main(["push", str(model), MODEL]) == 2
    shown = capsys.readouterr().err
    assert all(words in shown for words in ANSWERS[status])


def test_a_public_repository_does_not_become_private(
    hub: FakeHub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(model), MODEL]) == 0
    before = dict(hub.pushed)
    (model / "README.md").write_text("# Secret\n")
    assert main(["push", str(model), MODEL, "--private"]) == 2
    assert "everybody can see it" in capsys.readouterr().err
    assert hub.pushed == before


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "./tiny", ""])
def test_what_is_no_hub_id(name: str, hub: FakeHub, model: Path) -> None:
    assert main(["push", str(model), name]) == 2
    assert hub.log == []


def test_no_hub_there(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["push", str(model), MODEL]) == 2
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err


def test_the_folder_can_be_a_conversion(hub: FakeHub, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    (tmp_path / "out").mkdir()
    convert_model(source, tmp_path / "out", torch.bfloat16)
    assert main(["push", str(tmp_path / "out"), MODEL]) == 0
    assert b'"bfloat16"' in hub.pushed["config.json"]
