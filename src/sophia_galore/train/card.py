"""The model card of a run: model, data, settings and results.

Everything is read from the run's records, so a card written during the run and one written by `export` say the same.
A card names files without their folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sophia_galore import __version__
from sophia_galore.config.dump import flatten
from sophia_galore.data.hub import looks_like_hub_id
from sophia_galore.model.aliases import find_alias
from sophia_galore.model.card import Card
from sophia_galore.model.origin import Origin, is_hub_id
from sophia_galore.records import files
from sophia_galore.records.metrics import Evaluation
from sophia_galore.records.run import TrainerState
from sophia_galore.records.schema import find_object
from sophia_galore.train.result import find_config

_SETTINGS = {
    "optimizer.type": "optimizer",
    "training.batch_size": "batch size",
    "training.gradient_accumulation_steps": "gradient accumulation",
    "training.max_length": "longest example, in tokens",
    "training.lr_scheduler_type": "schedule of the learning rate",
    "training.seed": "seed",
    "model.store": "precision of the weights in training",
}


_COUNTS = {"num_train_examples": "to train on", "num_eval_examples": "held out"}


def run_card(
    title: str,
    *,
    plan: Mapping[str, Any],
    config: Mapping[str, Any],
    step: int,
    evaluations: Sequence[Evaluation],
    origin: Origin,
) -> Card:
    """Return the model card of a run.

    Args:
        title: The card's heading.
        plan: The content of plan.json.
        config: The flattened configuration.
        step: The step of the weights.
        evaluations: The evaluations up to that step.
        origin: The origin of the base model.
    """
    base_model, shown = _base_of(plan, origin)
    counts = [f"{plan[key]} examples {words}" for key, words in _COUNTS.items() if plan.get(key)]
    table = [
        ("base model", shown),
        ("data", ", ".join([*_data_names(config), *counts])),
        ("data fingerprint", f"`{plan.get('data_fingerprint', '')}`"),
        ("steps", f"{step} of {plan['num_steps']}" if step < plan.get("num_steps", step) else str(step)),
        ("learning rate", f"{plan['learning_rate']:g}"),
        *((words, str(config[key])) for key, words in _SETTINGS.items() if key in config),
    ]
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        when = f"after step {first.step}" if first.step else "before training"
        table.append((f"eval loss {when}", f"{first.loss:.4f}"))
        if last.step != first.step:
            table.append((f"eval loss after step {last.step}", f"{last.loss:.4f}"))
    said = (
        f"{shown}, fine-tuned by sophia-galore {__version__}. Losses are in nats a token; the data fingerprint is the "
        "SHA-256 of all tokens and of which of them count."
    )
    return Card(title, base_model, origin, [said], table)


def folder_card(title: str, folder: Path, origin: Origin, done: str) -> Card:
    """Return the card of a converted model: the run's card if a run wrote the model.

    Args:
        title: The card's heading.
        folder: The source: a run's folder, a checkpoint or a model folder.
        origin: The model's origin.
        done: The conversion, in a sentence.
    """
    plan, config = find_object(folder / files.PLAN), find_object(folder / files.FLAT_CONFIG)
    if not config and (asked := find_config(folder)):
        config = flatten(asked)
    if "learning_rate" in plan and config:
        state = TrainerState.find(folder / files.TRAINER_STATE)
        exported = state.exported if state else None
        step = exported.exported_step if exported else state.global_step if state else int(plan.get("num_steps", 0))
        evaluations = [each for each in state.evaluations if each.step <= step] if state else []
        card = run_card(title, plan=plan, config=config, step=step, evaluations=evaluations, origin=origin)
        return Card(card.title, card.base_model, origin, [*card.paragraphs, done], card.table)
    base_model = origin.hub_id or (origin.base_model if origin.is_ours else "")
    return Card(title, base_model, origin, [done])


def _base_of(plan: Mapping[str, Any], origin: Origin) -> tuple[str, str]:
    """Return the base model's hub id, if it has one, and its name."""
    name, source = str(plan.get("model_name", "")), plan.get("model_source")
    alias = find_alias(name)
    if alias is not None and source != "local":
        return alias.hf, alias.hf
    if source != "local" and is_hub_id(name):
        return name, name
    known = origin.hub_id or (origin.base_model if origin.is_ours else "")
    return known, known or Path(name).name


def _data_names(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the training data, without folders."""
    given = config.get("data.train")
    entries = given if isinstance(given, list | tuple) else [given]
    paths = [entry.get("path") if isinstance(entry, Mapping) else entry for entry in entries]
    return [str(path) if looks_like_hub_id(str(path)) else Path(str(path)).name for path in paths if path]
