from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from chat_templates import shipped
from sophia_galore.data.conversation import Conversation, Message
from sophia_galore.data.render import Example, describe, tokenise
from sophia_galore.data.training_template import training_template
from sophia_galore.errors import DataError, ModelError

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
HEAD = "<|im_start|>system\nBe kind.<|im_end|>\n"
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
EMPTY_MARKS = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}{% endgeneration %}"


def chat(*contents: str, num_context: int = 0) -> Conversation:
    roles = ("user", "assistant")
    turns = (Message(roles[i % 2], content, counts=i >= num_context) for i, content in enumerate(contents))
    return Conversation(tuple(turns), "x.jsonl:3")


def one(conversation: Conversation, tokenizer: Any, max_length: int = 10_000) -> Example:
    (example,) = tokenise([conversation], tokenizer, max_length=max_length, too_long="cut").examples
    return example


def segments(conversation: Conversation, tokenizer: Any) -> list[tuple[str, bool]]:
    return describe(one(conversation, tokenizer), tokenizer)


def counted_text(conversation: Conversation, tokenizer: Any) -> list[str]:
    return [text for text, counted in segments(conversation, tokenizer) if counted]


def test_only_the_answer_and_its_end_of_turn_count(tokenizer: PreTrainedTokenizerFast) -> None:
    assert training_template(tokenizer) is None  # no markers: the general way
    assert segments(chat("Q?", "Paris."), tokenizer) == [
        (HEAD + "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Paris.<|im_end|>", True),
        ("\n", False),
    ]


