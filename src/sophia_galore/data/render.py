"""Convert conversations to examples: token ids with a loss mask, cut to a maximum length.

The counted tokens are the assistant's text in a chat, the completion after a prompt, or all of a raw text. An example
without counted tokens is refused, since the model would learn nothing from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sophia_galore.data.bad_records import Report, stop_at_once
from sophia_galore.data.chat_mask import ChatMask
from sophia_galore.data.conversation import Conversation
from sophia_galore.data.example import Example, describe
from sophia_galore.data.span_tokens import Masked, span_tokens
from sophia_galore.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Example", "Tokenised", "describe", "tokenise"]


@dataclass(frozen=True)
class Tokenised:
    """Examples, and numbers of examples that were cut or left out.

    Attributes:
        examples: The examples, in the order of the conversations.
        num_cut: Number of these examples that were cut at the end.
        num_dropped: Number of conversations left out because they are too long.
        num_cut_empty: Number of conversations left out because no counted token remained after the cut.
    """

    examples: list[Example]
    num_cut: int
    num_dropped: int
    num_cut_empty: int


def tokenise(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    too_long: Literal["cut", "drop"],
    date: str = "",
    report: Report = stop_at_once,
) -> Tokenised:
    """Render conversations with the tokenizer's chat template, tokenise them, and make the loss mask.

    Args:
        conversations: The conversations.
        tokenizer: A fast tokenizer. Without a chat template, only raw text and string completions are possible.
        max_length: Maximum length of an example in tokens.
        too_long: ``cut`` longer examples at the end, or ``drop`` them.
        date: The date that the chat template sees, as `2026-11-28`; "": the current date.
        report: Called for each conversation that can't be rendered; by default the first error is raised.

    Returns:
        The examples, and the numbers of those cut and left out.

    Raises:
        DataError: The tokenizer is not suitable, or a conversation has no counted token.
    """
    if not tokenizer.is_fast:
        raise DataError(
            "This model's tokenizer is a slow one, which does not say where in the text its tokens stand.",
            "Use a model that comes with a `tokenizer.json`.",
        )
    chats = ChatMask(tokenizer, date=date) if tokenizer.chat_template else None
    examples: list[Example] = []
    num_cut = num_dropped = num_cut_empty = 0
    for conversation in conversations:
        try:
            example = _example(conversation, tokenizer, chats)
        except DataError as error:
            if conversation.kind == "chat" and chats is None:
                raise  # not an error of this record: no chat can be rendered
            report(conversation.where, error)
            continue
        if example.num_tokens <= max_length:
            examples.append(example)
        elif too_long == "drop":
            num_dropped += 1
        elif not (cut := _cut(example, max_length)).num_counted:
            num_cut_empty += 1
        else:
            num_cut += 1
            examples.append(cut)
    return Tokenised(examples, num_cut, num_dropped, num_cut_empty)


def _example(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, chats: ChatMask | None) -> Example:
    if conversation.kind == "text":
        ids, counted = _text(tokenizer, conversation.text)
    elif chats is not None:
        ids, counted = chats.tokens(conversation)
    elif conversation.kind == "completion":
        ids, counted = _completion(conversation, tokenizer)
    else:
        raise DataError(
            f"{conversation.where}: this is a conversation, but the model's tokenizer has no chat template.",
            "Set model.chat_template to one, such as chatml or alpaca; or use an instruction-tuned model, or data of "
            "the format `text` or `prompt_completion` (with strings).",
        )
    example = Example.of(ids, counted, conversation.where)
    if not example.num_counted:
        raise DataError(
            f"{conversation.where}: an example without a counted token: the model would learn nothing from it.",
            "Check that its answer is not empty and that the model's chat template writes out assistant turns.",
        )
    return example


def _text(tokenizer: PreTrainedTokenizerBase, text: str) -> Masked:
    """Tokenise raw text with the tokenizer's special tokens, and end it with the end-of-text token."""
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    # Added tokens have the empty range (0, 0).
    return _ended(tokenizer, list(encoded["input_ids"]), [end > begin for begin, end in encoded["offset_mapping"]])


def _completion(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Masked:
    """Tokenise a prompt and its completion like `_text`; the completion counts."""
    prompt, completion = (message.content for message in conversation.messages)
    text = prompt + completion
    around = list(tokenizer(text, verbose=False)["input_ids"])
    inner = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    ids, counted = span_tokens(text, [[(len(prompt), len(text))]], tokenizer, where=conversation.where)
    begin = next((place for place in range(len(around)) if around[place : place + len(inner)] == inner), 0)
    before, after = around[:begin], around[begin + len(inner) :]
    return _ended(tokenizer, before + ids + after, [False] * len(before) + counted + [False] * len(after))


def _ended(tokenizer: PreTrainedTokenizerBase, ids: list[int], counted: list[bool]) -> Masked:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:  # the text itself begins with a written-out one
        ids, counted = ids[1:], counted[1:]
    if eos is not None:
        if not ids or ids[-1] != eos:
            ids.append(eos)
            counted.append(True)
        counted[-1] = True
    return ids, counted


def _cut(example: Example, max_length: int) -> Example:
    # Cloned, because a view would keep the whole example in memory.
    return Example(example.input_ids[:max_length].clone(), example.counted[:max_length].clone(), example.where)
