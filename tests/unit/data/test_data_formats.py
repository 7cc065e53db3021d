from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sophia_galore.data.formats import MARKS, detect_format, to_conversation
from sophia_galore.data.record import Record
from sophia_galore.errors import DataError

WHERE = "data/x.jsonl:17"
Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def record(fields: dict[str, Any], where: str = WHERE) -> Record:
    return Record(fields, where)


@pytest.mark.parametrize(
    ("fields", "format", "messages"),
    [
        ({"instruction": "q", "output": "a"}, "alpaca", [("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "input": "i", "output": "a"}, "alpaca", [("user", "q\ni"), ("assistant", "a")]),
        ({"instruction": "", "input": "i", "output": "a"}, "alpaca", [("user", "i"), ("assistant", "a")]),
        (
            {"instruction": "q", "input": None, "output": "a", "system": "s", "history": [["h", "i"]], "text": "all"},
            "alpaca",
            [("system", "s"), ("user", "h"), ("assistant", "i"), ("user", "q"), ("assistant", "a")],
        ),
        ({"instruction": "q", "output": "a", "history": []}, "alpaca", [("user", "q"), ("assistant", "a")]),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                    {"from": "tool", "value": "t"},
                    {"from": "assistant", "value": "b"},
                    {"from": "user", "value": "r"},
                ]
            },
            "sharegpt",
            [("system", "s"), ("user", "q"), ("assistant", "a"), ("tool", "t"), ("assistant", "b"), ("user", "r")],
        ),
        ({"conversations": [Q, A]}, "sharegpt", [("user", "q"), ("assistant", "a")]),
        ({"messages": [Q, A], "prompt": "q"}, "messages", [("user", "q"), ("assistant", "a")]),
        ({"messages": [Q, A], "system": "s"}, "messages", [("system", "s"), ("user", "q"), ("assistant", "a")]),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", [("user", "q"), ("assistant", "a")]),
        ({"prompt": [Q], "completion": [A]}, "prompt_completion", [("user", "q"), ("assistant", "a")]),
        ({"text": "t", "messages": None}, "text", []),
    ],
)
def test_formats(fields: dict[str, Any], format: str, messages: list[tuple[str, str]]) -> None:
    assert detect_format([record(fields)]) == format
    conversation = to_conversation(record(fields), format)
    assert [(message.role, message.content) for message in conversation.messages] == messages
    assert conversation.where == WHERE
    assert conversation.text == (fields["text"] if format == "text" else "")


def test_kinds_and_context() -> None:
    strings = to_conversation(record({"prompt": "q", "completion": "a"}), "prompt_completion")
    lists = to_conversation(record({"prompt": [Q, A, Q], "completion": [A]}), "prompt_completion")
    assert strings.kind == "completion" and all(message.counts for message in strings.messages)
    assert lists.kind == "chat" and [message.counts for message in lists.messages] == [False, False, False, True]
    assert to_conversation(record({"text": "t"}), "text").kind == "text"


BAD_MESSAGES: list[tuple[Any, list[str]]] = [
    ("hello", ["str", "list"]),
    ([], ["no assistant turn"]),
    ([Q], ["no assistant turn"]),
    ([Q, {"role": "assistant", "content": "  "}], ["empty assistant turn"]),
    ([Q, "a"], ["[1]", "str"]),
    ([Q, {"role": "robot", "content": "a"}], ["'robot'", "[1].role", "assistant, gpt"]),
    ([Q, {"role": ["user"], "content": "a"}], ["[1].role", "unknown"]),
    ([Q, {"content": "a"}], ["[1]", "`role`"]),
    ([Q, {"value": "a"}], ["[1]", "`from`"]),
    ([Q, {"role": "assistant"}], ["[1].content", "missing"]),
    ([Q, {"from": "gpt"}], ["[1].value", "missing"]),
    ([Q, {"role": "assistant", "content": {"a": 3}}], ["[1].content", "dict"]),
    ([Q, {"role": "assistant", "content": [{"type": "text"}]}], ["[1].content[0]", "without its text"]),
    ([Q, {"role": "assistant", "content": "x", "tool_calls": [{}]}], ["[1].tool_calls", "no call of a tool"]),
]


