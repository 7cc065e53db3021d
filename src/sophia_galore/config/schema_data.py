"""The section `data`: training and evaluation data.

Data are one name, or a list of data sets with a weight for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_serializer
from pydantic_core import PydanticCustomError

from sophia_galore.config.field_types import Section
from sophia_galore.optim.recipes import NUM_SEEDS

FormatName = Literal["alpaca", "sharegpt", "messages", "prompt_completion", "text"]

PROBLEM = "data_source"
"""The type of validation errors whose message is shown to the user unchanged."""


class DataSource(BaseModel):
    """One data set of several.

    Attributes:
        path: A file, a folder, a pattern such as ``data/*.jsonl``, or a hub dataset.
        weight: How often an epoch goes through it: 0.5 takes half of its examples, chosen by the seed, 2 takes each
            of them twice.
        max_examples: Use at most so many of its examples, chosen by the seed, before `weight` applies.
        format: How its records are laid out; None: as `data.format` says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path: str = Field(min_length=1)
    weight: float = Field(1.0, gt=0, le=1000)
    max_examples: int | None = Field(None, ge=1)
    format: FormatName | None = None

    @model_serializer
    def _lean(self) -> str | dict[str, Any]:
        given = {name: getattr(self, name) for name in type(self).model_fields}
        said = {name: value for name, value in given.items() if value != type(self).model_fields[name].default}
        return self.path if set(said) == {"path"} else said


_KEYS = ", ".join(DataSource.model_fields)
_TAKES = {
    "path": "the name of a file, folder or hub dataset",
    "weight": "a number above 0, at most 1000",
    "max_examples": "a whole number of at least 1",
    "format": f"one of {', '.join(get_args(FormatName))}",
}


def _listed(value: object) -> object:
    """Convert a list or a single object to a tuple of sources; a name stays a name."""
    if isinstance(value, Mapping):
        value = (value,)
    if value in ("", [], ()):
        raise PydanticCustomError(PROBLEM, f"an empty {'text' if value == '' else 'list'} names no data")
    if not isinstance(value, list | tuple):
        return value
    return tuple(_source(item, place) for place, item in enumerate(value, start=1))


def _source(item: object, place: int) -> DataSource:
    if isinstance(item, DataSource):
        return item
    if isinstance(item, str):
        item = {"path": item}
    if not isinstance(item, Mapping):
        raise PydanticCustomError(PROBLEM, f"entry {place} is neither a name nor an object with the keys {_KEYS}")
    fields = dict(item)
    if "path" not in fields and "name" in fields:
        fields["path"] = fields.pop("name")
    if unknown := [str(key) for key in fields if key not in DataSource.model_fields]:
        raise PydanticCustomError(PROBLEM, f"entry {place} has the unknown key '{unknown[0]}'; known are {_KEYS}")
    if "path" not in fields:
        raise PydanticCustomError(PROBLEM, f"entry {place} lacks its `path`")
    try:
        return DataSource.model_validate(fields, strict=True)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        raise PydanticCustomError(PROBLEM, f"entry {place}: {key} takes {_TAKES[key]}") from None


DataSources = Annotated[str | tuple[DataSource, ...], BeforeValidator(_listed)]
"""A name, or a list of names and objects; in a configuration also a single object."""

MaybeDataSources = Annotated[str | tuple[DataSource, ...] | None, BeforeValidator(_listed)]
"""The same, or none."""


def listed_sources(value: str | tuple[DataSource, ...]) -> tuple[DataSource, ...]:
    """Return the data sets of a value of `data.train` or `data.eval`, at least one.

    Args:
        value: As the configuration has it.
    """
    return (DataSource(path=value),) if isinstance(value, str) else value


def sources_in_words(value: str | tuple[DataSource, ...]) -> str:
    """Return the names of the data sets for a sentence; long lists are shortened.

    Args:
        value: As the configuration has it.
    """
    paths = [source.path for source in listed_sources(value)]
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more


class DataConfig(Section):
    """Training and evaluation data."""

    train: DataSources = Field(
        "data/sample_data.json",
        description="JSON, JSONL, CSV, TSV, Parquet or Arrow file, a folder of those, or a hub dataset id; or a list "
        "of such, each a name or an object with path, weight (how often an epoch goes through it), max_examples and "
        "format. Plain text (.txt files, a folder or a pattern) is a corpus: cut into rows of training.max_length "
        "tokens.",
    )
    eval: MaybeDataSources = Field(
        None,
        description="Evaluation data, as `train`; null: the validation split of a folder in `train` that has one, else "
        "a fraction of the training data.",
    )
    eval_fraction: float = Field(
        0.05,
        ge=0.0,
        lt=1.0,
        description="Share of the examples held out if `eval` is null; 0: no evaluation. Given, it goes before a "
        "folder's validation split.",
    )
    max_eval_examples: int | None = Field(None, ge=1, description="Use at most so many evaluation examples.")
    max_train_examples: int | None = Field(None, ge=1, description="Use at most so many training examples.")
    seed: int | None = Field(
        None,
        ge=0,
        lt=NUM_SEEDS,
        description="Which examples are held out, and which ones a maximum keeps; null: as training.seed. Set it, and "
        "runs with several training.seed are measured on the same examples.",
    )
    format: Literal["auto"] | FormatName = Field(
        "auto", description="How a record is laid out; auto: recognised by its fields and named in the output."
    )
    packing: bool = Field(
        False,
        description="Lay whole examples side by side in rows of at most training.max_length tokens, each attending to "
        "itself alone: loss and gradients as unpacked, and next to no padding. Batch sizes then count rows.",
    )
    group_by_length: bool = Field(
        False, description="Let examples of similar length share a micro-batch, so that less is padded."
    )
    date: str | None = Field(
        None,
        pattern=r"^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])$",
        description="The day that chat templates which write today's date see, as 2026-11-28; null: the day on which "
        "the run begins, also after a resume.",
    )
    too_long: Literal["cut", "drop"] = Field(
        "cut", description="What happens to an example longer than training.max_length: cut at the end, or drop."
    )
    on_bad_record: Literal["stop", "skip"] = Field(
        "stop",
        description="Records that can't be used: stop, naming the first of them and their number, or leave them out, "
        "count them and list them in the run's folder (bad_records.jsonl).",
    )

    @property
    def train_sources(self) -> tuple[DataSource, ...]:
        """The data sets that `train` names."""
        return listed_sources(self.train)

    @property
    def eval_sources(self) -> tuple[DataSource, ...]:
        """The data sets that `eval` names; none if it is null."""
        return listed_sources(self.eval) if self.eval is not None else ()
