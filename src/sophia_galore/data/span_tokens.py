"""Convert counted ranges of characters to counted tokens, and check them by decoding."""

from __future__ import annotations

import bisect
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sophia_galore.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Masked = tuple[list[int], list[bool]]
"""Token ids and, for each, whether it counts."""

Spans = Sequence[tuple[int, int]]
Offsets = list[tuple[int, int]]
# Many tokenizers write a space as U+2581.
_SPACE = re.compile(r"[\s▁]+")


def span_tokens(text: str, turns: Sequence[Spans], tokenizer: PreTrainedTokenizerBase, *, where: str) -> Masked:
    """Tokenise a text once and count the tokens of given ranges of characters.

    A token that crosses the end of a range counts if only its spaces are outside: if " Yes" is one token and its space
    belongs to the prompt, the answer would otherwise be lost. If more of it is outside, the text is split there and
    tokenised in pieces, as in generation.

    Args:
        text: The complete text, with special tokens written as text.
        turns: For each turn, half-open ranges of characters in order.
        tokenizer: A fast tokenizer.
        where: Location of the record, for error messages.

    Returns:
        Token ids and mask. The decoded tokens of each range equal its text except for whitespace.

    Raises:
        DataError: The tokenizer can't represent the counted text.
    """
    ids, offsets = _encode(tokenizer, text)
    cuts = sorted({cut for spans in turns for span in spans for cut in _cuts(text, offsets, span)})
    if cuts:
        ids, offsets = _in_pieces(text, ids, cuts, tokenizer, where)
    counted = [False] * len(ids)
    for spans in turns:
        for span in spans:
            inside = _inside(text, offsets, span)
            for place in inside:
                counted[place] = True
            _require_same(text[span[0] : span[1]], [ids[place] for place in inside], tokenizer, where)
    return ids, counted


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], Offsets]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), [(int(begin), int(end)) for begin, end in encoded["offset_mapping"]]


def _inside(text: str, offsets: Offsets, span: tuple[int, int]) -> list[int]:
    """Return the tokens in a range, including those of which only spaces are outside."""
    first = bisect.bisect_right(offsets, span[0], key=lambda offset: offset[1])
    found = []
    for place in range(first, len(offsets)):
        begin, end = offsets[place]
        if begin >= span[1]:
            break
        is_within = begin >= span[0] and end <= span[1]
        if end > span[0] and (is_within or not _outside(text, (begin, end), span)):
            found.append(place)
    return found


def _outside(text: str, token: tuple[int, int], span: tuple[int, int]) -> bool:
    """Return whether a token has text other than whitespace outside a range."""
    return bool((text[token[0] : max(span[0], token[0])] + text[min(span[1], token[1]) : token[1]]).strip())


def _cuts(text: str, offsets: Offsets, span: tuple[int, int]) -> list[int]:
    """Return the ends of a range that fall inside a token with counted and other text."""
    cuts = []
    first = bisect.bisect_right(offsets, span[0], key=lambda offset: offset[1])
    for edge in span:
        for place in range(first, len(offsets)):
            begin, end = offsets[place]
            if begin >= edge:
                break
            inner = text[max(begin, span[0]) : min(end, span[1])]
            if end > edge and inner.strip() and _outside(text, (begin, end), span):
                cuts.append(edge)
                break
    return cuts


def _in_pieces(
    text: str, whole: list[int], cuts: Sequence[int], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], Offsets]:
    ids: list[int] = []
    offsets: Offsets = []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece, places = _encode(tokenizer, text[begin:end])
        ids += piece
        offsets += [(first + begin, last + begin) for first, last in places]
    if _decode(tokenizer, ids) != _decode(tokenizer, whole):
        raise DataError(
            f"{where}: the tokenizer writes the beginning or the end of an answer and the text next to it as one "
            "token.",
            "Begin the answer with a space or a line break, or use a chat template that sets turns apart.",
        )
    return ids, offsets


def _require_same(said: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse tokens whose decoded text is not the counted text."""
    if _without_spaces(said) != _without_spaces(_decode(tokenizer, ids)):
        # Some tokenizers lower the case or drop characters: then tokenising this text alone gives the same.
        alone, _ = _encode(tokenizer, said)
        unknown = tokenizer.unk_token_id
        if unknown is not None and unknown in ids and str(tokenizer.unk_token) not in said:
            raise DataError(
                f"{where}: the model's tokenizer has no token for some of what the assistant says, and would learn "
                f"{tokenizer.unk_token} in its place.",
                "Remove these characters, or use a model whose tokenizer knows all bytes.",
            )
        if not ids or _without_spaces(_decode(tokenizer, alone)) != _without_spaces(_decode(tokenizer, ids)):
            raise DataError(
                f"{where}: the tokens that would count, decoded, are not what the assistant says.",
                "The tokenizer reports wrong character offsets; use another model, or remove the record.",
            )


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _without_spaces(text: str) -> str:
    """Return a text without spaces, in Unicode normal form C."""
    return _SPACE.sub("", unicodedata.normalize("NFC", text))
