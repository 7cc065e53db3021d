"""Prepare a run: model, data and plan, without loading a weight. `check` stops here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sophia_galore.config import RunConfig
from sophia_galore.config.check import check
from sophia_galore.config.dump import changed
from sophia_galore.data.batches import pad_token
from sophia_galore.data.chat_format import ChatFormat, choose_chat_format
from sophia_galore.data.dataset import load_data
from sophia_galore.data.render import describe
from sophia_galore.engine.generate import stop_tokens
from sophia_galore.errors import ConfigError, NotPredictable
from sophia_galore.memory.planner import Planner
from sophia_galore.memory.workload import workload_of_data
from sophia_galore.model.export import read_generation_config
from sophia_galore.model.folder_layout import find_layout
from sophia_galore.model.random_weights import random_model
from sophia_galore.model.skeleton import build_skeleton, check_causal, load_tokenizer, read_model_config
from sophia_galore.model.source import ResolvedModel, resolve_model
from sophia_galore.model.source_files import read_source_files
from sophia_galore.plan.detect import (
    detect_bitsandbytes,
    detect_device,
    largest_token,
    missing_trackers,
    model_facts,
    parameter_facts,
)
from sophia_galore.plan.device import choose_device
from sophia_galore.plan.facts import DataFacts, Facts
from sophia_galore.plan.plan import RunPlan, count_steps, make_plan
from sophia_galore.plan.rules import RULES, compute_dtype
from sophia_galore.plan.verdicts import Decided, decide
from sophia_galore.train.callback import Callback
from sophia_galore.train.checkpoint import Checkpoint
from sophia_galore.train.earlier_run import refuse_own_folders
from sophia_galore.train.folder import refuse_unwritable
from sophia_galore.train.preflight import before_loading
from sophia_galore.train.prepared import Prepared
from sophia_galore.train.proven import proof_of
from sophia_galore.train.run_date import fill_date
from sophia_galore.train.special_tokens import refuse_special_tokens, stopping_at

_NUM_SHOWN_EXAMPLES = 2


def prepare(
    config: RunConfig, callback: Callback, checkpoint: Checkpoint | None = None, num_processes: int = 1
) -> Prepared:
    """Find the model, read the data and make the plan; only downloads are written.

    Args:
        config: The run's configuration.
        callback: Called at each event of the run.
        checkpoint: The checkpoint to resume from; model and tokenizer are read from it.
        num_processes: Processes that share an effective batch.

    Returns:
        The run before any weight is loaded.

    Raises:
        UserError: The configuration, the data or the model can't be used.
    """
    check(config)
    config = fill_date(config)
    refuse_own_folders(config)
    refuse_unwritable(Path(config.run_folder))
    device = choose_device(config.training.device)
    facts = Facts(
        config,
        device=detect_device(device),
        num_processes=num_processes,
        missing_trackers=missing_trackers(config.training.report_to),
    )
    if facts.freezes_layers:
        facts = replace(facts, bitsandbytes=detect_bitsandbytes(device))
    # Rules are checked before each slow step, so that nothing is downloaded, built or tokenised in vain.
    decide(RULES, facts)
    trust = config.model.trust_remote_code
    model = _model_of(checkpoint) if checkpoint else _model_to_begin_with(config, callback)
    if not checkpoint:
        _refuse_folder_of_model(config, model)
    model_config = read_model_config(model.folder, trust_remote_code=trust, say=callback.say)
    missed = config.model.name if model.used_fallback else ""
    facts = replace(facts, model=model_facts(model_config, name=model.name, instead_of=missed))
    check_causal(model_config)
    tokenizer = load_tokenizer(model.folder, trust_remote_code=trust)
    # Kept in memory: a later checkpoint may delete the one they come from.
    source = read_source_files(model.folder, with_code=trust)
    generation_config = read_generation_config(model.folder)
    chat_format = _chat_format(config, tokenizer, model_config, generation_config, checkpoint)
    generation_config = stopping_at(chat_format.end_ids, generation_config, model_config)
    refuse_special_tokens(model_config, tokenizer, generation_config)
    proof = proof_of(model_config, Path(config.model.cache_dir), callback.say, trust_remote_code=trust)
    facts = replace(facts, proof=proof)
    if proof is not None and proof.problem:
        decide(RULES, facts)
    architecture = build_skeleton(model_config, device, trust_remote_code=trust)
    layout = find_layout(model.folder, architecture)
    if remark := layout.remark():
        callback.say(remark)
    facts = replace(facts, parameters=parameter_facts(architecture))
    decide(RULES, facts)
    facts = replace(facts, data=DataFacts(largest_known=largest_token(tokenizer)))
    dataset = load_data(
        config.data,
        max_length=config.training.max_length,
        seed=config.training.seed,
        tokenizer=tokenizer,
        date=chat_format.date,
        cache_dir=Path(config.model.cache_dir),
    )
    callback.data_read(config.data, dataset)
    _, num_steps = count_steps(config, dataset)
    planner = Planner(
        facts,
        model_config,
        architecture.layer_names,
        lambda asked: workload_of_data(asked, dataset, num_steps, pad_token(tokenizer), num_processes),
        lambda asked: num_steps,
        model.source,
    )
    estimate, asked = None, config
    if config.memory.predict:
        try:
            estimate = planner.estimate(config)
        except NotPredictable as error:
            callback.say(f"{error.cause} The probe step shows whether it fits.")
            asked = changed(config, {"memory.predict": False})
    if estimate is not None:
        facts = replace(facts, memory=estimate.facts(planner.decide(config).routes))
    streamed = estimate.streamed if estimate else planner.streamed(asked)
    keep_layers = estimate.forecast.keep_layers if estimate else planner.keep_layers(asked, streamed)
    plan = make_plan(
        facts,
        model=model,
        dataset=dataset,
        chat_format=chat_format,
        keep_layers=keep_layers,
        placements=streamed.placements,
        full_gradients=estimate.full_gradients if estimate else planner.full_gradients(asked),
    )
    prepared = Prepared(
        config,
        plan,
        checkpoint,
        model.folder,
        model_config,
        tokenizer,
        architecture,
        generation_config,
        source,
        layout,
        dataset,
        device,
        compute_dtype(facts),
        planner,
        estimate,
        streamed,
    )
    plan = replace(plan, notes=(*plan.notes, *before_loading(prepared)))
    if checkpoint:
        plan = _with_first_start(plan, checkpoint.plan)
    callback.planned(plan)
    if estimate is not None:
        callback.say(estimate.sentence())
    callback.examples([describe(example, tokenizer) for example in dataset.train[:_NUM_SHOWN_EXAMPLES]])
    return replace(prepared, plan=plan)


def _model_to_begin_with(config: RunConfig, callback: Callback) -> ResolvedModel:
    if config.model.init == "random":
        return random_model(config.model, config.training.seed, callback.say)
    return resolve_model(config.model, callback.say)


def _chat_format(
    config: RunConfig, tokenizer: Any, model_config: Any, generation_config: Any, checkpoint: Checkpoint | None
) -> ChatFormat:
    """Choose the chat format; a resumed run keeps its own."""
    begun = checkpoint.plan.get("chat_format") if checkpoint else None
    if begun is None:
        stop_ids = stop_tokens(tokenizer, generation_config if stop_tokens(generation_config) else model_config)
        return choose_chat_format(tokenizer, config.model.chat_template, date=config.data.date, stop_ids=stop_ids)
    chat_format = ChatFormat.from_json(begun)
    if chat_format.template is not None:
        tokenizer.chat_template = chat_format.template
    if chat_format.date and config.data.date:
        return replace(chat_format, date=config.data.date)
    return chat_format


def _refuse_folder_of_model(config: RunConfig, model: ResolvedModel) -> None:
    """Refuse a run's folder that contains the model: moving an earlier run would move the model."""
    run_folder = Path(config.run_folder).resolve()
    if run_folder in (model.folder.resolve(), *model.folder.resolve().parents):
        raise ConfigError(
            f"The model {model.folder} lies in the folder that this run would write to, {config.run_folder}.",
            "Choose another training.output_dir.",
        )


def _with_first_start(plan: RunPlan, begun: Mapping[str, Any]) -> RunPlan:
    """Return the plan with the model's folder, notes and verdicts of the run's first start."""
    verdicts = tuple(Decided(**verdict) for verdict in begun["verdicts"]) if "verdicts" in begun else plan.verdicts
    return replace(plan, model_folder=begun["model_folder"], notes=tuple(begun["notes"]), verdicts=verdicts)


def _model_of(checkpoint: Checkpoint) -> ResolvedModel:
    return ResolvedModel(
        folder=checkpoint.folder,
        name=checkpoint.plan["model_name"],
        source=checkpoint.plan["model_source"],
        used_fallback=False,
    )
