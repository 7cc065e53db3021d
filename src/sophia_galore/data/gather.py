"""From the names in the configuration to conversations: every file with its format, its records and its use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sophia_galore.config.schema_data import DataConfig, DataSource
from sophia_galore.data.bad_records import BadRecords
from sophia_galore.data.conversation import Conversation
from sophia_galore.data.fields import renamed, tidied
from sophia_galore.data.folders import SPLITS, Split
from sophia_galore.data.formats import detect_format, to_conversation
from sophia_galore.data.read import Found, find, read_found
from sophia_galore.data.record import Record
from sophia_galore.errors import DataError

Use = Literal["train", "eval"]


@dataclass(frozen=True)
class FileRead:
    """What was read, or left alone, of one file or hub dataset.

    Attributes:
        name: The file.
        use: ``train``, ``eval`` or ``left alone``.
        num_records: Records in it, with those that can't be used; 0 if it was left alone.
        format: Their format.
        note: How the file was understood where that is not what its ending says; "" otherwise.
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
        conversations: Of all its files, in order.
    """

    source: DataSource
    conversations: list[Conversation]


@dataclass(frozen=True)
class Gathered:
    """All that was read for a run.

    Attributes:
        train: What is trained on, an entry a portion.
        eval: What is measured on; None: it is to be held out of the training data, if anything is.
        files: File by file, what was read and what was left alone.
    """

    train: list[Portion]
    eval: list[Portion] | None
    files: tuple[FileRead, ...]

    @property
    def format(self) -> str:
        """The format of the training records; several are named one after the other."""
        return ", ".join(dict.fromkeys(file.format for file in self.files if file.use == "train"))

    @property
    def num_records(self) -> int:
        """Records that were read, with those that can't be used."""
        return sum(file.num_records for file in self.files)


def gather(config: DataConfig, bad: BadRecords) -> Gathered:
    """Reads and converts everything that the data section names.

    A folder's validation part is what is measured on, unless `data.eval` names something else or `data.eval_fraction`
    was given: 0 asks for no evaluation, another share for one of the training part.

    Args:
        config: The data section of the configuration.
        bad: Takes the records that can't be used.

    Returns:
        The conversations, and what they came from.

    Raises:
        DataError: A file as a whole can't be used, or there is none.
        EnvironmentProblem: A file may not be read.
    """
    reading = _Reading(config, bad)
    finds = [(source, find(source.path, "train")) for source in config.train_sources]
    held = [Portion(source, []) for source in config.train_sources]
    takes_validation = config.eval is None and "eval_fraction" not in config.model_fields_set
    train = []
    for (source, found), beside in zip(finds, held, strict=True):
        train.append(Portion(source, reading.all_of(found.files, source, "train", beside.conversations)))
        if takes_validation:
            beside.conversations.extend(reading.all_of(found.validation, source, "eval"))
        reading.leave((*(() if takes_validation else found.validation), *found.left))
    if config.eval is None:
        # The shares of the training data say nothing of what is measured on.
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
    """Reads files one after the other and remembers what came of each.

    Args:
        config: The data section of the configuration.
        bad: Takes the records that can't be used.
    """

    def __init__(self, config: DataConfig, bad: BadRecords) -> None:
        self._config, self._bad = config, bad
        self._takes_validation = config.eval is None and "eval_fraction" not in config.model_fields_set
        self.files: list[FileRead] = []

    def all_of(
        self, files: Sequence[Path | str], source: DataSource, use: Use, validation: list[Conversation] | None = None
    ) -> list[Conversation]:
        """The conversations of some files.

        Args:
            files: The files.
            source: The entry that they belong to.
            use: What they are for.
            validation: Takes those of records that say themselves that they are for validation.
        """
        return [
            conversation
            for file in files
            for conversation in self._one(file, source.format or self._config.format, use, validation)
        ]

    def leave(self, files: Sequence[Path]) -> None:
        """Remembers files that are left alone."""
        known = {file.name for file in self.files}
        self.files += [FileRead(str(file), "left alone") for file in files if str(file) not in known]

    def _one(
        self, file: Path | str, format: str, use: Use, validation: list[Conversation] | None
    ) -> list[Conversation]:
        before = self._bad.num_found
        content = read_found(file, self._bad.report)
        num_broken = self._bad.num_found - before
        records = [tidied(record) for record in content.records]
        found = format
        if format == "auto":
            found = detect_format(records) if records else ""
        names = renamed(content.records[0]) if content.records else {}
        notes = [content.note] if content.note else []
        if names:
            notes.append(f"{', '.join(names)} read as {', '.join(names.values())}")
        parts = _by_split(records) if validation is not None else None
        if parts is not None:
            takes = self._takes_validation
            notes.append(
                f"by its column `split`: {len(parts['train'])} to train on, {len(parts['validation'])} to measure on"
                f"{'' if takes else ' (left alone)'}, {len(parts['test'])} for testing (left alone)"
            )
            if takes and validation is not None:
                validation.extend(self._converted(parts["validation"], found))
            records = parts["train"]
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
    """The records by their column `split`, if each has one and some are to train on and some are not."""
    said = [str(record.fields.get("split")).strip().lower() for record in records]
    if not {"train"} < {SPLITS.get(word, "") for word in said} <= {"train", "validation", "test"}:
        return None
    parts: dict[Split, list[Record]] = {"train": [], "validation": [], "test": []}
    for record, word in zip(records, said, strict=True):
        parts[SPLITS[word]].append(record)
    return parts


def _apart_from(found: Found, finds: Sequence[tuple[DataSource, Found]]) -> tuple[Path, ...]:
    """What is left alone of a folder to measure on, without what is trained on."""
    trained = {file for _, other in finds for file in other.files}
    return tuple(file for file in found.left if file not in trained)
