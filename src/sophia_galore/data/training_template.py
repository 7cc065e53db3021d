"""Versions of common chat templates for training, from the library TRL.

They mark the assistant's text by `{% generation %}`, and keep the reasoning of every turn; the models' templates keep
only that of the last turn.
"""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sophia_galore.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ENDING = "_training.jinja"


def own_template(tokenizer: PreTrainedTokenizerBase, *, for_tools: bool = False) -> str:
    """Return the text of the chat template that a tokenizer uses.

    Args:
        tokenizer: A tokenizer with a chat template.
        for_tools: Whether the conversation comes with tools; some models have a separate template for that.

    Raises:
        DataError: There are several templates and no default.
    """
    try:
        return str(tokenizer.get_chat_template(tools=[{}] if for_tools else None))
    except ValueError as error:
        raise DataError(
            "The model's tokenizer has several chat templates and none of them is the default.",
            "Name one of them `default` in the model's tokenizer files.",
        ) from error


def training_template(tokenizer: PreTrainedTokenizerBase, *, for_tools: bool = False) -> str | None:
    """Find a version of the tokenizer's chat template that marks the assistant's text.

    Args:
        tokenizer: A tokenizer with a chat template.
        for_tools: Whether the conversation comes with tools.

    Returns:
        A template with `{% generation %}` markers, or None if there is no such version.

    Raises:
        DataError: There are several templates and no default.
    """
    own = own_template(tokenizer, for_tools=for_tools)
    return _versions().get(own) or (own if MARKERS.search(own) else None)


@cache
def _versions() -> dict[str, str]:
    """Return TRL's training versions by original template.

    They are read from TRL's files, since importing it takes seconds.
    """
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        return {}
    folder = Path(found.origin).parent / "chat_templates"
    return {
        own.read_text(encoding="utf-8"): path.read_text(encoding="utf-8")
        for path in sorted(folder.glob(f"*{_ENDING}"))
        if (own := path.with_name(path.name.removesuffix(_ENDING) + ".jinja")).is_file()
    }
