"""What records say about what is to be learned, a situation a row: honoured in every format, or refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sophia_galore.data.conversation import Conversation, Message
from sophia_galore.data.formats import detect_format, to_conversation
from sophia_galore.data.meanings import REFUSED, TABLE
from sophia_galore.data.record import Record
from sophia_galore.errors import DataError

WHERE = "data/x.jsonl:17"
NAN = math.nan
Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
SYSTEM = {"role": "system", "content": "s"}
USER, ANSWER = Message("user", "q"), Message("assistant", "a")
PARTS = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLED = Message("assistant", "", tool_calls=(CALL,))

# The same question and answer in every format, to which a row adds a field.
PLAIN: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "q", "output": "a"},
    "sharegpt": {"conversations": [HUMAN, GPT]},
    "messages": {"messages": [Q, A]},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "text": {"text": "a"},
}
LISTS = {"prompt": [Q], "completion": [A]}
CHATS = {name: fields for name, fields in PLAIN.items() if name != "text"}


def converted(fields: dict[str, Any]) -> Conversation:
    record = Record(fields, WHERE)
    return to_conversation(record, detect_format([record]))


def refused(fields: dict[str, Any]) -> DataError:
    with pytest.raises(DataError) as error:
        converted(fields)
    assert error.value.cause.startswith(f"{WHERE}: ")
    assert error.value.remedy
    return error.value


def chat(*turns: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": list(turns), **fields}


def sharegpt(*turns: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"conversations": list(turns), **fields}


NOT_LEARNED = ["weight", "train", "training", "trainable", "loss", "loss_scale", "loss_mask", "loss_weight"]


@pytest.mark.parametrize("value", [0, 0.0, False, "0", "false", "False"])
@pytest.mark.parametrize("name", NOT_LEARNED)
def test_a_turn_that_is_not_to_be_learned_stays_in_the_text_and_does_not_count(name: str, value: Any) -> None:
    for fields in (chat(Q, {**A, name: value}, Q, A), sharegpt(HUMAN, {**GPT, name: value}, HUMAN, GPT)):
        said = converted(fields).messages
        assert said == (USER, Message("assistant", "a", counts=False), USER, ANSWER)


@pytest.mark.parametrize("value", [1, 1.0, True, "1", "true", None, NAN, ""])
@pytest.mark.parametrize("name", NOT_LEARNED)
def test_a_turn_that_says_so_or_nothing_counts(name: str, value: Any) -> None:
    for fields in (chat(Q, {**A, name: value}), sharegpt(HUMAN, {**GPT, name: value})):
        assert converted(fields).messages == (USER, ANSWER)


HONOURED: list[tuple[str, dict[str, Any], list[Message]]] = [
    # What is not learned, beyond the rows above.
    ("a user's turn may say that it is not learned", chat({**Q, "weight": 0}, A), [USER, ANSWER]),
    ("a record that counts", {**PLAIN["alpaca"], "weight": 1, "train": True}, [USER, ANSWER]),
    ("a loss that was measured", {**PLAIN["alpaca"], "loss": 2.31}, [USER, ANSWER]),
    (
        "an answer in a prompt that says that it is not learned",
        {"prompt": [Q, {**A, "weight": 0}, Q], "completion": [A]},
        [USER, Message("assistant", "a", counts=False), USER, ANSWER],
    ),
    (
        "an empty turn that is not learned",
        chat(Q, {"role": "assistant", "content": "", "weight": 0}, Q, A),
        [USER, Message("assistant", "", counts=False), USER, ANSWER],
    ),
    # Reasoning.
    *(
        (f"{name} beside an answer", fields, [USER, Message("assistant", "a", reasoning="r")])
        for name in ("reasoning_content", "reasoning", "thinking")
        for fields in (
            chat(Q, {**A, name: "r"}),
            sharegpt(HUMAN, {**GPT, name: "r"}),
            *({**plain, name: "r"} for plain in (*CHATS.values(), LISTS)),
        )
    ),
    (
        "thinking parts",
        chat(Q, {"role": "assistant", "content": [{"type": "thinking", "thinking": "r"}, *PARTS]}),
        [USER, Message("assistant", "a b", reasoning="r")],
    ),
    ("a mode of thinking is no reasoning", {**PLAIN["messages"], "reasoning": "off"}, [USER, ANSWER]),
    ("null reasoning", chat({**Q, "thinking": None}, {**A, "thinking": NAN}), [USER, ANSWER]),
    # System prompts.
    *(
        (f"{name} in {format}", {**plain, name: "s"}, [Message("system", "s"), USER, ANSWER])
        for name in ("system", "system_prompt", "system_message")
        for format, plain in (*CHATS.items(), ("prompts of messages", LISTS))
    ),
    ("the same system prompt twice", chat(SYSTEM, Q, A, system="s"), [Message("system", "s"), USER, ANSWER]),
    ("an empty system prompt", {**PLAIN["prompt_completion"], "system": " "}, [USER, ANSWER]),
    ("two names that say the same", chat(Q, A, system="s", system_prompt="s"), [Message("system", "s"), USER, ANSWER]),
    (
        "a developer's turn",
        chat({"role": "developer", "content": "d"}, Q, A),
        [Message("developer", "d"), USER, ANSWER],
    ),
    # History.
    *(
        (f"history in {name}", {**PLAIN[name], "history": history}, [USER, ANSWER, USER, ANSWER])
        for name in ("alpaca", "prompt_completion")
        for history in ([["q", "a"]], '[["q", "a"]]', "[['q', 'a']]", [["q", [{"type": "text", "text": "a"}]]])
    ),
    # Preferences.
    *(
        (f"a good answer in {format}", {**plain, name: value}, [USER, ANSWER])
        for format, plain in CHATS.items()
        for name in ("label", "kto_tag")
        for value in (True, 1, "true", None, NAN, "sports")
    ),
    ("rejected that says nothing", {**PLAIN["prompt_completion"], "rejected": None, "chosen": ""}, [USER, ANSWER]),
    # Tools.
    *(
        (f"no tools, written as {empty!r}", {**plain, "tools": empty}, [USER, ANSWER])
        for empty in ([], "[]", "", None, NAN, "null", {})
        for plain in (*CHATS.values(), LISTS)
    ),
    (
        "OpenAI's calls, their arguments as text",
        chat(
            Q,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "r"},
            A,
        ),
        [
            USER,
            Message("assistant", "", tool_calls=({"id": "c1", **CALL},)),
            Message("tool", "r", name="f", tool_call_id="c1"),
            ANSWER,
        ],
    ),
    (
        "calls without the outer object",
        chat(Q, {**A, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}),
        [USER, Message("assistant", "a", tool_calls=(CALL,))],
    ),
    (
        "calls as text",
        chat(Q, {**A, "tool_calls": '[{"name": "f", "arguments": {"x": 1}}]'}),
        [USER, Message("assistant", "a", tool_calls=(CALL,))],
    ),
    (
        "OpenAI's older form",
        chat(
            Q,
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
            {"role": "function", "name": "f", "content": "r"},
            A,
        ),
        [USER, CALLED, Message("tool", "r", name="f"), ANSWER],
    ),
    *(
        (
            f"sharegpt's {call} and {response}",
            sharegpt(
                HUMAN,
                {"from": call, "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": response, "value": "r"},
                GPT,
            ),
            [USER, CALLED, Message("tool", "r"), ANSWER],
        )
        for call, response in (("function_call", "observation"), ("tool_call", "tool_response"), ("tool-call", "tool"))
    ),
    (
        "a text and its call are one turn, and so are two calls",
        sharegpt(
            HUMAN,
            GPT,
            *[{"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}] * 2,
            {"from": "observation", "value": "r"},
            GPT,
        ),
        [USER, Message("assistant", "a", tool_calls=(CALL, CALL)), Message("tool", "r"), ANSWER],
    ),
    (
        "a tool's result that is an object",
        chat(Q, A, {"role": "tool", "content": {"x": "é"}}, A),
        [USER, ANSWER, Message("tool", '{"x": "é"}'), ANSWER],
    ),
    ("no calls", chat(Q, {**A, "tool_calls": [], "function_call": None}), [USER, ANSWER]),
    ("names of speakers", chat({**Q, "name": "Ann"}, A), [Message("user", "q", name="Ann"), ANSWER]),
    # Content.
    ("parts in messages", chat(Q, {**A, "content": PARTS}), [USER, Message("assistant", "a b")]),
    ("parts in sharegpt", sharegpt(HUMAN, {**GPT, "value": PARTS}), [USER, Message("assistant", "a b")]),
    ("parts in alpaca", {**PLAIN["alpaca"], "output": PARTS}, [USER, Message("assistant", "a b")]),
    ("parts in completions", {**PLAIN["prompt_completion"], "completion": PARTS}, [USER, Message("assistant", "a b")]),
    ("parts in prompts", {**PLAIN["prompt_completion"], "prompt": PARTS}, [Message("user", "a b"), ANSWER]),
    ("one part", chat(Q, {**A, "content": PARTS[1]}), [USER, Message("assistant", "b")]),
    (
        "parts that tables have filled up",
        chat(Q, {**A, "content": [{**PARTS[1], "image_url": None}]}),
        [USER, Message("assistant", "b")],
    ),
    *(
        (f"an answer of type {type(value).__name__} in {format}", fields, [USER, Message("assistant", said)])
        for value, said in ((42, "42"), (0, "0"), (0.5, "0.5"), (True, "true"), (False, "false"))
        for format, fields in (
            ("alpaca", {**PLAIN["alpaca"], "output": value}),
            ("sharegpt", sharegpt(HUMAN, {**GPT, "value": value})),
            ("messages", chat(Q, {**A, "content": value})),
            ("prompt_completion", {**PLAIN["prompt_completion"], "completion": value}),
        )
    ),
    *(
        (f"a list that is text: {text[:30]}", fields, [USER, ANSWER])
        for text in (
            '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]',
            "[{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]",
        )
        for fields in ({"messages": text}, {"conversations": text})
    ),
    (
        "prompt and completion that are text and hold messages",
        {"prompt": '[{"role": "user", "content": "q"}]', "completion": '[{"role": "assistant", "content": "a"}]'},
        [USER, ANSWER],
    ),
    (
        "a prompt that quotes messages stays a text",
        {"prompt": '[{"role": "user", "content": "q"}]', "completion": "a"},
        [Message("user", '[{"role": "user", "content": "q"}]'), ANSWER],
    ),
    ("messages as columns", {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, [USER, ANSWER]),
    ("NaN in optional fields", {**PLAIN["alpaca"], "input": NAN, "system": NAN, "history": NAN}, [USER, ANSWER]),
    ("capitalised fields", {"Instruction": "q", " Input ": "", "OUTPUT": "a"}, [USER, ANSWER]),
    (
        "spaces in names",
        {"Prompt": "q", "Completion": "a", "System Prompt": "s"},
        [Message("system", "s"), USER, ANSWER],
    ),
    ("capitalised roles", chat({**Q, "role": "User"}, {**A, "role": "Assistant"}), [USER, ANSWER]),
    ("roles of other tools", chat(Q, {**A, "role": "model"}), [USER, ANSWER]),
    (
        "what changes nothing",
        {**PLAIN["messages"], "id": 7, "source": "x", "metadata": {"weight": 3}, "score": 0.2},
        [USER, ANSWER],
    ),
    ("a column that another format needs", {**PLAIN["alpaca"], "prompt": "### q"}, [USER, ANSWER]),
]


@pytest.mark.parametrize(("fields", "messages"), [row[1:] for row in HONOURED], ids=[row[0] for row in HONOURED])
def test_honoured(fields: dict[str, Any], messages: list[Message]) -> None:
    conversation = converted(fields)
    # Whether the turns of others count is of no effect.
    said = [each if each.role == "assistant" else replace(each, counts=True) for each in conversation.messages]
    assert said == messages


@pytest.mark.parametrize(
    "form",
    [[TOOL], [TOOL["function"]], TOOL, f"[{TOOL}]", json.dumps([TOOL])],
    ids=["list", "bare", "single", "python text", "json text"],
)
@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tools_are_read_in_every_format(name: str, form: Any) -> None:
    for fields in (*CHATS.values(), LISTS):
        assert converted({**fields, name: form}).tools == (TOOL,)
    assert converted(chat({**SYSTEM, name: form}, Q, A)).tools == (TOOL,)


def test_only_a_bare_question_and_answer_can_do_without_a_chat_template() -> None:
    plain = PLAIN["prompt_completion"]
    assert converted(plain).kind == "completion"
    for more in ({"system": "s"}, {"tools": [TOOL]}, {"thinking": "r"}, {"history": [["q", "a"]]}):
        assert converted({**plain, **more}).kind == "chat"


IMAGE = {"type": "image_url", "image_url": {"url": "data:..."}}
REFUSALS: list[tuple[str, dict[str, Any], list[str]]] = [
    *(
        (f"{name} of {value!r}", fields, [f"[1].{name}`", str(value)])
        for name in ("weight", "loss_scale", "train")
        for value in (0.5, 2, -1, "often")
        for fields in (chat(Q, {**A, name: value}), sharegpt(HUMAN, {**GPT, name: value}))
    ),
    *(
        (f"{format} with weight {value}", {**plain, "weight": value}, ["`weight`", str(value)])
        for format, plain in PLAIN.items()
        for value in (0, 0.5, 3)
    ),
    *(
        (f"{format} with {name} false", {**plain, name: False}, [f"`{name}`", "false"])
        for format, plain in PLAIN.items()
        for name in ("train", "trainable", "loss")
    ),
    ("no answer counts", chat(Q, {**A, "weight": 0}), ["`messages`", "no assistant turn counts"]),
    ("no answer counts", sharegpt(HUMAN, {**GPT, "loss": False}), ["`conversations`", "no assistant turn counts"]),
    ("both", chat(Q, {**A, "weight": 0, "train": True}), ["`messages[1]`", "`weight`", "`train`"]),
    ("a user's turn is to be learned", chat({**Q, "train": True}, A), ["`messages[0].train`", "user"]),
    (
        "an answer in the prompt is to be learned",
        {"prompt": [Q, {**A, "train": True}, Q], "completion": [A]},
        ["`prompt[1].train`", "the prompt"],
    ),
    ("the question is to be learned", {**PLAIN["alpaca"], "train_on_input": True}, ["`train_on_input`", "question"]),
    ("characters", chat(Q, {**A, "train_detail": [{"begin_offset": 0}]}), ["`messages[1].train_detail`", "characters"]),
    ("a mask", chat(Q, {**A, "mask": 1}), ["`messages[1].mask`", "both"]),
    # Preferences: in every format.
    *(
        (f"{name} false in {format}", {**plain, name: value}, [f"`{name}`", "preference"])
        for format, plain in CHATS.items()
        for name in ("label", "kto_tag")
        for value in (False, 0, "False")
    ),
    ("label false beside text", {"text": "t", "label": False}, ["`label`", "preference"]),
    *(
        (f"{name} in {format}", {**plain, name: "x"}, [f"`{name}`", "preference"])
        for format, plain in PLAIN.items()
        for name in ("chosen", "rejected", "rejected_response", "non_preferred_output")
    ),
    ("a pair and nothing else", {"chosen": [Q, A], "rejected": [Q, A]}, ["`chosen`", "preference"]),
    # Reasoning that has no place.
    ("a user thinks", chat({**Q, "thinking": "r"}, A), ["`messages[0]`", "reasoning", "user"]),
    ("whose reasoning", chat(Q, A, Q, A, reasoning="because"), ["`reasoning`", "of which"]),
    ("reasoning beside text", {"text": "t", "reasoning_content": "r"}, ["`reasoning_content`", "raw text"]),
    ("two reasonings", chat(Q, {**A, "thinking": "r", "reasoning": "s"}), ["`messages[1].reasoning`", "differ"]),
    ("whether, not what", chat(Q, {**A, "thinking": True}), ["`messages[1].thinking`", "true"]),
    ("another channel", chat(Q, {**A, "channel": "analysis"}, A), ["`messages[1]`", "analysis"]),
    # System prompts and tools that have no place.
    ("two system prompts", chat(SYSTEM, Q, A, system_prompt="t"), ["`system_prompt`", "`messages[0]`"]),
    ("two system fields", {**PLAIN["alpaca"], "system": "s", "system_prompt": "t"}, ["`system`", "`system_prompt`"]),
    ("system beside text", {"text": "t", "system": "s"}, ["`system`", "raw text"]),
    ("tools beside text", {"text": "t", "tools": [TOOL]}, ["`tools`", "raw text"]),
    ("history beside messages", chat(Q, A, history=[["q", "a"]]), ["`history`", "`messages`"]),
    ("tools that are none", chat(Q, A, tools="search"), ["`tools`", "str"]),
    (
        "calls that are none",
        sharegpt(HUMAN, {"from": "function_call", "value": "search(x)"}, GPT),
        ["`conversations[1].value`", "no call"],
    ),
    ("arguments that are none", chat(Q, {**A, "tool_calls": [{"name": "f", "arguments": "x"}]}), ["`f`", "arguments"]),
    ("a user calls", chat({**Q, "tool_calls": [CALL]}, A), ["`messages[0]`", "user"]),
    # What is no text.
    *(
        (f"an image in {format}", fields, [place, "image_url"])
        for format, fields, place in (
            ("messages", chat({**Q, "content": [PARTS[0], IMAGE]}, A), "messages[0].content[1]"),
            ("sharegpt", sharegpt({**HUMAN, "value": [IMAGE]}, GPT), "conversations[0].value[0]"),
            ("alpaca", {**PLAIN["alpaca"], "instruction": [IMAGE]}, "instruction[0]"),
            ("prompt_completion", {**PLAIN["prompt_completion"], "prompt": [IMAGE]}, "prompt[0]"),
        )
    ),
    ("audio", chat({**Q, "content": [{"type": "input_audio", "input_audio": {}}]}, A), ["input_audio", "only text"]),
    ("a tool's result as a part", chat({**Q, "content": [{"type": "tool_result"}]}, A), ["tool_result"]),
    *((f"images beside {format}", {**plain, "images": ["x.png"]}, ["`images`"]) for format, plain in PLAIN.items()),
    ("documents", chat(Q, A, documents=[{"text": "d"}]), ["`documents`", "chat template"]),
    ("a switch of the template", chat(Q, A, chat_template_kwargs={"x": 1}), ["`chat_template_kwargs`"]),
    ("a refusal", chat(Q, {**A, "refusal": "no"}), ["`messages[1].refusal`"]),
    ("an object as answer", {**PLAIN["alpaca"], "output": {"x": 1}}, ["`output`", "dict"]),
    ("NaN as answer", {**PLAIN["alpaca"], "output": NAN}, ["`output`", "missing"]),
    ("an endless answer", chat(Q, {**A, "content": math.inf}), ["float"]),
    ("text that is no list", {"messages": "hello"}, ["`messages`", "str"]),
    ("an unknown role", chat(Q, {**A, "role": "robot"}), ["'robot'", "`messages[1].role`"]),
]


@pytest.mark.parametrize(("fields", "says"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
def test_refused_by_name(fields: dict[str, Any], says: list[str]) -> None:
    message = str(refused(fields))
    for part in says:
        assert part in message


@pytest.mark.parametrize("row", [row for row in TABLE if row.remedy], ids=lambda row: row.names[0])
def test_every_row_of_the_table_that_refuses_does_so(row: Any) -> None:
    assert row.becomes == REFUSED
    for name in row.names:
        if row.place == "turn":
            assert f"[1].{name}`" in str(refused(chat(Q, {**A, name: ["x"]})))
            assert f"[1].{name}`" in str(refused(sharegpt(HUMAN, {**GPT, name: ["x"]})))
        else:
            assert all(f"`{name}`" in str(refused({**fields, name: ["x"]})) for fields in PLAIN.values())


def test_the_documents_name_every_field_of_the_table() -> None:
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [name for row in TABLE for name in row.names if f"`{name}`" not in text] == []


def test_what_a_template_sees_of_a_message() -> None:
    message = Message("tool", "r", name="f", tool_call_id="c1")
    assert message.for_template() == {"role": "tool", "content": "r", "name": "f", "tool_call_id": "c1"}
