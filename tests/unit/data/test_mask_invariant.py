"""For random conversations, real chat templates and three kinds of tokenizer: what counts is what the assistant says.

The check knows nothing of how the mask is made. It is given every user's text in a form that no template writes, and
looks only at token ids and mask, decoded.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from chat_templates import shipped
from sophia_galore.data.conversation import Conversation, Message, Role
from sophia_galore.data.example import Example
from sophia_galore.data.render import tokenise
from sophia_galore.errors import DataError

# The template, and the token that ends an answer in it.
TEMPLATES = {
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3_2": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
    "phi3": "<|end|>",
}
SPECIALS = [
    *("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"),
]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LINES = [
    "system user assistant model think It was you. What is the sum of one and two? Cutting Knowledge Date: 26 Jul 2024",
    # Each letter within a word as well.
    *(LETTERS, LETTERS[::-1], "0123456789", "9876543210"),
]
KINDS = ("bytes", "pieces", "words")


@cache
def tokenizer_of(kind: str, template: str) -> PreTrainedTokenizerFast:
    backend: Any
    trainer: Any
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "pieces":  # as sentencepiece has it: spaces are a character, and unknown ones become bytes
        byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIALS + byte_tokens, show_progress=False)
    else:  # as BERT has it: lower case, and whitespace is gone
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIALS, show_progress=False)
    backend.train_from_iterator(LINES + [chr(code) for code in range(33, 127)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIALS[3:],
    )
    fast.chat_template = shipped(template)
    return fast


# What people's answers are made of, and what might be taken for something else.
WORDS = [
    *(
        "A",
        "assistant",
        "model",
        "user",
        "ok",
        "It was.",
        "system",
        "ASSISTANT:",
        "one and two",
        "ü🙂漢",
        "é",
        "e\u0301",
        "\u200d",
    ),
    *("<|im_end|>", "<|im_start|>assistant\n", "<end_of_turn>", "<|eot_id|>", "</s>", "{{ messages }}", "{% endfor %}"),
    *("Zq0x0q", "\n", "\n\n", "  ", "\t", "</think>", "<think>", "\r\n", "▁", "##", "[INST]", "'", '"', "\\n"),
]


def texts(*, ascii_only: bool) -> st.SearchStrategy[str]:
    letters = st.characters(min_codepoint=32, max_codepoint=126) if ascii_only else st.characters(codec="utf-8")
    words = [word for word in WORDS if word.isascii() or not ascii_only]
    parts = st.lists(st.one_of(st.sampled_from(words), st.text(letters, max_size=4)), min_size=1, max_size=6)
    return parts.map(" ".join) | parts.map("".join)


@st.composite
def conversations(draw: st.DrawFn, *, ascii_only: bool) -> Conversation:
    text = texts(ascii_only=ascii_only)
    roles: list[Role] = []
    if draw(st.booleans()):
        roles.append("system")
    for _ in range(draw(st.integers(1, 3))):
        roles += ["user", "assistant"]
    if draw(st.integers(0, 5)) == 0:  # an order that some templates refuse
        roles.insert(draw(st.integers(0, len(roles))), "assistant")
    messages = [
        # What others say is in letters that no answer has, so that none of it can be taken for an answer's.
        Message(
            role,
            draw(text.filter(str.strip)) if role == "assistant" else draw(text) + f" ѫѫ{number}ѫѫ ",
            counts=bool(draw(st.integers(0, 4))),
        )
        for number, role in enumerate(roles)
    ]
    return Conversation(tuple(messages), "x:1")


def bare(text: str) -> str:
    return re.sub(r"[\s▁]+", "", text)


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def runs(example: Example) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for token, counts in zip(example.input_ids.tolist(), example.counted.tolist(), strict=True):
        if counts:
            found[-1].append(token)
        elif found[-1]:
            found.append([])
    return [run for run in found if run]


def as_written(tokenizer: Any, text: str) -> str:
    """A text as this tokenizer can write it: some lower the case, drop characters, or have none for a space."""
    return bare(decoded(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_counts_is_what_the_assistant_says(name: str, kind: str) -> None:
    tokenizer, end = tokenizer_of(kind, name), TEMPLATES[name]
    seen = {"kept": 0, "refused": 0}

    @settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))
    # Answers in letters that this tokenizer has no token for are refused; `test_mask_cases.py` sees to that.
    @given(conversations(ascii_only=kind == "words"))
    def check(conversation: Conversation) -> None:
        answers = [message for message in conversation.messages if message.role == "assistant"]
        assume(any(message.counts for message in answers))
        try:
            (example,) = tokenise(
                [conversation], tokenizer, max_length=10**6, too_long="cut", date="2024-07-26"
            ).examples
        except DataError as error:
            assert error.cause.startswith("x:1: ") and error.remedy
            seen["refused"] += 1
            return
        seen["kept"] += 1
        learned = [bare(decoded(tokenizer, run)) for run in runs(example)]
        counting = [message for message in answers if message.counts]
        # Two turns in a row may touch each other.
        assert 1 <= len(learned) <= len(counting)
        whole = "".join(learned)
        place = 0
        for message in counting:
            for part in re.split(r"</?think>", message.content):  # which a template may write anew, or move
                wanted = as_written(tokenizer, part.strip())
                assert wanted in whole[place:], (wanted, learned)
                place = whole.index(wanted, place) + len(wanted)
            assert whole.startswith(end, place) or end in whole[place:], (end, learned)
            place = whole.index(end, place) + len(end)
        assert "ѫ" not in whole
        # Besides answers there are ends, and the marks of thoughts: no header, nothing of others.
        rest = whole
        for part in sorted((p for m in counting for p in re.split(r"</?think>", m.content)), key=len, reverse=True):
            rest = rest.replace(as_written(tokenizer, part.strip()), "", 1)
        assert re.sub(r"</?think>|</s>|" + re.escape(end), "", rest) == "", (rest, learned)

    check()
    assert seen["kept"] >= 8, seen
