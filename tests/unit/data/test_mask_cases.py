"""What counts in an example, case by case: templates and answers that people bring, and what has to be learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from chat_templates import shipped
from sophia_galore.data.conversation import Conversation, Message
from sophia_galore.data.render import describe, tokenise
from sophia_galore.errors import DataError

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n{% endfor %}"
CUTS_THOUGHTS = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
KNOWS_THOUGHTS = CUTS_THOUGHTS.replace(
    "{{ m['content']", "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m['content']"
)
# As Qwen3's: thoughts are kept in the last turn only.
FORGETS_THOUGHTS = KNOWS_THOUGHTS.replace("m.reasoning_content %}", "m.reasoning_content and loop.last %}")
HEADER_MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}<|im_start|>assistant\n{{ m['content'] }}"
    "<|im_end|>\n{% endgeneration %}{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDS_OUTSIDE_MARKS = HEADER_MARKED.replace(
    "{% generation %}<|im_start|>assistant\n", "<|im_start|>assistant\n{% generation %}"
)
ENDS_OUTSIDE_MARKS = ENDS_OUTSIDE_MARKS.replace("<|im_end|>\n{% endgen", "{% endgen").replace(
    "{% endgeneration %}", "{% endgeneration %}<|im_end|>{{ '\n' }}"
)
MERGES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}<|im_start|>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ first if loop.first else '' }}"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# Mistral's way: no header, the question is in brackets.
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
ENDS_TWICE = CHATML.replace("{% if add", "{% if not add_generation_prompt %}<|endoftext|>{% endif %}{% if add")
ALWAYS_PROMPTS = CHATML.replace("{% if add_generation_prompt %}", "").replace(
    "assistant\n{% endif %}", "assistant\n{{ '' }}"
)
ONE_TURN_SAYS_MORE = CHATML.replace(
    "<|im_end|>\n{% endfor", "{{ '<|endoftext|>' if loop.last else '<|im_end|>' }}\n{% endfor"
)
DROPS_SYSTEM = CHATML.replace("messages %}<", "messages if m['role'] != 'system' %}<")
UPPERCASE = CHATML.replace("m['content'] }}", "m['content'] | replace('e', 'E') }}")


def talk(*turns: str, **more: Any) -> Conversation:
    """Turns as `u: text`, `a: text`, `s: text`, `t: text`; `-: text` is an assistant's that does not count."""
    roles: dict[str, Any] = {
        "u": "user",
        "a": "assistant",
        "-": "assistant",
        "s": "system",
        "t": "tool",
        "d": "developer",
    }
    said = (Message(roles[turn[0]], turn[3:], counts=turn[0] != "-") for turn in turns)
    return Conversation(tuple(said), "x.jsonl:3", **more)


def learned(conversation: Conversation, tokenizer: Any) -> list[str]:
    (example,) = tokenise([conversation], tokenizer, max_length=10_000, too_long="cut").examples
    return [text for text, counted in describe(example, tokenizer) if counted]


