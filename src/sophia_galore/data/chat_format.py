"""Choose how a run renders conversations: the chat template, the date it sees, and the tokens that end a turn.

This is decided once, before data are read, and stored in the plan: a run resumed on another day renders the same text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sophia_galore.data.chat_mask import ChatMask
from sophia_galore.data.template_date import asks_for_date, today
from sophia_galore.data.training_template import own_template, training_template
from sophia_galore.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WELL_KNOWN = ("chatml", "llama3", "gemma", "alpaca")
# Such as <|im_start|>, <start_of_turn> and [INST].
_MARKS = re.compile(r"<\|[^|<>\s{}]+\|>|<[a-z]+_of_[a-z]+>|\[/?[A-Z_]{4,}\]")


@dataclass(frozen=True)
class ChatFormat:
    """How conversations are rendered.

    Args:
        template: The chat template that replaces the tokenizer's; None: it is not replaced.
        date: The date that the template sees, as `2026-11-28`; "": it does not use the date.
        end_ids: The tokens that end a turn and are not among the model's stop tokens.
    """

    template: str | None = None
    date: str = ""
    end_ids: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON data, for `plan.json`."""
        return asdict(self) | {"end_ids": list(self.end_ids)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ChatFormat:
        """Restore what `to_json` returned."""
        return cls(values["template"], values["date"], tuple(values["end_ids"]))


def choose_chat_format(
    tokenizer: PreTrainedTokenizerBase, template: str | None, *, date: str | None, stop_ids: Sequence[int]
) -> ChatFormat:
    """Choose how a run renders conversations.

    Args:
        tokenizer: The model's tokenizer; a given template is set on it.
        template: `model.chat_template`: a well-known name or a file; None: the tokenizer's template.
        date: The date that the template sees; None: today.
        stop_ids: The model's stop tokens.

    Raises:
        ConfigError: The template can't be read, or uses tokens that the tokenizer does not have.
    """
    text = None if template is None else read_template(template)
    if text is not None:
        _refuse_missing_tokens(tokenizer, text, str(template))
        tokenizer.chat_template = text
    if not tokenizer.chat_template:
        return ChatFormat()
    try:
        used = training_template(tokenizer) or own_template(tokenizer)
        day = (date or today()) if asks_for_date(used) else ""
        ends = ChatMask(tokenizer, date=day).frame.end_ids(tokenizer)
    except (DataError, ModelError):
        # Reported when a conversation is rendered; raw text needs no template.
        return ChatFormat(text)
    return ChatFormat(text, day, tuple(end for end in ends if end not in stop_ids))


def read_template(name: str) -> str:
    """Return the text of a chat template.

    Args:
        name: One of `WELL_KNOWN`, or a file's path.

    Raises:
        ConfigError: It is neither, or the file is not a chat template in UTF-8.
    """
    if name.lower() in WELL_KNOWN:
        known = files("sophia_galore.data") / "chat_templates" / f"{name.lower()}.jinja"
        return known.read_text(encoding="utf-8")
    remedy = f"Name a file with a Jinja template, or one of {', '.join(WELL_KNOWN)}."
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not UTF-8 text"
        raise ConfigError(f"model.chat_template={name} can't be read: {reason}.", remedy) from error
    if "messages" not in text:
        raise ConfigError(f"model.chat_template={name} is not a chat template: it does not contain `messages`.", remedy)
    return text


def _refuse_missing_tokens(tokenizer: PreTrainedTokenizerBase, template: str, name: str) -> None:
    marks = dict.fromkeys(_MARKS.findall(template))
    missing = [
        mark for mark in marks if len(tokenizer(mark, add_special_tokens=False, verbose=False)["input_ids"]) != 1
    ]
    if missing:
        raise ConfigError(
            f"model.chat_template={name} marks turns with {', '.join(missing)}, which {'are' if missing[1:] else 'is'} "
            "no token of this model's tokenizer.",
            "Choose a template whose marks the model knows; `alpaca` needs none.",
        )
    if re.search(r"\beos_token\b", template) and tokenizer.eos_token is None:
        raise ConfigError(
            f"model.chat_template={name} ends turns with the end-of-text token, but this model's tokenizer names none.",
            "Add eos_token to the model's tokenizer_config.json, or choose a template that does without.",
        )
