"""From a chat to token ids and the mask of what the assistant says.

Two ways. A template with `{% generation %}` markers says itself where the assistant speaks; TRL
has such versions of the templates of common models. For any other template the markers are
found by rendering: what `messages[:i+1]` has beyond `messages[:i]` and the generation prompt is
what the assistant says in turn i.

Either way the whole text is tokenised once, so the tokens are those that the model would see.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sophia_galore.data.conversation import Conversation, Message
from sophia_galore.errors import DataError, ModelError, short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Masked = tuple[list[int], list[bool]]
"""Token ids and, for each, whether it counts."""

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
OTHER_TEMPLATE = "Use a tokenizer whose chat template has {% generation %} markers, or data of the format `text`."


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Finds a version of the tokenizer's chat template that marks what the assistant says.

    Args:
        tokenizer: A tokenizer with a chat template.

    Returns:
        A template with `{% generation %}` markers, or None if there is no such version.

    Raises:
        DataError: There are several templates and no default.
    """
    try:
        own = str(tokenizer.get_chat_template())
    except ValueError as error:
        raise DataError(
            "The model's tokenizer has several chat templates and none of them is the default.",
            "Name one of them `default` in the model's tokenizer files.",
        ) from error
    try:
        from trl.chat_template_utils import get_training_chat_template  # here, since importing it takes seconds

        return get_training_chat_template(tokenizer) or own
    # ModuleNotFoundError: TRL is not installed. ValueError: TRL knows no version, or it has markers and fails TRL's
    # check for calling tools. Anything else comes
    # from the template, which TRL tries out; it will fail again where a record can be named.
    except Exception:
        return own if MARKERS.search(own) else None


def chat_tokens(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, template: str | None) -> Masked:
    """Renders and tokenises a chat, counting the assistant's tokens.

    Args:
        conversation: A conversation with messages.
        tokenizer: A fast tokenizer with a chat template.
        template: What `training_template` gave.

    Returns:
        Token ids and mask. Answers within the conversation's context don't count.

    Raises:
        DataError: The template refuses the conversation, or the turns can't be told apart.
        ModelError: The template fails on the simplest chat too.
    """
    whole = str(_apply(conversation, conversation.messages, tokenizer, chat_template=template, tokenize=False))
    _require_answers(conversation, whole)
    if template is None:
        return _from_spans(conversation, whole, tokenizer)
    encoded: Any = _apply(
        conversation,
        conversation.messages,
        tokenizer,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False, "return_offsets_mapping": True},
    )
    ids, counted = list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
    offsets = encoded["offset_mapping"]
    for i in range(1, len(ids)):
        # transformers ends a span at the first token of its last character, which may be four tokens long.
        counted[i] |= counted[i - 1] and offsets[i] == offsets[i - 1] and offsets[i][0] < offsets[i][1]
    if num_context := _num_context(conversation):
        context = conversation.messages[:num_context]
        head = _apply(conversation, context, tokenizer, chat_template=template, tokenize=True, return_dict=False)
        if ids[: len(head)] != list(head):
            raise _unstable(conversation, num_context)
        counted[: len(head)] = [False] * len(head)
    return ids, counted


def span_tokens(text: str, spans: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase) -> Masked:
    """Tokenises a text once and counts the tokens that touch given character spans.

    Touching is enough: where " Yes" is one token whose space belongs to the prompt, the answer
    would otherwise be lost.

    Args:
        text: The complete text; special tokens stand in it as text.
        spans: Half-open ranges of characters.
        tokenizer: A fast tokenizer.

    Returns:
        Token ids and mask.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    counted = [
        any(begin < span_end and end > span_begin for span_begin, span_end in spans)
        for begin, end in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), counted


def _num_context(conversation: Conversation) -> int:
    """The number of messages at the beginning whose answers don't count."""
    passed = [
        i for i, message in enumerate(conversation.messages) if message.role == "assistant" and not message.counts
    ]
    return passed[-1] + 1 if passed else 0


def _require_answers(conversation: Conversation, whole: str) -> None:
    """Refuses templates that leave an answer's text out, as those of some vision models do with plain strings."""
    for message in conversation.messages[_num_context(conversation) :]:
        # The last line only: templates may rewrite what stands before it (thinking parts).
        if message.role == "assistant" and message.content.strip().splitlines()[-1].strip() not in whole:
            raise DataError(
                f"{conversation.where}: the model's chat template leaves out the text of an assistant turn.",
                "Use the tokenizer of a text model; this template may expect another kind of messages.",
            )


def _from_spans(conversation: Conversation, whole: str, tokenizer: PreTrainedTokenizerBase) -> Masked:
    messages = conversation.messages
    spans = []
    for index, message in enumerate(messages):
        if message.role != "assistant" or not message.counts:
            continue
        if index == 0:
            raise DataError(
                f"{conversation.where}: the first turn is the assistant's, and this model's chat template does not "
                "show where it begins.",
                "Let the conversation begin with a user or system turn.",
            )
        prompt = str(_apply(conversation, messages[:index], tokenizer, tokenize=False, add_generation_prompt=True))
        turn = str(_apply(conversation, messages[: index + 1], tokenizer, tokenize=False))
        if not (turn.startswith(prompt) and whole.startswith(turn)):
            raise _unstable(conversation, index)
        begin = len(prompt)
        if prompt == _apply(conversation, messages[:index], tokenizer, tokenize=False):
            # The template has no generation prompt: the header of the turn is not the assistant's to say.
            begin += max(turn[begin:].find(message.content.strip()), 0)
        spans.append((begin, _end_of_turn(turn, message.content)))
    return span_tokens(whole, spans, tokenizer)


def _end_of_turn(turn: str, content: str) -> int:
    said = turn.rstrip()
    # Whitespace after the end-of-turn token only separates turns; where there is no such token, it is what ends one.
    return len(turn) if said.endswith(content.rstrip()) else len(said)


def _apply(
    conversation: Conversation, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> Any:
    from jinja2 import TemplateError

    chat = [message.for_template() for message in messages]
    try:
        return tokenizer.apply_chat_template(chat, **options)
    except Exception as error:  # a template is a program: it may fail in any way
        _refuse_broken_template(tokenizer, options.get("chat_template"))
        if not isinstance(error, TemplateError):
            raise
        raise DataError(
            f"{conversation.where}: the model's chat template refuses this conversation: {error}.",
            "Change the order or the roles of its turns, or remove the record.",
        ) from error


def _refuse_broken_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Where the simplest chat fails too, no record is to blame."""
    simplest = [{"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."}]
    try:
        tokenizer.apply_chat_template(simplest, chat_template=template, tokenize=False)
    except Exception as error:
        raise ModelError(
            f"The model's chat template fails even on one question and its answer: {short(error)}.",
            "Repair chat_template in the model's tokenizer files, or use data of the format `text`.",
        ) from error


def _unstable(conversation: Conversation, index: int) -> DataError:
    return DataError(
        f"{conversation.where}: this model's chat template writes the turns before message {index + 1} differently "
        "once that message follows, so the assistant's part can't be told apart.",
        OTHER_TEMPLATE,
    )
