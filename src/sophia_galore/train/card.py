"""The model card of a run: what was trained on what, how, and what came of it.

Everything is taken from the run's records, as the files hold them, so that a card written during the run and one
written by `export` from its folder say the same. Paths are not among it: only the names of files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sophia_galore import __version__
from sophia_galore.config import load_config
from sophia_galore.config.dump import flatten
from sophia_galore.data.hub import looks_like_hub_id
from sophia_galore.errors import UserError
from sophia_galore.model.aliases import find_alias
from sophia_galore.model.card import Card
from sophia_galore.model.origin import Origin, is_hub_id
from sophia_galore.records import files
from sophia_galore.records.metrics import Evaluation
from sophia_galore.records.run import TrainerState
from sophia_galore.records.schema import find_object

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
    """The model card of a run.

    Args:
        title: Its heading.
        plan: The run's plan, as in its plan.json.
        config: Its flattened configuration.
        step: The step after which the weights are.
        evaluations: Those of models that had seen no more steps.
        origin: What is known of the model that was trained.
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
    """The card of a model that was converted: the run's, if a run wrote it.

    Args:
        title: Its heading.
        folder: The folder that the model was taken from: a run's, a checkpoint or any model's.
        origin: What that folder says of its origin.
        done: What was done with it, in a sentence.
    """
    plan, config = find_object(folder / files.PLAN), find_object(folder / files.FLAT_CONFIG) or _config_of(folder)
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
    """The hub id of the model that a run started from, if it has one; and what to call it."""
    name, source = str(plan.get("model_name", "")), plan.get("model_source")
    alias = find_alias(name)
    if alias is not None and source != "local":
        return alias.hf, alias.hf
    if source != "local" and is_hub_id(name):
        return name, name
    known = origin.hub_id or (origin.base_model if origin.is_ours else "")
    return known, known or Path(name).name


def _data_names(config: Mapping[str, Any]) -> list[str]:
    """The data that were trained on, without the folders they lie in."""
    given = config.get("data.train")
    entries = given if isinstance(given, list | tuple) else [given]
    paths = [entry.get("path") if isinstance(entry, Mapping) else entry for entry in entries]
    return [str(path) if looks_like_hub_id(str(path)) else Path(str(path)).name for path in paths if path]


def _config_of(run: Path) -> Mapping[str, Any]:
    try:
        return flatten(load_config(run / files.CONFIG)) if (run / files.CONFIG).is_file() else {}
    except UserError:
        return {}