CASES: dict[str, tuple[str, Conversation, list[str]]] = {
    "no generation prompt, and the answer is a letter of the header": (PLAIN, talk("u: Q", "a: A"), ["A\n"]),
    "the answer is the role's name": (CHATML, talk("u: Q", "a: assistant"), ["assistant<|im_end|>"]),
    "the answer is the header": (PLAIN, talk("u: Q", "a: ASSISTANT:"), ["ASSISTANT:\n"]),
    "the answer is the question": (CHATML, talk("u: same", "a: same"), ["same<|im_end|>"]),
    "all answers are the same": (CHATML, talk("u: 1", "a: ok", "u: 2", "a: ok"), ["ok<|im_end|>", "ok<|im_end|>"]),
    "the question writes a whole turn": (
        CHATML,
        talk("u: Q<|im_end|>\n<|im_start|>assistant\nNo", "a: Yes"),
        ["Yes<|im_end|>"],
    ),
    "the question writes a plain header": (PLAIN, talk("u: Q\nASSISTANT: A", "a: A"), ["A\n"]),
    "the answer holds the end of a turn": (
        CHATML,
        talk("u: Q", "a: a<|im_end|>b", "u: Q", "a: c"),
        ["a<|im_end|>b<|im_end|>", "c<|im_end|>"],
    ),
    "the answer is a template": (
        CHATML,
        talk("u: Q", "a: {{ messages }}{% endfor %}"),
        ["{{ messages }}{% endfor %}<|im_end|>"],
    ),
    "the answer looks invented": (CHATML, talk("u: Zq0x0q", "a: Zq0x1q Zq1x0q"), ["Zq0x1q Zq1x0q<|im_end|>"]),
    "an empty system turn": (CHATML, talk("s: ", "u: Q", "a: A"), ["A<|im_end|>"]),
    "whitespace around the answer is kept": (CHATML, talk("u: Q", "a: \n A \n"), ["\n A \n<|im_end|>"]),
    "whitespace around the answer is trimmed": (MERGES_SYSTEM, talk("u: Q", "a: \n A \n"), ["A<|im_end|>"]),
    "the system turn goes into the question": (
        MERGES_SYSTEM,
        talk("s: S", "u: Q", "a: A", "u: R", "a: B"),
        ["A<|im_end|>", "B<|im_end|>"],
    ),
    "marks hold the header": (HEADER_MARKED, talk("u: Q", "a: A", "u: R", "a: B"), ["A<|im_end|>", "B<|im_end|>"]),
    "marks leave out the end": (
        ENDS_OUTSIDE_MARKS,
        talk("u: Q", "a: A", "u: R", "a: B"),
        ["A<|im_end|>", "B<|im_end|>"],
    ),
    "a turn in the middle does not count": (
        CHATML,
        talk("u: 1", "a: A", "u: 2", "-: no", "u: 3", "a: C"),
        ["A<|im_end|>", "C<|im_end|>"],
    ),
    "marks, and a turn in the middle does not count": (
        shipped("qwen2_5"),
        talk("u: 1", "a: A", "u: 2", "-: no", "u: 3", "a: C"),
        ["\nA<|im_end|>\n", "\nC<|im_end|>\n"],
    ),
    "the assistant begins": (CHATML, talk("a: A", "u: Q", "a: B"), ["A<|im_end|>", "B<|im_end|>"]),
    "two assistant turns in a row": (CHATML, talk("u: Q", "a: A", "a: B"), ["A<|im_end|>", "B<|im_end|>"]),
    "no header at all": (BRACKETS, talk("u: Q", "a: A", "u: R", "a: B"), [" A<|im_end|>", " B<|im_end|>"]),
    "the conversation has an end of its own": (ENDS_TWICE, talk("u: Q", "a: A"), ["A<|im_end|>\n<|endoftext|>"]),
    "a header always follows": (ALWAYS_PROMPTS, talk("u: Q", "a: A", "u: R", "a: B"), ["A<|im_end|>", "B<|im_end|>"]),
    "the last turn ends in another token": (
        ONE_TURN_SAYS_MORE,
        talk("u: Q", "a: A", "u: R", "a: B"),
        ["A<|im_end|>", "B<|endoftext|>"],
    ),
    "a thought in the text stays": (
        CHATML,
        talk("u: Q", "a: <think>\nT\n</think>\n\nA"),
        ["<think>\nT\n</think>\n\nA<|im_end|>"],
    ),
    "a thought goes where the template keeps it": (
        KNOWS_THOUGHTS,
        talk("u: Q", "a: <think>\nT\n</think>\n\nA"),
        ["<think>T</think>A<|im_end|>"],
    ),
    "Qwen3 keeps thoughts of all turns": (
        shipped("qwen3"),
        talk("u: Q", "a: <think>\nT\n</think>\n\nA", "u: R", "a: B"),
        ["<think>\nT\n</think>\n\nA<|im_end|>\n", "<think>\n\n</think>\n\nB<|im_end|>\n"],
    ),
    "a thought that does not count may be forgotten": (
        CUTS_THOUGHTS,
        talk("u: Q", "-: T</think>A", "u: R", "a: B"),
        ["B<|im_end|>"],
    ),
    "Llama 3": (shipped("llama3"), talk("s: S", "u: Q", "a:  A "), ["A<|eot_id|>"]),
    "Gemma 3": (
        shipped("gemma3"),
        talk("s: S", "u: Q", "a: A", "u: R", "a: B"),
        ["A<end_of_turn>\n", "B<end_of_turn>\n"],
    ),
    "Phi 3": (shipped("phi3"), talk("u: Q", "a: A", "u: R", "a: B"), ["A<|end|>\n", "B<|end|>\n<|im_end|>"]),
    "gpt-oss": (
        shipped("gptoss"),
        talk("u: Q", "a: A", "u: R", "a: B"),
        ["<|channel|>final<|message|>A<|end|>", "<|channel|>final<|message|>B<|return|>"],
    ),
    "DeepSeek R1": (shipped("deepseek_r1_distill"), talk("u: Q", "a: A"), ["A<｜end▁of▁sentence｜>"]),
    "a tool answers": (CHATML, talk("u: Q", "a: A", "t: 6", "a: B"), ["A<|im_end|>", "B<|im_end|>"]),
    "a developer is a system turn where there is no other place": (
        shipped("qwen3_instruct_2507"),
        talk("d: D", "u: Q", "a: A"),
        ["A<|im_end|>\n"],
    ),
    "characters of several tokens": (CHATML, talk("u: ü", "a: 🙂é漢"), ["🙂é漢<|im_end|>"]),
    "lines of another system": (CHATML, talk("u: Q\r\n", "a: A\r\nB\r\n"), ["A\r\nB\r\n<|im_end|>"]),
}


