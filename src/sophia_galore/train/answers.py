"""The sample questions, which a run's model answers before and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sophia_galore.engine.generate import answer
from sophia_galore.records import files
from sophia_galore.records.run import Answers
from sophia_galore.records.schema import write_json
from sophia_galore.train.prepared import Prepared
from sophia_galore.weights.store import WeightStore

When = Literal["before", "after"]


def ask(prepared: Prepared, store: WeightStore, folder: Path, when: When) -> list[tuple[str, str]]:
    """Answer the sample questions and save the answers.

    Args:
        prepared: The prepared run.
        store: The run's weights.
        folder: The run's folder.
        when: Before or after training.

    Returns:
        Questions and answers.
    """
    training = prepared.config.training
    answers = answer(
        prepared.architecture,
        store,
        prepared.tokenizer,
        training.sample_questions,
        max_new_tokens=training.sample_max_new_tokens,
        device=prepared.device,
        generation_config=prepared.generation_config,
    )
    path = folder / files.ANSWERS
    known = Answers.read(path).to_json() if path.exists() else {}
    given = list(zip(training.sample_questions, answers, strict=True))
    write_json(path, known | {when: dict(given)})
    return given
