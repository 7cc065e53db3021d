"""Make training and evaluation examples from the data section of the configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sophia_galore.config.schema_data import DataConfig, sources_in_words
from sophia_galore.data.bad_records import BadRecords
from sophia_galore.data.conversation import Conversation
from sophia_galore.data.corpus import FORMAT, CorpusFiles, find_corpus, load_corpus
from sophia_galore.data.example import Example
from sophia_galore.data.gather import FileRead, gather
from sophia_galore.data.mixture import repeated, shares
from sophia_galore.data.render import Tokenised, tokenise
from sophia_galore.data.repetition import Repetition, repetition
from sophia_galore.data.split import in_seeded_order, split_off
from sophia_galore.data.token_rows import TokenRows
from sophia_galore.errors import DataError
from sophia_galore.records.run import BadRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PartSummary:
    """Counts of the training or the evaluation data.

    Attributes:
        num_records: Number of records used.
        num_examples: Number of examples made from them.
        num_cut: Number of these examples that were cut at the end.
        num_dropped: Number of records left out because they are too long.
        num_cut_empty: Number of records left out because no counted token remained after the cut.
        num_tokens: Number of tokens in all examples.
        num_counted: Number of tokens that count in the loss.
        longest: Length of the longest example in tokens; 0 if there is none.
    """

    num_records: int
    num_examples: int
    num_cut: int
    num_dropped: int
    num_cut_empty: int
    num_tokens: int
    num_counted: int
    longest: int


@dataclass(frozen=True)
class DataSummary:
    """Counts to show before a run.

    Attributes:
        train: Counts of the training data.
        eval: Counts of the evaluation data; all zero without evaluation.
        num_shared: Number of training records whose text is also in the separate evaluation data, which makes the
            evaluation loss too low. Always 0 if a fraction is held out.
        num_bad: Number of records that can't be used and were left out.
    """

    train: PartSummary
    eval: PartSummary
    num_shared: int
    num_bad: int = 0


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and evaluation examples of a run.

    Attributes:
        train: Training examples; at least one.
        eval: Evaluation examples; empty without evaluation.
        format: The format of the training records.
        summary: Counts.
        fingerprint: SHA-256 over token ids and masks of both parts in order, 64 hex digits.
        files: For each file, how it was used.
        bad: The records that can't be used and were left out.
    """

    train: Sequence[Example]
    eval: Sequence[Example]
    format: str
    summary: DataSummary
    fingerprint: str
    files: tuple[FileRead, ...] = ()
    bad: tuple[BadRecord, ...] = ()

    @cached_property
    def repetition(self) -> Repetition | None:
        """How much of the evaluation examples repeats the training examples; None without evaluation."""
        return repetition(self.train, self.eval)

    @property
    def largest_token(self) -> int:
        """Largest token id that occurs in either part."""
        return max(_largest_token(part) for part in (self.train, self.eval) if part)