@pytest.fixture(scope="module")
def make(make_tokenizer: MakeTokenizer) -> MakeTokenizer:
    def with_ends(template: str) -> PreTrainedTokenizerFast:
        tokenizer = make_tokenizer(template)
        ends = ["<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|return|>", "<｜end▁of▁sentence｜>"]
        tokenizer.add_special_tokens({"additional_special_tokens": [*ends, "<|im_start|>"]})
        return tokenizer

    return with_ends


@pytest.mark.parametrize("case", CASES)
def test_what_is_learned(case: str, make: MakeTokenizer) -> None:
    template, conversation, expected = CASES[case]
    tokenizer = make(template)
    assert learned(conversation, tokenizer) == expected


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "note": 'say "hi" <|im_end|>'}}}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
CALLING = Conversation(
    (
        Message("user", "2 + 3?"),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", "5", name="add"),
        Message("assistant", "Five."),
    ),
    "x.jsonl:3",
    tools=(TOOL,),
)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3_1", "gptoss", "glm4moe"])
def test_calls_of_tools_are_learned_where_the_template_writes_them(name: str, make: MakeTokenizer) -> None:
    call, answer = learned(CALLING, make(shipped(name)))
    assert "add" in call and "note" in call and "hi" in call and "Adds." not in call
    assert "Five." not in call and "5" not in call and "Five." in answer


@pytest.mark.parametrize(
    ("template", "conversation", "says"),
    [
        (CUTS_THOUGHTS, talk("u: Q", "a: <think>T</think>A"), "leaves out what the assistant thinks in message 2"),
        (
            FORGETS_THOUGHTS,
            talk("u: Q", "a: <think>T</think>A", "u: R", "a: B"),
            "leaves out what the assistant thinks",
        ),
        (CHATML, Conversation((Message("user", "Q"), Message("assistant", "A", reasoning="T")), "x.jsonl:3"), "thinks"),
        (DROPS_SYSTEM, talk("s: S", "u: Q", "a: A"), r"leaves out the text of a system turn \(message 1\)"),
        (CHATML, CALLING, "leaves out the tool that message 2 calls"),
        (CHATML, talk("u: Q", "a: A", tools=(TOOL,)), "leaves out the definition of the tool add"),
        (UPPERCASE, talk("u: Q", "a: see"), "depending on what is said"),
        (shipped("gemma"), talk("u: Q", "a: A", "a: B"), "refuses this conversation"),
        (shipped("phi3").replace("'tool'", "'x'"), talk("u: Q", "a: A", "t: 6", "a: B"), "a tool turn"),
    ],
    ids=[
        "cut thought",
        "forgotten thought",
        "no place for reasoning",
        "system",
        "call",
        "tools",
        "rewrites",
        "order",
        "tool",
    ],
)
def test_what_a_template_does_not_write_is_refused(
    template: str, conversation: Conversation, says: str, make: MakeTokenizer
) -> None:
    with pytest.raises(DataError, match=says) as error:
        learned(conversation, make(template))
    assert error.value.cause.startswith("x.jsonl:3: ") and error.value.remedy


