"""The section `data`: what is learned from, and what is measured on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sophia_galore.config.data_source import DataSource, DataSources, FormatName, MaybeDataSources, listed_sources
from sophia_galore.config.fields import Section
from sophia_galore.optim.recipes import NUM_SEEDS


class DataConfig(Section):
    """What is learned from, and what is measured on."""

    train: DataSources = Field(
        "data/sample_data.json",
        min_length=1,
        description="JSON, JSONL, CSV, TSV, Parquet or Arrow file, a folder of those, or a hub dataset id; or a list "
        "of such, each a name or an object with path, weight (how often an epoch goes through it), max_examples and "
        "format.",
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
