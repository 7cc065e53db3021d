"""`chat`: turns and commands, as piped lines; what it saves can be trained on."""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sophia_galore.cli import chat as chat_module
from sophia_galore.cli import chat_session
from sophia_galore.config.schema_data import DataConfig
from sophia_galore.data.dataset import load_data
from sophia_galore.engine.dialogue import Dialogue
from sophia_galore.engine.generate import Answer, Settings, Stream
from sophia_galore.engine.loaded import Loaded, loaded
from sophia_galore.model.skeleton import load_tokenizer
from unit.cli.test_cli_errors import assert_explained
from unit.cli.tiny_run import Ended, command, json_lines

Talk = Callable[..., Ended]


@pytest.fixture
def talk(talker: Path, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """A chat over piped lines."""

    def chat(*lines: str, model: Path = talker, words: tuple[str, ...] = ("--max-new-tokens", "6")) -> Ended:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return command("chat", str(model), *words)

    return chat


def messages(path: Path) -> list[tuple[str, str]]:
    (record,) = json_lines(path)
    return [(turn["role"], turn["content"]) for turn in record["messages"]]


def test_answers_alone_go_to_standard_output(talk: Talk, talker: Path) -> None:
    ended = talk("what is the sum", "", "  ")
    assert ended.code == 0
    assert ended.out == command("generate", str(talker), "what is the sum", "--max-new-tokens", "6").out
    assert f"{talker}: /help" in ended.err and ">" not in ended.out


def test_the_model_reads_the_whole_conversation(talk: Talk, talker: Path, tmp_path: Path) -> None:
    """As the chat template writes it: system message, first question and answer, second question."""
    path = tmp_path / "saved.jsonl"
    ended = talk("what is one", "and two", f"/save {path}", words=("--max-new-tokens", "6", "--system", "be brief"))
    assert ended.code == 0, ended.err
    said = messages(path)
    assert [role for role, _ in said] == ["system", "user", "assistant", "user", "assistant"]
    assert said[:2] == [("system", "be brief"), ("user", "what is one")] and said[3] == ("user", "and two")
    with loaded(talker, "auto", torch.device("cpu")) as it:
        dialogue = Dialogue(it, "be brief")
        for question in ("what is one", "and two"):
            asked = dialogue.ask(question, max_new_tokens=6)
            dialogue.keep(asked, it.answer(asked.prompt, Settings(6), Stream(it.tokenizer)))
        text = it.tokenizer.decode(asked.prompt[0])
        assert [turn.answer.strip() for turn in dialogue.turns] == [said[2][1], said[4][1]]
    assert text == "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in said[:4]) + (
        "<|im_start|>assistant\n"
    )
    alone = talk("and two", f"/save {tmp_path / 'alone.jsonl'}")
    assert alone.code == 0 and messages(tmp_path / "alone.jsonl")[1][1] != said[4][1], "the first turn was read"