@pytest.mark.parametrize(("field", "format"), [("messages", "messages"), ("conversations", "sharegpt")])
@pytest.mark.parametrize(("value", "says"), BAD_MESSAGES)
def test_bad_message_lists(field: str, format: str, value: Any, says: list[str]) -> None:
    with pytest.raises(DataError) as error:
        to_conversation(record({field: value}), format)
    assert WHERE in error.value.cause
    for part in [field, *says]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("format", "fields", "says"),
    [
        ("alpaca", {"output": "a", "input": "i"}, ["`instruction`", "missing", "`output`, `input`"]),
        ("alpaca", {"instruction": "q"}, ["`output`", "missing"]),
        ("alpaca", {"instruction": "q", "output": None}, ["`output`", "missing"]),
        ("alpaca", {"instruction": "q", "output": " \n"}, ["`output`", "empty"]),
        ("alpaca", {"instruction": " ", "input": "", "output": "a"}, ["`instruction`", "empty"]),
        ("alpaca", {"instruction": "q", "output": {"a": 3}}, ["`output`", "dict"]),
        ("alpaca", {"instruction": ["q"], "output": "a"}, ["`instruction`", "list"]),
        ("alpaca", {"instruction": "q", "output": "a", "system": {"a": 1}}, ["`system`", "dict"]),
        ("alpaca", {"instruction": "q", "output": "a", "history": "x"}, ["`history`", "str"]),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["h", "i"], ["h"]]}, ["`history[1]`", "pair"]),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["h", {"a": 1}]]}, ["`history[0][1]`", "dict"]),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["h", ""]]}, ["`history[0][1]`", "empty"]),
        ("alpaca", {"instruction": "q", "output": "a\ud83d"}, ["`output`", "surrogate"]),
        ("messages", {}, ["`messages`", "missing"]),
        ("messages", {"messages": [Q, A], "tools": [{"title": "f"}]}, ["`tools[0]`", "no definition"]),
        ("messages", {"messages": [{"role": "system", "content": "s"}, Q, A], "system": "t"}, ["`system`", "messages"]),
        ("prompt_completion", {"prompt": "q"}, ["`completion`", "missing"]),
        ("prompt_completion", {"completion": "a"}, ["`prompt`", "missing"]),
        ("prompt_completion", {"prompt": "q", "completion": ""}, ["`completion`", "empty"]),
        ("prompt_completion", {"prompt": "", "completion": "a"}, ["`prompt`", "empty"]),
        ("prompt_completion", {"prompt": "q", "completion": [A]}, ["`prompt`", "str"]),
        ("prompt_completion", {"prompt": [Q], "completion": "a"}, ["`completion`", "str"]),
        ("prompt_completion", {"prompt": [Q, A], "completion": [Q]}, ["`completion`", "no assistant turn"]),
        ("text", {}, ["`text`", "missing", "no field at all"]),
        ("text", {"text": ""}, ["`text`", "empty"]),
        ("text", {"text": {"a": 1.5}}, ["`text`", "dict"]),
    ],
)
def test_bad_fields(format: str, fields: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(DataError) as error:
        to_conversation(record(fields), format)
    assert WHERE in error.value.cause
    assert error.value.remedy
    for part in says:
        assert part in str(error.value)


def test_an_unknown_layout_lists_what_it_has_and_what_is_known() -> None:
    with pytest.raises(DataError) as error:
        detect_format([record({"question": "q", "answer": "a", "note": None})])
    assert WHERE in error.value.cause and "`question`, `answer`." in error.value.cause
    assert all(name in error.value.remedy for name in MARKS)


def test_mixed_formats_name_both_records() -> None:
    first, odd = record({"text": "t"}, "x.jsonl:1"), record({"messages": [Q, A]}, "x.jsonl:3")
    with pytest.raises(DataError) as error:
        detect_format([first, record({}, "x.jsonl:2"), odd])
    assert "x.jsonl:3" in error.value.cause and "x.jsonl:1" in error.value.cause
    assert "messages" in error.value.cause and "text" in error.value.cause


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "from", "content", "value"]), inner, max_size=3)
    ),
    max_leaves=8,
)
fields = st.sampled_from(
    sorted({name for marks in MARKS.values() for name in marks} | {"system", "history", "input", "tools"})
)


@given(st.dictionaries(fields, json_values, max_size=5), st.sampled_from(sorted(MARKS)))
def test_anything_converts_or_is_refused_by_its_place(values: dict[str, Any], format: str) -> None:
    try:
        conversation = to_conversation(record(values), format)
    except DataError as error:
        assert error.cause.startswith(WHERE)
    else:
        assert conversation.text.strip() or any(
            message.role == "assistant" and message.content.strip() for message in conversation.messages
        )


def test_equal_content_has_an_equal_hash_wherever_it_stands() -> None:
    one = to_conversation(record({"instruction": "q", "output": "a"}, "x:1"), "alpaca")
    same = to_conversation(record({"messages": [Q, {**A, "content": "a\n"}]}, "y:9"), "messages")
    other = to_conversation(record({"instruction": "qa", "output": " b"}, "x:1"), "alpaca")
    assert one.content_hash() == same.content_hash() != other.content_hash()
