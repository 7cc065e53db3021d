"""A corpus of plain text: tokenised once into a file, whose rows are examples.

    data.train: corpus/*.txt ---> <cache>/tokens/<digest>.bin ---> rows of training.max_length tokens

Each file is one text, with the tokenizer's end-of-text token behind it; where that token is written out inside of a
file, it is read as such. The texts follow each other, and rows are cut without regard to where one ends, as is usual in
pre-training. What is left at the end and fills no row is left out.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from sophia_galore.config.schema_data import DataConfig, DataSource
from sophia_galore.data.file_text import ending
from sophia_galore.data.gather import FileRead
from sophia_galore.data.read import READERS, TEXT, find
from sophia_galore.data.token_rows import TokenRows
from sophia_galore.errors import DataError, EnvironmentProblem, short
from sophia_galore.numerics.random import generator
from sophia_galore.records.schema import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "corpus"
"""What a run's records say of the format of such data."""

_OPEN: dict[str, Callable[[Path], IO[bytes]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}  # type: ignore[dict-item]
# Characters that are tokenised together.
_PIECE = 2**20
# Part of the digest: another way to make tokens needs another number.
_VERSION = 1


@dataclass(frozen=True)
class Corpus:
    """The rows of a corpus that a run trains on and is measured on.

    Attributes:
        train: Rows to train on; at least one.
        eval: Rows to measure on; may be empty.
        files: How each file was used.
    """

    train: TokenRows
    eval: TokenRows
    files: tuple[FileRead, ...]


def is_corpus(config: DataConfig) -> bool:
    """Return whether the training data are plain text.

    Args:
        config: The data section of the configuration.

    Raises:
        DataError: Some of it is plain text and some is not; or there are settings that plain text can't have.
    """
    sources = (*config.train_sources, *config.eval_sources)
    plain = [source for source in sources if _files(source)]
    if not plain:
        return False
    if len(plain) < len(sources):
        other = next(source for source in sources if source not in plain)
        raise DataError(
            f"{plain[0].path} is plain text and {other.path} is not: they can't be mixed.",
            'Write each text as a record {"text": ...} of a .jsonl file, or leave one of them out.',
        )
    for source in plain:
        if source.weight != 1 or source.max_examples is not None:
            raise DataError(
                f"{source.path} is plain text, for which `weight` and `max_examples` of a source mean nothing.",
                "Leave them out; data.max_train_examples is a number of rows.",
            )
    without_effect = {
        "data.format": config.format != "auto" or any(source.format for source in plain),
        "data.too_long: drop": config.too_long == "drop",
        "data.on_bad_record: skip": config.on_bad_record == "skip",
        "data.packing": config.packing,
        "data.group_by_length": config.group_by_length,
    }
    if given := [name for name, is_given in without_effect.items() if is_given]:
        raise DataError(
            f"{plain[0].path} is plain text, for which {' and '.join(given)} would have no effect: all rows are full.",
            "Leave that out.",
        )
    return True


def load_corpus(
    config: DataConfig, *, length: int, seed: int, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Corpus:
    """Tokenise plain text, or find its tokens from an earlier run, and choose rows.

    Args:
        config: The data section of the configuration.
        length: Tokens of a row.
        seed: Determines which rows are held out, and which ones a maximum keeps.
        tokenizer: The model's tokenizer.
        folder: Where tokens are kept.

    Returns:
        The rows.

    Raises:
        DataError: A file can't be read as text, or there is too little of it.
        EnvironmentProblem: There is no permission to read a file, or no room for the tokens.
    """
    train_files = _all_files(config.train_sources)
    read = [FileRead(str(file), "train", format=FORMAT) for file in train_files]
    tokens = _Tokens.of(train_files, tokenizer, folder)
    order = _order(tokens.rows_of(length), seed, "train order")
    if config.eval is not None:
        eval_files = _all_files(config.eval_sources)
        read += [FileRead(str(file), "eval", format=FORMAT) for file in eval_files]
        measured = _Tokens.of(eval_files, tokenizer, folder)
        held = measured.take(length, _order(measured.rows_of(length), seed, "eval order"))
    else:
        num_held = _num_held(len(order), config.eval_fraction)
        held, order = tokens.take(length, order[:num_held]), order[num_held:]
    return Corpus(
        tokens.take(length, order)[: config.max_train_examples], held[: config.max_eval_examples], tuple(read)
    )


@dataclass(frozen=True)
class _Tokens:
    """The tokens of some files.

    Attributes:
        values: Token ids, (N,); a memory-mapped file.
        digest: Their SHA-256.
        name: Of the files, for messages.
    """

    values: NDArray[np.integer]
    digest: str
    name: str

    @classmethod
    def of(cls, files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, folder: Path) -> _Tokens:
        """Find the tokens of some files, or make them."""
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        name = f"{files[0]}{more}"
        path = folder / f"{_key(files, tokenizer)}.bin"
        kind = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<i4")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                known = _read_record(path)
                if known is None:
                    known = _write(path, files, tokenizer, kind)
        except OSError as error:
            raise EnvironmentProblem(
                f"The tokens of {name} can't be kept in {folder}: {error.strerror or error}.",
                "Free space, or set model.cache_dir to another folder.",
            ) from error
        return cls(np.memmap(path, dtype=kind, mode="r"), known["sha256"], name)

    def rows_of(self, length: int) -> int:
        """Return how many whole rows there are; at least one."""
        num_rows = len(self.values) // length
        if not num_rows:
            raise DataError(
                f"{self.name} has {len(self.values)} tokens, less than one row of training.max_length: {length}.",
                "Give more text or shorter rows.",
            )
        return num_rows

    def take(self, length: int, rows: NDArray[np.int64]) -> TokenRows:
        return TokenRows(self.values, length, rows, self.digest, self.name)


def _files(source: DataSource) -> tuple[Path, ...]:
    """Return the plain text files that a source names; none if it names other data."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        if any(ending(file) in READERS for file in inside):
            return ()  # a text beside records is a description of them
        return tuple(file for file in inside if ending(file) == TEXT)
    if ending(path) != TEXT:
        return ()
    return tuple(file for file in find(source.path, "train").files if isinstance(file, Path))


def _all_files(sources: Sequence[DataSource]) -> tuple[Path, ...]:
    return tuple(file for source in sources for file in _files(source))


def _order(num_rows: int, seed: int, purpose: str) -> NDArray[np.int64]:
    order: NDArray[np.int64] = torch.randperm(num_rows, generator=generator(seed, purpose)).numpy()
    return order


def _num_held(num_rows: int, fraction: float) -> int:
    """Return how many rows are held out: at least one of two if any."""
    if fraction == 0 or num_rows < 2:
        return 0
    return min(max(round(fraction * num_rows), 1), num_rows - 1)


def _key(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of all that decides about the tokens."""
    digest = hashlib.sha256(f"{_VERSION} {tokenizer.eos_token_id} ".encode())
    digest.update(_backend(tokenizer).to_str().encode())
    for file in files:
        try:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        except PermissionError as error:
            raise EnvironmentProblem(
                f"{file} can't be read: permission denied.", "Give the user who runs this the right to read the file."
            ) from error
    return digest.hexdigest()[:32]


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    if not tokenizer.is_fast:
        raise DataError(
            "This model's tokenizer is a slow one, with which a corpus is not tokenised.",
            "Use a model that comes with a `tokenizer.json`.",
        )
    return tokenizer.backend_tokenizer


def _read_record(path: Path) -> dict[str, Any] | None:
    """Return what is written about a file of tokens; None if it is missing or not as it was written."""
    try:
        record: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        with path.open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == record["sha256"]
        return record if whole else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _write(
    path: Path, files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, kind: np.dtype[Any]
) -> dict[str, Any]:
    """Tokenise some files; the record is written last."""
    partial, digest = path.with_suffix(".incomplete"), hashlib.sha256()
    try:
        with partial.open("wb") as out:
            for ids in _tokens(files, tokenizer):
                raw = np.asarray(ids, dtype=kind).tobytes()
                out.write(raw)
                digest.update(raw)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    record = {"sha256": digest.hexdigest(), "files": [file.name for file in files]}
    write_text(path.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
    return record


def _tokens(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    backend, end = _backend(tokenizer), tokenizer.eos_token_id
    for file in files:
        is_empty = True
        for piece in _pieces(file):
            is_empty = False
            yield backend.encode(piece, add_special_tokens=False).ids
        if is_empty:
            raise DataError(f"{file} is empty: there is no text in it.", "Check that it was written completely.")
        if end is not None:
            yield [end]


def _pieces(file: Path) -> Iterator[str]:
    """Read a text in pieces that end with a line, if lines are not longer than a piece."""
    open_file = _OPEN.get(file.suffix.lower(), lambda path: path.open("rb"))
    kept = ""
    try:
        with open_file(file) as raw, io.TextIOWrapper(raw, encoding=_encoding(file, open_file)) as text:
            while read := text.read(_PIECE):
                piece, newline, kept = (kept + read).rpartition("\n")
                if newline:
                    yield piece + newline
                elif len(kept) > _PIECE:
                    yield kept
                    kept = ""
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not UTF-8 text (byte 0x{error.object[error.start]:02x}).", "Save the file in the encoding UTF-8."
        ) from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{file} can't be decompressed: {short(error)}.", "Write or download it again.") from error
    if kept:
        yield kept


def _encoding(file: Path, open_file: Callable[[Path], IO[bytes]]) -> str:
    with open_file(file) as raw:
        begins = raw.read(2)
    return "utf-16" if begins in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
