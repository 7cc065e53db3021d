"""How a run writes conversations: chosen templates, the tokens that end a turn, and the date."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from sophia_galore.data import template_date
from sophia_galore.data.chat_format import WELL_KNOWN, ChatFormat, choose_chat_format, read_template
from sophia_galore.data.conversation import Conversation, Message
from sophia_galore.data.render import describe, tokenise
from sophia_galore.errors import ConfigError
from unit.data.conftest import CHATML, MakeTokenizer

CHAT = (Message("system", "Be kind."), Message("user", "Q one?"), Message("assistant", "A one."))
CHAT += (Message("user", "Q two?"), Message("assistant", "A two."))
# What the marks of the well-known templates are in a tokenizer.
MARKS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
DATED = "{{ strftime_now('%d %b %Y') }}: " + CHATML


def counted(tokenizer: Any, date: str = "") -> list[str]:
    (example,) = tokenise([Conversation(CHAT, "x:1")], tokenizer, max_length=999, too_long="cut", date=date).examples
    return [text for text, counts in describe(example, tokenizer) if counts]


def base_model(make_tokenizer: MakeTokenizer, *, eos: str = "<|endoftext|>") -> Any:
    tokenizer = make_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": [*MARKS, "<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.bos_token = eos, "<s>"
    return tokenizer


@pytest.mark.parametrize(
    ("name", "end"),
    [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("alpaca", "<|endoftext|>")],
)
def test_a_well_known_template_for_a_base_model(make_tokenizer: MakeTokenizer, name: str, end: str) -> None:
    tokenizer = base_model(make_tokenizer)
    chosen = choose_chat_format(tokenizer, name.upper(), date=None, stop_ids=[tokenizer.eos_token_id])
    assert tokenizer.chat_template == chosen.template == read_template(name)
    assert counted(tokenizer) == [f"A one.{end}", f"A two.{end}"]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Q one?"}], tokenize=False)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q one?"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.startswith(text) and prompt != text
    # Only where turns end by another token than texts is there something to add to the generation settings.
    assert [tokenizer.decode([token]) for token in chosen.end_ids] == ([] if name == "alpaca" else [end])
    assert ChatFormat.from_json(chosen.to_json()) == chosen


def test_every_well_known_name_has_a_template() -> None:
    assert all("add_generation_prompt" in read_template(name) for name in WELL_KNOWN)


def test_a_file(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}{{ m['role'] }}> {{ m['content'] }}{{ eos_token }}\n{% endfor %}")
    tokenizer = base_model(make_tokenizer)
    assert choose_chat_format(tokenizer, str(path), date=None, stop_ids=[tokenizer.eos_token_id]).end_ids == ()
    assert counted(tokenizer) == ["A one.<|endoftext|>", "A two.<|endoftext|>"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("missing.jinja", None, "can't be read"),
        ("empty.jinja", "", "does not contain"),
        ("words.jinja", "no template", "does not contain"),
        ("other.jinja", "{{ messages }}<|turn|>", "marks turns with <|turn|>"),
        ("llama3", None, "<|start_header_id|>"),
        ("gemma", None, "<start_of_turn>"),
    ],
)
def test_what_is_refused(make_tokenizer: MakeTokenizer, tmp_path: Path, name: str, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    path = name if name in WELL_KNOWN else str(tmp_path / name)
    with pytest.raises(ConfigError) as error:
        choose_chat_format(make_tokenizer(None), path, date=None, stop_ids=[])
    assert says in error.value.cause and "model.chat_template=" in error.value.cause and error.value.remedy


def test_a_template_that_ends_turns_with_a_token_that_is_not_there(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="end-of-text token"):
        choose_chat_format(tokenizer, "alpaca", date=None, stop_ids=[])


def test_without_a_template_there_is_nothing_to_decide(make_tokenizer: MakeTokenizer) -> None:
    assert choose_chat_format(make_tokenizer(None), None, date=None, stop_ids=[]) == ChatFormat()


def test_the_models_own_template_needs_nothing(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    assert choose_chat_format(tokenizer, None, date=None, stop_ids=[tokenizer.eos_token_id]) == ChatFormat()


def test_the_date_is_that_of_the_first_day(make_tokenizer: MakeTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(DATED)
    monkeypatch.setattr(template_date.datetime, "date", _Day)
    _Day.now = datetime.date(2026, 2, 3)
    first = choose_chat_format(tokenizer, None, date=None, stop_ids=[tokenizer.eos_token_id])
    assert first == ChatFormat(date="2026-02-03")
    chat = [Conversation(CHAT, "x:1")]
    then = tokenise(chat, tokenizer, max_length=999, too_long="cut", date=first.date).examples[0]
    _Day.now = datetime.date(2026, 2, 4)
    later = tokenise(chat, tokenizer, max_length=999, too_long="cut", date=first.date).examples[0]
    assert then.input_ids.tolist() == later.input_ids.tolist()
    assert tokenizer.decode(then.input_ids).startswith("03 Feb 2026: ")
    assert choose_chat_format(tokenizer, None, date="2020-01-02", stop_ids=[]).date == "2020-01-02"


class _Day(datetime.date):
    now = datetime.date(2026, 1, 1)

    @classmethod
    def today(cls) -> datetime.date:  # type: ignore[override]
        return cls.now
