"""Read all data sources of the configuration and convert their records to conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sophia_galore.config.schema_data import DataConfig, DataSource
from sophia_galore.data.bad_records import BadRecords
from sophia_galore.data.conversation import Conversation
from sophia_galore.data.fields import normalised, renamed
from sophia_galore.data.folders import SPLITS, Split
from sophia_galore.data.formats import detect_format, to_conversation
from sophia_galore.data.read import Found, find, read_found
from sophia_galore.data.record import Record
from sophia_galore.errors import DataError

Use = Literal["train", "eval"]


@dataclass(frozen=True)
class FileRead:
    """How one file or hub dataset was used.

    Attributes:
        name: The file.
        use: ``train``, ``eval`` or ``left alone`` (not used).
        num_records: Number of its records, including bad ones; 0 if it was not used.
        format: Their format.
        note: How the file was read if that differs from its extension; else "".
    """

    name: str
    use: Literal["train", "eval", "left alone"]
    num_records: int = 0
    format: str = ""
    note: str = ""


@dataclass(frozen=True)
class Portion:
    """The conversations of one entry of `data.train` or `data.eval`.

    Attributes:
        source: The entry.
        conversations: The conversations of all its files, in order.
    """

    source: DataSource
    conversations: list[Conversation]


@dataclass(frozen=True)
class Gathered:
    """All conversations that were read for a run.

    Attributes:
        train: Training data, one portion per entry.
        eval: Evaluation data; None: it is held out from the training data, if requested.
        files: For each file, how it was used.
    """

    train: list[Portion]
    eval: list[Portion] | None
    files: tuple[FileRead, ...]

    @property
    def format(self) -> str:
        """The format of the training records; several are separated by commas."""
        return ", ".join(dict.fromkeys(file.format for file in self.files if file.use == "train"))

    @property
    def num_records(self) -> int:
        """Number of records that were read, including bad ones."""
        return sum(file.num_records for file in self.files)


def gather(config: DataConfig, bad: BadRecords) -> Gathered:
    """Read and convert all data sources of the data section.

    The validation split of a training folder is the evaluation data, unless `data.eval` or `data.eval_fraction` is
    given. A fraction of 0 means no evaluation, another fraction holds out that share of the training split.

    Args:
        config: The data section of the configuration.
        bad: Collects the records that can't be used.

    Returns:
        The conversations and the files that they came from.

    Raises:
        DataError: A file is missing or can't be used as a whole.
        EnvironmentProblem: There is no permission to read a file.
    """
    reading = _Reading(config, bad)
    finds = [(source, find(source.path, "train")) for source in config.train_sources]
    held = [Portion(source, []) for source in config.train_sources]
    train = []
    for (source, found), beside in zip(finds, held, strict=True):
        train.append(Portion(source, reading.all_of(found.files, source, "train", beside.conversations)))
        if reading.uses_validation:
            beside.conversations.extend(reading.all_of(found.validation, source, "eval"))
        reading.leave((*(() if reading.uses_validation else found.validation), *found.left))
    if config.eval is None:
        # Weights of the training data do not apply to evaluation data.
        measured = [Portion(DataSource(path=portion.source.path), portion.conversations) for portion in held]
        measured = [portion for portion in measured if portion.conversations]
        return Gathered(train, measured or None, tuple(reading.files))
    measured = []
    for source in config.eval_sources:
        found = find(source.path, "eval")
        measured.append(Portion(source, reading.all_of(found.files, source, "eval")))
        reading.leave(_apart_from(found, finds))
    return Gathered(train, measured, tuple(reading.files))


class _Reading:
    """Reads files one by one and records how each was used.

    Args:
        config: The data section of the configuration.
        bad: Collects the records that can't be used.
    """

    def __init__(self, config: DataConfig, bad: BadRecords) -> None:
        self._config, self._bad = config, bad
        self.uses_validation = config.eval is None and "eval_fraction" not in config.model_fields_set
        self.files: list[FileRead] = []

    def all_of(
        self, files: Sequence[Path | str], source: DataSource, use: Use, validation: list[Conversation] | None = None
    ) -> list[Conversation]:
        """Return the conversations of some files.

        Args:
            files: The files.
            source: The entry that they belong to.
            use: ``train`` or ``eval``.
            validation: Receives the records whose column `split` says validation.
        """
        return [
            conversation
            for file in files
            for conversation in self._one(file, source.format or self._config.format, use, validation)
        ]

    def leave(self, files: Sequence[Path]) -> None:
        """Record files that are not used."""
        known = {file.name for file in self.files}
        self.files += [FileRead(str(file), "left alone") for file in files if str(file) not in known]

    def _one(
        self, file: Path | str, format: str, use: Use, validation: list[Conversation] | None
    ) -> list[Conversation]:
        before = self._bad.num_found
        content = read_found(file, self._bad.report)
        num_broken = self._bad.num_found - before
        records = [normalised(record) for record in content.records]
        found = format
        if format == "auto":
            found = detect_format(records) if records else ""
        names = renamed(content.records[0]) if content.records else {}
        notes = [content.note] if content.note else []
        if names:
            notes.append(f"{', '.join(names)} read as {', '.join(names.values())}")
        splits = _by_split(records) if validation is not None else None
        if splits is not None:
            notes.append(
                f"by its column `split`: {len(splits['train'])} to train on, {len(splits['validation'])} to measure on"
                f"{'' if self.uses_validation else ' (left alone)'}, {len(splits['test'])} for testing (left alone)"
            )
            if self.uses_validation and validation is not None:
                validation.extend(self._converted(splits["validation"], found))
            records = splits["train"]
        converted = self._converted(records, found)
        self.files.append(FileRead(str(file), use, len(content.records) + num_broken, found, "; ".join(notes)))
        return converted

    def _converted(self, records: Sequence[Record], format: str) -> list[Conversation]:
        converted = []
        for record in records:
            try:
                converted.append(to_conversation(record, format))
            except DataError as error:
                self._bad.report(record.where, error)
        return converted


def _by_split(records: Sequence[Record]) -> dict[Split, list[Record]] | None:
    """Return the records by their column `split`, if all have a known one and it is `train` for some only."""
    said = [str(record.fields.get("split")).strip().lower() for record in records]
    if not {"train"} < {SPLITS.get(word, "") for word in said} <= {"train", "validation", "test"}:
        return None
    splits: dict[Split, list[Record]] = {"train": [], "validation": [], "test": []}
    for record, word in zip(records, said, strict=True):
        splits[SPLITS[word]].append(record)
    return splits


def _apart_from(found: Found, finds: Sequence[tuple[DataSource, Found]]) -> tuple[Path, ...]:
    """Return the unused files of an evaluation folder that are not trained on either."""
    trained = {file for _, other in finds for file in other.files}
    return tuple(file for file in found.left if file not in trained)
