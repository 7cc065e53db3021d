"""A corpus of plain text: tokenised once into a file, whose rows are examples.

    data.train: corpus/*.txt ---> <cache>/tokens/<digest>.bin ---> rows of training.max_length tokens

Each file is one text, with the tokenizer's end-of-text token behind it; where that token is written out inside of a
file, it is read as such. The texts follow each other, and rows are cut without regard to where one ends, as is usual in
pre-training. What is left at the end and fills no row is left out.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from sophia_galore.config.schema_data import DataConfig, DataSource
from sophia_galore.data.file_text import BROKEN, ending, is_utf16, not_decompressed, not_permitted, open_unpacked
from sophia_galore.data.gather import FileRead
from sophia_galore.data.read import READERS, TEXT, find
from sophia_galore.data.split import in_seeded_order, num_held
from sophia_galore.data.token_rows import TokenRows
from sophia_galore.errors import DataError, EnvironmentProblem
from sophia_galore.records.schema import write_text
from sophia_galore.weights.manifest import sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "corpus"
"""What a run's records say of the format of such data."""

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


@dataclass(frozen=True)
class CorpusFiles:
    """The files of a corpus.

    Attributes:
        train: Texts to train on; at least one.
        eval: Texts to measure on; None: rows of the others are held out.
    """

    train: tuple[Path, ...]
    eval: tuple[Path, ...] | None


def find_corpus(config: DataConfig) -> CorpusFiles | None:
    """Return the files of the training data, if these are plain text.

    Args:
        config: The data section of the configuration.

    Raises:
        DataError: Some of it is plain text and some is not; or there are settings that plain text can't have.
    """
    sources = (*config.train_sources, *config.eval_sources)
    found = [_files(source) for source in sources]
    plain = [source for source, files in zip(sources, found, strict=True) if files]
    if not plain:
        return None
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
    num_train = len(config.train_sources)
    train, measured = (
        tuple(file for files in part for file in files) for part in (found[:num_train], found[num_train:])
    )
    return CorpusFiles(train, None if config.eval is None else measured)


def load_corpus(
    files: CorpusFiles,
    config: DataConfig,
    *,
    length: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> Corpus:
    """Tokenise plain text, or find its tokens from an earlier run, and choose rows.

    Args:
        files: The files.
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
    read = [FileRead(str(file), "train", format=FORMAT) for file in files.train]
    tokens = _Tokens.of(files.train, tokenizer, folder)
    order = _order(tokens.rows_of(length), seed, "train order")
    if files.eval is not None:
        read += [FileRead(str(file), "eval", format=FORMAT) for file in files.eval]
        measured = _Tokens.of(files.eval, tokenizer, folder)
        held = measured.take(length, _order(measured.rows_of(length), seed, "eval order"))
    else:
        count = num_held(len(order), config.eval_fraction)
        held, order = tokens.take(length, order[:count]), order[count:]
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
    path = Path(source.path)
    if path.is_dir():
        return _inside(path)
    if ending(path) != TEXT:
        return ()
    return tuple(file for file in find(source.path, "train").files if isinstance(file, Path))


def _inside(folder: Path) -> tuple[Path, ...]:
    """Return the texts of a folder; none if there are records too: a text beside them is a description of them."""
    found = []
    for file in folder.rglob("*"):
        kind = ending(file)
        if kind not in (TEXT, *READERS) or file.name.startswith(".") or not file.is_file():
            continue
        if kind != TEXT:
            return ()
        found.append(file)
    return tuple(sorted(found))


def _order(num_rows: int, seed: int, purpose: str) -> NDArray[np.int64]:
    return np.array(in_seeded_order(range(num_rows), seed, purpose), dtype=np.int64)


def _key(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of all that decides about the tokens."""
    digest = hashlib.sha256(f"{_VERSION} {tokenizer.eos_token_id} ".encode())
    digest.update(_backend(tokenizer).to_str().encode())
    for file in files:
        try:
            digest.update(sha256_of(file).encode())
        except PermissionError as error:
            raise not_permitted(file) from error
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
        return record if sha256_of(path) == record["sha256"] else None
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
    kept = ""
    try:
        with open_unpacked(file) as raw, io.TextIOWrapper(raw, encoding=_encoding(file)) as text:
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
    except BROKEN as error:
        raise not_decompressed(file, error) from error
    if kept:
        yield kept


def _encoding(file: Path) -> str:
    with open_unpacked(file) as raw:
        return "utf-16" if is_utf16(raw.read(2)) else "utf-8-sig"