def test_commands(talk: Talk, tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    ended = talk(
        "what is one",
        "/reset",
        f"/save {first}",
        "/system be brief",
        "and two",
        f"/save {second}",
        "/system",
        "/help",
        "/nothing such",
        "/save here.txt",
        " /reset is no command here",
        "/exit",
        "this is not asked",
    )
    assert ended.code == 0
    assert len(ended.out.splitlines()) >= 3 and "Traceback" not in ended.err
    assert not first.exists() and "nothing to save" in ended.err
    assert [turn for turn in messages(second) if turn[0] != "assistant"] == [
        ("system", "be brief"),
        ("user", "and two"),
    ]
    for name in ("/reset", "/system TEXT", "/save FILE", "/help", "/exit"):
        assert name in ended.err
    assert "/nothing is no command" in ended.err and "Write /save FILE.jsonl" in ended.err
    assert "no system message any more" in ended.err


def test_what_is_saved_can_be_trained_on(talk: Talk, talker: Path, tmp_path: Path) -> None:
    path = tmp_path / "saved.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    ended = talk("what is one", "naïve 日本", f"/save {path}", f"/save {tmp_path / 'no' / 'such' / 'x.jsonl'}")
    assert f"2 turns added to {path}" in ended.err and f"data.train={path}" in ended.err
    assert "can't be written" in ended.err
    assert len(json_lines(path)) == 2
    config = DataConfig(train=str(path), eval_fraction=0.0)
    dataset = load_data(config, max_length=128, seed=0, tokenizer=load_tokenizer(talker))
    assert dataset.format == "messages" and len(dataset.train) == 2


def test_several_lines_are_one_question(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "saved.jsonl"
    assert talk('"""what', "", 'is one"""', '"""so"""', f"/save {path}").code == 0
    assert [content for role, content in messages(path) if role == "user"] == ["what\n\nis one", "so"]


def test_the_oldest_turns_are_left_out_when_there_is_no_room(talk: Talk, talker: Path, tmp_path: Path) -> None:
    """128 positions; a turn takes some 40 of them."""
    path = tmp_path / "saved.jsonl"
    ended = talk(*["so it follows and so on"] * 4, f"/save {path}", words=("--max-new-tokens", "12"))
    assert ended.code == 0
    assert "no longer sees the oldest turn: it reads 128 tokens" in ended.err
    assert len(messages(path)) == 8, "what was said is saved, whether the model still reads it or not"
    with loaded(talker, "auto", torch.device("cpu")) as it:
        dialogue, forgotten = Dialogue(it), []
        for _ in range(5):
            asked = dialogue.ask("so it follows and so on", max_new_tokens=12)
            dialogue.keep(asked, Answer("one two three four", (), "done"))
            forgotten.append(asked.num_forgotten)
            assert asked.prompt.shape[1] + 12 <= 128
            text = it.tokenizer.decode(asked.prompt[0])
            assert text.count("<|im_start|>user") == text.count("<|im_start|>assistant")
        assert forgotten[0] == 0 and forgotten[-1] == 1, "one goes for one that comes"
        dialogue.reset()
        assert dialogue.ask("so", max_new_tokens=12).num_forgotten == 0


def test_a_question_that_does_not_fit_is_said_and_the_chat_goes_on(talk: Talk) -> None:
    ended = talk("z" * 200, "what is one")
    assert ended.code == 0 and "reads 128 at most" in ended.err
    assert len(ended.out.splitlines()) == 1
    limited = talk("what is one", words=("--max-new-tokens", "1000"))
    assert "Answers have 64 tokens at most" in limited.err


def test_an_empty_answer_is_not_kept(talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would teach to say nothing, and a run refuses it."""
    monkeypatch.setattr(Loaded, "answer", lambda *_: Answer(" \n", (2,), "done"))
    ended = talk("what is one", f"/save {tmp_path / 'saved.jsonl'}")
    assert "said nothing" in ended.err and "nothing to save" in ended.err


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C raises, also where the tests run in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_ends_the_answer_and_not_the_chat(
    talk: Talk, talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = talk("what is one", "so").out
    original, shown = chat_session.show_text, []

    def show(text: str) -> None:
        original(text)
        shown.append(text)
        if len(shown) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat_session, "show_text", show)
    path = tmp_path / "saved.jsonl"
    ended = talk("what is one", "so", f"/save {path}")
    assert ended.code == 0 and "Traceback" not in ended.err
    assert ended.out.startswith("".join(shown[:2]) + "\n") and len(shown) > 2 and ended.out != whole
    assert messages(path)[1] == ("assistant", "".join(shown[:2]).strip())
    assert "did not come to their end" in ended.err


def test_ctrl_c_at_the_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Who types is told how to end."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    typed = iter(["what is one", KeyboardInterrupt, "so", EOFError])

    def read(prompt: str, *, is_terminal: bool) -> str:
        assert prompt == "> " and is_terminal
        line: Any = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(chat_module, "_read", read)
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert list(chat_module._lines()) == ["what is one", "so"]
    assert "Ctrl-D or /exit ends the chat." in capsys.readouterr().err


def test_before_and_after_are_compared(talk: Talk, trained_talker: Path, talker: Path, tmp_path: Path) -> None:
    words = ("--max-new-tokens", "6", "--compare-base")
    path = tmp_path / "saved.jsonl"
    ended = talk("what is the sum", "so", f"/save {path}", model=trained_talker, words=words)
    assert ended.code == 0, ended.err
    alone = [
        command("generate", str(folder), "what is the sum", "--max-new-tokens", "6").out
        for folder in (talker, trained_talker)
    ]
    assert ended.out.startswith(f"base: {talker}\n{alone[0]}\nfine-tuned: {trained_talker}\n{alone[1]}")
    assert ended.out.count("base: ") == 2 == ended.out.count("fine-tuned: ")
    assert messages(path)[1] == ("assistant", alone[1].strip()), "the fine-tuned model's conversation is saved"
    assert_explained(talk("so", words=words), 2, "before training", "--compare-base")


def test_a_model_without_a_chat_template_goes_on_with_the_text(talk: Talk, talker: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(talker, tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    path = tmp_path / "saved.jsonl"
    ended = talk("what is one", "so", "/system be brief", f"/save {path}", model=folder)
    assert ended.code == 0, ended.err
    assert "no chat template" in ended.err and "continues your text" in ended.err
    assert "no place for a system message" in ended.err
    first = command("generate", str(folder), "what is one", "--max-new-tokens", "6").out
    assert ended.out.startswith(first)
    (record,) = json_lines(path)
    assert record["text"].startswith("what is one" + first.removesuffix("\n")) and "\nso" in record["text"]
    config = DataConfig(train=str(path), eval_fraction=0.0)
    dataset = load_data(config, max_length=128, seed=0, tokenizer=load_tokenizer(folder))
    assert dataset.format == "text"
    assert_explained(talk("so", model=folder, words=("--system", "x")), 2, "no chat template")


def test_each_question_draws_anew_and_a_chat_can_be_repeated(talk: Talk) -> None:
    words = ("--max-new-tokens", "6", "--temperature", "3")
    once, again = (talk("what", "/reset", "what", words=words).out for _ in range(2))
    assert once == again
    assert talk("what", words=words).out != once[: len(once) // 2]


def test_a_model_that_is_not_there(talk: Talk) -> None:
    assert_explained(talk("so", model=Path("./no-such")), 2, "no-such")
