"""Versions of known chat templates that are made for training.

TRL has them for the templates of common models: they say where the assistant speaks, by `{% generation %}` markers,
and keep what it thought in every turn, where the model's own template drops it from all but the last.
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
    """The chat template that a tokenizer would use.

    Args:
        tokenizer: A tokenizer with a chat template.
        for_tools: Whether the conversation comes with tools; some models have a template of their own for that.

    Returns:
        Its text.

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
    """Finds a version of the tokenizer's chat template that marks what the assistant says.

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
    """TRL's training versions by the template that they stand for.

    They are read from its files, since importing it takes seconds.
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