def test_a_span_that_ends_in_a_character_of_many_tokens(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(MARKED.replace("<|im_end|>{% endgen", "{% endgen"))
    assert len(tokenizer.tokenize("🙂")) == 4
    assert counted_text(chat("a", "so 🙂"), tokenizer) == ["so 🙂"]


def test_every_assistant_turn_counts_unless_it_is_context(tokenizer: PreTrainedTokenizerFast) -> None:
    assert counted_text(chat("a", "B", "c", "D\n"), tokenizer) == ["B<|im_end|>", "D\n<|im_end|>"]
    assert counted_text(chat("a", "B", "c", "D", num_context=3), tokenizer) == ["D<|im_end|>"]


def test_a_template_with_markers_is_taken_as_it_is(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(MARKED)
    assert training_template(tokenizer) == MARKED
    assert counted_text(chat("a", "B", "c", "D"), tokenizer) == ["B<|im_end|>", "D<|im_end|>"]
    assert counted_text(chat("a", "B", "c", "D", num_context=3), tokenizer) == ["D<|im_end|>"]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3"])
def test_templates_that_trl_knows_get_its_markers(make_tokenizer: MakeTokenizer, name: str) -> None:
    tokenizer = make_tokenizer(shipped(name))
    assert training_template(tokenizer) == shipped(f"{name}_training")
    end = "<|eot_id|>" if name == "llama3" else "<|im_end|>"
    texts = counted_text(chat("question one", "answer one", "question two", "answer two"), tokenizer)
    assert len(texts) == 2
    for text, answer in zip(texts, ["answer one", "answer two"], strict=True):
        assert text.rstrip().endswith(answer + end)
        assert "question" not in text and "user" not in text


def test_the_two_ways_agree(make_tokenizer: MakeTokenizer) -> None:
    plain = make_tokenizer(MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    plain.chat_template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    conversation = chat("a", "Paris is it.", "\n\nc ", "ü🙂!")
    general, marked = one(conversation, plain), one(conversation, make_tokenizer(MARKED))
    assert torch.equal(general.input_ids, marked.input_ids)
    assert torch.equal(general.counted, marked.counted)


plain_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(plain_text, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_the_counted_text_is_what_the_assistant_says(tokenizer: PreTrainedTokenizerFast, contents: list[str]) -> None:
    conversation = chat(*contents)
    example = one(conversation, tokenizer)
    runs = describe(example, tokenizer)
    ids = tokenizer.apply_chat_template(
        [message.for_template() for message in conversation.messages], return_dict=False
    )
    assert example.input_ids.tolist() == ids
    assert not example.counted[0]
    assert "".join(text for text, _ in runs) == tokenizer.decode(ids)
    said = [text for text, counted in runs if counted]
    answers = contents[1::2]
    assert len(said) == len(answers)
    for text, answer in zip(said, answers, strict=True):
        # Where whitespace merges with the header's line break into one token, that token is counted too.
        assert text.endswith("<|im_end|>") and text.removesuffix("<|im_end|>").strip() == answer.strip()


def test_a_template_without_a_generation_prompt_does_not_count_the_header(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}\n\n{% endfor %}")
    # Without an end-of-turn token the empty line is what ends a turn, so it is learned.
    assert counted_text(chat("a", "B", "c", "D"), tokenizer) == ["B\n\n", "D\n\n"]


@pytest.mark.parametrize(
    "template", [EMPTY_MARKS, "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"]
)
def test_what_a_template_writes_elsewhere_does_not_matter(make_tokenizer: MakeTokenizer, template: str) -> None:
    assert counted_text(chat("a", "B"), make_tokenizer(template)) == ["B"]


def test_completions_as_strings(make_tokenizer: MakeTokenizer, tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = Conversation(
        (Message("user", "The capital is"), Message("assistant", " Paris")), "x:1", kind="completion"
    )
    assert counted_text(conversation, tokenizer) == [" Paris<|im_end|>"]
    bare = make_tokenizer(None)
    assert segments(conversation, bare) == [("The capital is", False), (" Paris<|im_end|>", True)]


def test_a_completion_that_merges_with_the_prompt_still_counts(make_tokenizer: MakeTokenizer) -> None:
    bare = make_tokenizer(None)
    turns = (Message("user", "The capital of "), Message("assistant", "France"))
    conversation = Conversation(turns, "x:1", kind="completion")
    assert bare.tokenize(" France") == ["ĠFrance"]
    assert counted_text(conversation, bare) == [" France<|im_end|>"]


def test_text_counts_as_a_whole_and_is_ended_once(
    make_tokenizer: MakeTokenizer, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = Conversation((), "x:1", kind="text", text="Paris is it.")
    example = one(text, tokenizer)
    assert example.counted.tolist() == [False] + [True] * (example.num_tokens - 1)  # nothing predicts the first token
    assert tokenizer.decode(example.input_ids) == "Paris is it.<|im_end|>"
    ended = Conversation((), "x:1", kind="text", text="Paris is it.<|im_end|>")
    assert torch.equal(one(ended, tokenizer).input_ids, example.input_ids)


@pytest.mark.parametrize("text", ["Paris", "<s>Paris"])
def test_bos_is_there_once(make_tokenizer: MakeTokenizer, text: str) -> None:
    tokenizer = make_tokenizer(None, bos=True)
    example = one(Conversation((), "x:1", kind="text", text=text), tokenizer)
    assert tokenizer.decode(example.input_ids) == "<s>Paris<|im_end|>"
    assert describe(example, tokenizer) == [("<s>", False), ("Paris<|im_end|>", True)]


def test_bos_in_a_chat_comes_from_the_template_alone(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("{{ bos_token }}" + MARKED, bos=True)
    example = one(chat("a", "B"), tokenizer)
    assert example.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    unmarked = make_tokenizer(None, bos=True)
    unmarked.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert one(chat("a", "B"), unmarked).input_ids.tolist().count(tokenizer.bos_token_id) == 1


def test_cutting_and_dropping(tokenizer: PreTrainedTokenizerFast) -> None:
    short, long_answer, long_question = chat("a", "B"), chat("a", "word " * 200), chat("word " * 200, "B")
    length = one(short, tokenizer).num_tokens
    all_three = [short, long_answer, long_question]
    cut = tokenise(all_three, tokenizer, max_length=length, too_long="cut")
    assert [example.num_tokens for example in cut.examples] == [length, length]
    assert (cut.num_cut, cut.num_dropped, cut.num_cut_empty) == (1, 0, 1)
    whole = one(long_answer, tokenizer)
    assert torch.equal(cut.examples[1].input_ids, whole.input_ids[:length])
    assert torch.equal(cut.examples[1].counted, whole.counted[:length])
    dropped = tokenise(all_three, tokenizer, max_length=length, too_long="drop")
    assert (len(dropped.examples), dropped.num_cut, dropped.num_dropped, dropped.num_cut_empty) == (1, 0, 2, 0)


def test_examples_are_lean(tokenizer: PreTrainedTokenizerFast) -> None:
    example = one(chat("a", "word " * 500), tokenizer, max_length=50)
    assert (example.input_ids.dtype, example.counted.dtype) == (torch.int32, torch.bool)
    assert example.input_ids.untyped_storage().nbytes() == 4 * 50


def test_the_first_token_never_counts() -> None:
    example = Example.of([5, 6], [True, False], "x:1")
    assert example.counted.tolist() == [False, False] and example.num_counted == 0


@pytest.mark.parametrize(
    ("template", "conversation", "says"),
    [
        (None, chat("a", "B"), "no chat template"),
        ("{% for m in messages %}{{ m['role'] }}\n{% endfor %}", chat("a", "B"), "leaves out the text"),
        (shipped("smolvlm"), chat("a", "B"), "leaves out the text"),
        (
            "{% if messages[0]['content'] == 'a' %}{{ raise_exception('roles must alternate') }}{% endif %}",
            chat("a", "B"),
            "roles must alternate",
        ),
        (
            "{% for m in messages %}{{ m['content'] | length }}{{ m['content'] }}{% endfor %}",
            chat("a", "B"),
            "differently",
        ),
    ],
)
def test_what_can_not_be_masked_is_refused_by_its_place(
    make_tokenizer: MakeTokenizer, template: str | None, conversation: Conversation, says: str
) -> None:
    with pytest.raises(DataError, match=says) as error:
        one(conversation, make_tokenizer(template))
    assert "x.jsonl:3" in error.value.cause
    assert error.value.remedy


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('not for people') }}", "not for people"),
        ("{% for m in messages %}{{ m['content'] }}", "endfor"),
        ("{{ messages[0]['content'] + 1 }}", "str"),
    ],
    ids=["refuses everything", "no jinja", "not even a template's error"],
)
def test_a_template_that_fails_on_every_chat_is_the_models_fault(
    make_tokenizer: MakeTokenizer, template: str, says: str
) -> None:
    with pytest.raises(ModelError, match=f"chat template fails even on one question.*{says}") as error:
        one(chat("a", "B"), make_tokenizer(template))
    assert "x.jsonl" not in error.value.cause and "chat_template" in error.value.remedy


def test_a_chat_that_the_assistant_begins(make_tokenizer: MakeTokenizer, tokenizer: PreTrainedTokenizerFast) -> None:
    begun = Conversation((Message("assistant", "A"), Message("user", "b"), Message("assistant", "C")), "x.jsonl:3")
    assert counted_text(begun, tokenizer) == ["A<|im_end|>", "C<|im_end|>"]
    assert counted_text(begun, make_tokenizer(MARKED)) == ["A<|im_end|>", "C<|im_end|>"]


def test_a_text_of_one_token_without_an_end_has_no_target(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"x:1.*without a counted token"):
        one(Conversation((), "x:1", kind="text", text="x"), tokenizer)