def load_data(
    config: DataConfig,
    *,
    max_length: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    date: str = "",
    cache_dir: Path = Path("models_cache"),
) -> Dataset:
    """Read, convert, split and tokenise the data of a run.

    Args:
        config: The data section of the configuration.
        max_length: Maximum length of an example in tokens.
        seed: The run's seed. It determines the split and the choice of examples, unless `data.seed` is given.
        tokenizer: The model's tokenizer.
        date: The date that the chat template sees, as `2026-11-28`; "": the current date.
        cache_dir: In its folder `tokens` the tokens of plain text are kept.

    Returns:
        The examples and their counts.

    Raises:
        DataError: Some of the data can't be used; the message names file, location and field.
        EnvironmentProblem: There is no permission to read a file.
    """
    seed = seed if config.seed is None else config.seed
    if (texts := find_corpus(config)) is not None:
        return _corpus_dataset(texts, config, max_length, seed, tokenizer, cache_dir / "tokens")
    bad = BadRecords(config.on_bad_record)
    gathered = gather(config, bad)
    everything = shares(gathered.train, seed, "train")
    measured = None if gathered.eval is None else shares(gathered.eval, seed, "eval")
    if not everything or measured == []:
        bad.refuse(gathered.num_records, at_any_rate=True)
    if bad.stops and config.max_train_examples is None:
        # The run will stop anyway; this finds the remaining bad records, to report all of them at once.
        all_of_it = [*everything, *(measured or [])]
        tokenise(all_of_it, tokenizer, max_length=max_length, too_long="cut", date=date, report=bad.report)
    bad.refuse(gathered.num_records)
    num_shared = 0
    if measured is None:
        train, held = split_off(everything, config.eval_fraction, seed)
    else:
        held = in_seeded_order(measured, seed, "eval order")
        train = in_seeded_order(everything, seed, "train order")
    train = repeated(train, gathered.train, seed, "train")
    if gathered.eval is not None:
        held = repeated(held, gathered.eval, seed, "eval")
    train, held = train[: config.max_train_examples], held[: config.max_eval_examples]
    if measured is not None:
        known = {conversation.content_hash() for conversation in held}
        num_shared = sum(conversation.content_hash() in known for conversation in train)
    train_part, eval_part = (
        tokenise(part, tokenizer, max_length=max_length, too_long=config.too_long, date=date, report=bad.report)
        for part in (train, held)
    )
    nothing_left = any(
        given and not (part.examples or part.num_dropped or part.num_cut_empty)
        for given, part in ((train, train_part), (held, eval_part))
    )
    bad.refuse(gathered.num_records, at_any_rate=nothing_left)
    _require_examples(train_part, train, sources_in_words(config.train), "training", max_length)
    if held:
        _require_examples(eval_part, held, sources_in_words(config.eval or config.train), "evaluation", max_length)
    return Dataset(
        train=train_part.examples,
        eval=eval_part.examples,
        format=gathered.format,
        summary=DataSummary(
            _summary(train_part, len(train)), _summary(eval_part, len(held)), num_shared, num_bad=bad.num_found
        ),
        fingerprint=fingerprint(train_part.examples, eval_part.examples),
        files=gathered.files,
        bad=bad.found,
    )


def fingerprint(train: Sequence[Example], eval: Sequence[Example]) -> str:
    """Return a digest of all data that can change the results of a run.

    Args:
        train: Training examples.
        eval: Evaluation examples.

    Returns:
        SHA-256 over the number of examples in each part and each example's length, token ids
        (little-endian int32) and mask, 64 hex digits; of rows of a corpus, over its digest and their numbers.
    """
    digest = hashlib.sha256()
    for part in (train, eval):
        digest.update(len(part).to_bytes(8, "little"))
        if isinstance(part, TokenRows):
            digest.update(part.content)
            continue
        for example in part:
            digest.update(example.num_tokens.to_bytes(8, "little"))
            digest.update(example.input_ids.numpy().astype("<i4").tobytes())
            digest.update(example.counted.numpy().tobytes())
    return digest.hexdigest()


def _corpus_dataset(
    texts: CorpusFiles, config: DataConfig, length: int, seed: int, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Dataset:
    corpus = load_corpus(texts, config, length=length, seed=seed, tokenizer=tokenizer, folder=folder)
    return Dataset(
        train=corpus.train,
        eval=corpus.eval,
        format=FORMAT,
        summary=DataSummary(_rows_summary(len(corpus.train), length), _rows_summary(len(corpus.eval), length), 0),
        fingerprint=fingerprint(corpus.train, corpus.eval),
        files=corpus.files,
    )


def _rows_summary(num_rows: int, length: int) -> PartSummary:
    return PartSummary(
        num_records=num_rows,
        num_examples=num_rows,
        num_cut=0,
        num_dropped=0,
        num_cut_empty=0,
        num_tokens=num_rows * length,
        num_counted=num_rows * (length - 1),
        longest=length if num_rows else 0,
    )


def _largest_token(part: Sequence[Example]) -> int:
    if isinstance(part, TokenRows):
        return part.largest_token
    return max(int(example.input_ids.max()) for example in part)


def _require_examples(part: Tokenised, given: Sequence[Conversation], source: str, use: str, max_length: int) -> None:
    if part.examples:
        return
    raise DataError(
        f"{source}: of {len(given)} {use} records none is left: {part.num_dropped} are longer than {max_length} "
        f"tokens, in {part.num_cut_empty} the answer begins after them.",
        "Raise `training.max_length`" + (", or set `data.too_long: cut`." if part.num_dropped else "."),
    )


def _summary(part: Tokenised, num_records: int) -> PartSummary:
    lengths = [example.num_tokens for example in part.examples]
    return PartSummary(
        num_records=num_records,
        num_examples=len(part.examples),
        num_cut=part.num_cut,
        num_dropped=part.num_dropped,
        num_cut_empty=part.num_cut_empty,
        num_tokens=sum(lengths),
        num_counted=sum(example.num_counted for example in part.examples),
        longest=max(lengths, default=0),
    )