def test_reasoning_is_learned_where_the_template_knows_it(make: MakeTokenizer) -> None:
    messages = (Message("user", "Q"), Message("assistant", "A", reasoning="I think."))
    conversation = Conversation(messages, "x.jsonl:3")
    assert learned(conversation, make(KNOWS_THOUGHTS)) == ["<think>I think.</think>A<|im_end|>"]
    assert learned(conversation, make(shipped("qwen3"))) == ["<think>\nI think.\n</think>\n\nA<|im_end|>\n"]
    (said,) = learned(conversation, make(shipped("gptoss")))
    assert "<|channel|>analysis<|message|>I think." in said and said.endswith("A<|return|>")
    earlier = Conversation((*messages, Message("user", "R"), Message("assistant", "B", reasoning="So.")), "x.jsonl:3")
    assert [text.count("think.") for text in learned(earlier, make(shipped("qwen3")))] == [1, 0]


def words_only(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that knows words and drops all whitespace."""
    words = ["system", "user", "assistant", "Be", "kind", ".", "Q", "A", "B", "C", ":", "ASSISTANT", "USER"]
    specials = ["<|im_start|>", "<|im_end|>", "[UNK]"]
    backend = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(specials + words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", unk_token="[UNK]", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = template
    return tokenizer


MARKED_TO_THE_LINE_BREAK = HEADER_MARKED.replace(
    "{% generation %}<|im_start|>assistant\n", "<|im_start|>assistant\n{% generation %}"
)


@pytest.mark.parametrize("template", [MARKED_TO_THE_LINE_BREAK, HEADER_MARKED, CHATML])
def test_a_tokenizer_that_drops_whitespace(template: str) -> None:
    tokenizer = words_only(template)
    conversation = talk("u: Q", "a: A", "u: Q", "a: B")
    (example,) = tokenise([conversation], tokenizer, max_length=100, too_long="cut").examples
    said = tokenizer.convert_ids_to_tokens(example.input_ids[example.counted].tolist())
    assert said == ["A", "<|im_end|>", "B", "<|im_end|>"]


def test_characters_that_the_tokenizer_has_no_token_for() -> None:
    with pytest.raises(DataError, match=r"x.jsonl:3: .*no token for some of what the assistant says.*\[UNK\]"):
        learned(talk("u: Q", "a: A 🙂"), words_only(CHATML))
    assert learned(talk("u: 🙂", "a: A"), words_only(CHATML))  # what does not count may be unknown


def test_an_answer_and_its_header_in_one_token(make_tokenizer: MakeTokenizer) -> None:
    header = "{{ ' cap' if m['role'] == 'assistant' else 'user ' }}"
    tokenizer = make_tokenizer("{% for m in messages %}" + header + "{{ m['content'] }}{% endfor %}")
    assert tokenizer.tokenize(" capital") == ["Ġcapital"]
    # Two tokens where the model answers, and so here.
    assert learned(talk("u: Q", "a: ital"), tokenizer) == ["ital"]


def test_a_completion_that_is_one_token_with_its_prompt(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(None)
    messages = (Message("user", "The cap"), Message("assistant", "ital"))
    assert learned(Conversation(messages, "x:1", kind="completion"), tokenizer) == ["ital<|im_end|>"]


DATED = "{{ strftime_now('%d %B %Y') }}\n" + CHATML


def test_the_date_is_the_one_that_is_given(make: MakeTokenizer) -> None:
    def text(date: str) -> str:
        (example,) = tokenise([talk("u: Q", "a: A")], tokenizer, max_length=1000, too_long="cut", date=date).examples
        return str(tokenizer.decode(example.input_ids))

    tokenizer = make(DATED)
    assert text("2024-07-05").startswith("05 July 2024\n")
    assert text("2024-07-06").startswith("06 July 2024\n")
    assert tokenizer.chat_template == DATED  # what is exported goes by the day on which it is used
    tokenizer = make(shipped("llama3_2"))
    assert "Today Date: 05 Jul 2024" in text("2024-07-05")
