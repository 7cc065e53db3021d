"""Everything that can be wrong: an exit code, the cause, what to do, and no traceback."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sophia_galore.cli import main as main_module
from sophia_galore.train import run
from sophia_galore.train.checkpoint import checkpoints
from tiny import write_tiny_model
from unit.cli.tiny_run import Ended, World, command


def assert_explained(ended: Ended, code: int, *words: str) -> None:
    """One message: what is wrong and, on a line of its own, what to do."""
    assert ended.code == code, ended.out + ended.err
    assert ended.err.startswith("Error: ")
    assert len(ended.err.strip().splitlines()) >= 2, "cause and remedy"
    assert "Traceback" not in ended.err + ended.out
    for word in words:
        assert word in ended.err, ended.err
    assert _get_current_dispatch_mode() is None, "nothing keeps watching"


@pytest.mark.parametrize(
    "words", [["training.max_steps=none"], ["--optimiser", "galore"], ["--config", "no/such.yaml"]]
)
def test_of_several_processes_on_a_machine_the_first_one_explains(
    words: list[str], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for local_rank, says in (("0", True), ("1", False)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        ended = command("train", "--config", str(world.config), *words)
        assert ended.code == 2 and bool(ended.err) == says
        assert not ended.out


COMMAND_LINES: dict[str, tuple[list[str], list[str]]] = {
    "unknown command": (["trane"], ["trane", "--help"]),
    "unknown option": (["train", "--optimiser", "galore"], ["--optimiser"]),
    "option of no command": (["--bogus"], ["--bogus"]),
    "option without its value": (["train", "--config"], ["--config"]),
    "missing config": (["train", "--config", "no/such.yaml"], ["no/such.yaml"]),
    "config is a folder": (["train", "--config", "/"], ["/"]),
    "check with a missing config": (["check", "-c", "no/such.yaml"], ["no/such.yaml"]),
    "unknown optimizer": (["train", "--optimizer", "adam"], ["optimizer.type", "galore, adamw"]),
    "unknown model to generate with": (["generate", "no-such-model", "hello"], ["no-such-model"]),
    "generate without a prompt": (["generate", "smollm2-135m"], ["'prompt'"]),
    "unknown source": (["download", "--source", "ftp"], ["ftp"]),
}


@pytest.mark.parametrize(("words", "expected"), COMMAND_LINES.values(), ids=COMMAND_LINES)
def test_a_wrong_command_line(
    words: list[str], expected: list[str], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if words[0] == "train" and "--config" not in words:
        words = [*words, "--config", str(world.config)]
    assert_explained(command(*words), 2, *expected)
    assert list(tmp_path.iterdir()) == []


OVERRIDES: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["training.batchsize=2"], ["unknown key", "training.batch_size"]),
    "wrong type": (["training.batch_size=two"], ["training.batch_size", "two"]),
    "out of range": (["training.learning_rate=-1"], ["training.learning_rate"]),
    "not a key=value": (["training.batch_size"], ["key=value"]),
    "unreadable value": (["training.seed=[1"], ["training.seed=[1"]),
    "no value": (["training.seed="], ["no value"]),
    "false checkpointing": (["training.gradient_checkpointing=false", "engine.keep_layers=2"], ["keep_layers"]),
    "int8 on and off": (
        ["quantization.enabled=true", "quantization.load_in_8bit=false"],
        ["quantization.load_in_8bit", "the only kind"],
    ),
    "a pattern that matches nothing": (
        ["quantization.enabled=true", "quantization.skip=[lm_haed*]"],
        ["lm_haed*", "matches no weight"],
    ),
    "warm-up fills max_steps": (["training.max_steps=4", "training.warmup_steps=4"], ["training.warmup_steps"]),
    "warm-up fills the epochs": (["training.warmup_steps=10"], ["training.warmup_steps", "only 10 steps"]),
    "longer than the positions": (["training.max_length=129"], ["128 positions", "training.max_length=128"]),
    "no GPU": (["training.device=cuda"], ["no GPU", "training.device=cpu"]),
    "no device": (["training.device=gpu"], ["training.device=gpu", "cuda"]),
    "a device we don't know": (["training.device=mps"], ["training.device=mps", "cuda"]),
    "resume without a checkpoint": (["--resume"], ["no complete checkpoint", "Start without --resume"]),
    "resume from a path that is none": (["--resume", "no/such"], ["no/such is not a complete checkpoint"]),
    "missing data": (["data.train=no/such.json"], ["no/such.json"]),
    "missing eval data": (["data.eval=no/such.json", "data.eval_fraction=0"], ["no/such.json"]),
    "missing model": (["model.name=./no-such"], ["./no-such"]),
    "nothing survives": (["training.max_length=4"], ["training.max_length"]),
}


@pytest.mark.parametrize(("words", "expected"), OVERRIDES.values(), ids=OVERRIDES)
def test_wrong_settings(words: list[str], expected: list[str], world: World, tmp_path: Path) -> None:
    if torch.cuda.is_available() and "training.device=cuda" in words:
        pytest.skip("there is a GPU here")
    assert_explained(world.train(str(tmp_path / "run"), *words), 2, *expected)
    assert not (tmp_path / "run").exists()


DATA: dict[str, tuple[str, list[str]]] = {
    "empty list": ("[]", ["data.json"]),
    "empty file": ("", ["data.json"]),
    "broken JSON": ('[{"instruction": "a"', ["data.json"]),
    "unknown fields": ('[{"foo": "a"}]', ["data.json"]),
    "no answer": ('[{"instruction": "a", "output": ""}]', ["data.json"]),
}


@pytest.mark.parametrize(("text", "expected"), DATA.values(), ids=DATA)
def test_wrong_data(text: str, expected: list[str], world: World, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(text)
    ended = world.train(str(tmp_path / "run"), f"data.train={tmp_path / 'data.json'}")
    assert_explained(ended, 2, *expected)


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] = torch.nan


def flip_header(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[10] ^= 0xFF
    (folder / "model.safetensors").write_bytes(bytes(data))


def cut_end(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def make_t5(folder: Path) -> None:
    config = transformers.T5Config(d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1, vocab_size=320)
    config.save_pretrained(folder)


def make_small_vocabulary(folder: Path) -> None:
    write_tiny_model(folder, vocab_size=100)


MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "unsupported architecture": (make_t5, ["'t5'", "not one of transformers' causal language models"]),
    "tokenizer larger than the embedding": (make_small_vocabulary, ["embedding only 100 rows"]),
    "NaN": (lambda folder: edit_weights(folder, set_nan), ["model.norm.weight", "not finite"]),
    "missing tensor": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.__delitem__("model.norm.weight")),
        ["lacks 1 weights", "model.norm.weight"],
    ),
    "unknown tensor": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.update(more=torch.ones(1))),
        ["model.safetensors holds more"],
    ),
    "wrong shape": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)})),
        ["model.norm.weight has shape (63,)", "(64,)"],
    ),
    "other sizes in the config": (lambda folder: edit_config(folder, intermediate_size=100), ["has shape"]),
    "damaged header": (flip_header, ["model.safetensors"]),
    "cut short": (cut_end, ["model.safetensors", "bytes"]),
    "config.json broken": (lambda folder: (folder / "config.json").write_text("{"), ["config.json"]),
    "config.json of nothing known": (lambda folder: (folder / "config.json").write_text("{}"), ["config.json"]),
    "config.json missing": (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    "weights missing": (lambda folder: (folder / "model.safetensors").unlink(), ["*.safetensors"]),
    "tokenizer broken": (lambda folder: (folder / "tokenizer.json").write_text("{"), ["tokenizer"]),
    "tokenizer missing": (
        lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        ["tokenizer"],
    ),
}


@pytest.mark.parametrize(("damage", "expected"), MODELS.values(), ids=MODELS)
def test_a_wrong_model(damage: Callable[[Path], object], expected: list[str], world: World, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world.model, tmp_path / "model"))
    damage(folder)
    ended = world.train(str(tmp_path / "run"), f"model.name={folder}")
    assert_explained(ended, 2, *expected)


def test_a_model_inside_the_folder_that_would_be_moved_aside(world: World, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world.model, tmp_path / "run" / "inner"))
    for output in (tmp_path / "run", folder):
        ended = world.train(str(output), f"model.name={folder}")
        assert_explained(ended, 2, str(folder), "training.output_dir")
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("output", [".", "..", "/"])
def test_the_folder_that_the_command_runs_in(
    output: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moving an earlier run aside would move everything else in it too."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "metrics.jsonl").write_text("earlier\n")
    monkeypatch.chdir(tmp_path / "here")
    ended = world.train("unused", f"training.output_dir={output}")
    assert_explained(ended, 2, f"training.output_dir={output} is the folder", "folder of its own")
    assert (tmp_path / "here" / "metrics.jsonl").read_text() == "earlier\n"


def test_a_folder_that_cant_be_written_to(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = world.train(str(tmp_path / "file" / "run"))
    assert_explained(ended, 2, "can't be written to", "training.output_dir")


def test_a_failed_start_leaves_the_earlier_run_in_place(world: World, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("earlier\n")
    folder = Path(shutil.copytree(world.model, tmp_path / "model"))
    make_t5(folder)
    assert_explained(world.train(str(tmp_path / "run"), f"model.name={folder}"), 2)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "earlier\n"
    assert not list(tmp_path.glob("run.previous*"))


@pytest.mark.parametrize("save_every_steps", [0, 1])
def test_a_loss_that_explodes_ends_the_run_and_names_the_way_back(
    save_every_steps: int, world: World, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    ended = world.train(
        str(folder),
        "training.learning_rate=1e9",
        "--optimizer",
        "adamw",
        f"checkpoint.save_every_steps={save_every_steps}",
    )
    saved = checkpoints(folder)
    assert bool(saved) == bool(save_every_steps)
    way = f"The last checkpoint is {saved[-1]}." if saved else "There is no checkpoint yet."
    assert_explained(ended, 1, "step", "training.learning_rate", way)
    assert not (folder / "model.safetensors").exists()


def unexpected(*args: Any, **more: Any) -> None:
    raise ValueError("surprise\nin two lines")


def test_an_unexpected_exception_has_no_traceback_unless_asked_for(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "prepare", unexpected)
    assert_explained(world.train(str(tmp_path / "run")), 1, "ValueError: surprise", "--debug")
    with pytest.raises(ValueError, match="surprise"):
        world.train(str(tmp_path / "run"), "--debug")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(), RuntimeError("x: out of memory")]
)
def test_out_of_memory_says_what_helps(
    error: Exception, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr(run, "prepare", fails)
    assert_explained(world.train(str(tmp_path / "run")), 1, "Out of memory", "training.batch_size")


def test_debug_keeps_usage_errors_short() -> None:
    assert_explained(command("trane", "--debug"), 2, "trane")


@pytest.mark.parametrize(
    ("words", "parsed"),
    [
        (["train", "--resume"], ["train", "--resume=latest"]),
        (["train", "--resume", "--config", "x"], ["train", "--resume=latest", "--config", "x"]),
        (["train", "--resume", "a.b=1"], ["train", "--resume=latest", "a.b=1"]),
        (["train", "--resume", "outputs/run/checkpoint-4"], ["train", "--resume", "outputs/run/checkpoint-4"]),
        (["train", "--resume=checkpoint-4", "a.b=1"], ["train", "--resume=checkpoint-4", "a.b=1"]),
        (["train", "--resume", "out/lr=0.1/checkpoint-4"], ["train", "--resume", "out/lr=0.1/checkpoint-4"]),
        (["train", "--resume", "data.train=a/b.json"], ["train", "--resume=latest", "data.train=a/b.json"]),
        (["train"], ["train"]),
    ],
)
def test_resume_takes_a_path_or_nothing(words: list[str], parsed: list[str]) -> None:
    assert main_module._resume_as_value(words) == parsed


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["train", "--help"], ["download", "--list"]])
def test_asking_for_help_is_no_error(words: list[str]) -> None:
    ended = command(*words)
    assert ended.code == 0 and ended.err == ""
    assert ended.out.strip()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device"),
    ],
    ids=["system", "wrapped"],
)
def test_a_full_disk_is_said_so(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("sophia_galore.cli.prepare_data.prepare_sample_data", full)
    assert main_module.main(["prepare-data"]) == 2
    assert "The disk is full" in capsys.readouterr().err


@pytest.mark.parametrize(
    "number", ["EISDIR", "ENOTDIR", "EEXIST", "ENOTEMPTY", "EACCES", "EPERM", "ELOOP", "ENAMETOOLONG"]
)
def test_what_is_at_a_path_is_said_so(
    number: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(getattr(errno, number), "No", "some/file")

    monkeypatch.setattr("sophia_galore.cli.prepare_data.prepare_sample_data", fails)
    assert main_module.main(["prepare-data"]) == 2
    assert "some/file can't be used: No." in capsys.readouterr().err
