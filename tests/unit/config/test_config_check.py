"""Contradictions: every rule fires, says why, and leaves its neighbours alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from sophia_galore.config import RunConfig, load_config
from sophia_galore.config.check import RULES, check, contradictions
from sophia_galore.config.keys import keys
from sophia_galore.errors import ConfigError

# rule: (words that break it, parts of the message, words one step away that do not)
CASES: dict[str, list[tuple[list[str], list[str], list[str]]]] = {
    "all_layers_or_some": [
        (
            ["gradient_checkpointing=false", "engine.keep_layers=2"],
            ["all layers", "keep_layers: 2"],
            ["gradient_checkpointing=true", "engine.keep_layers=2"],
        ),
        (
            ["gradient_checkpointing=false", "engine.keep_layers=auto"],
            ["keep_layers: auto"],
            ["engine.keep_layers=auto"],
        ),
        (
            ["gradient_checkpointing=false", "engine.keep_layers=0"],
            ["keep_layers: 0"],
            ["gradient_checkpointing=false"],
        ),
    ],
    "unknown_placeholder": [
        (
            ["training.output_dir=outputs/{optimiser}-{date}"],
            ["stand for {optimiser}", "{optimizer}, {model}, {date}"],
            ["training.output_dir=outputs/{optimizer}-{model}-{date}"],
        ),
        (["training.output_dir=a{}"], ["stand for {}"], ["training.output_dir=a{{}}"]),
    ],
    "int8_on_and_off": [
        (
            ["quantization.enabled=true", "load_in_8bit=false"],
            ["enabled: true", "load_in_8bit: false", "only kind"],
            ["quantization.enabled=false", "load_in_8bit=true"],
        ),
    ],
    "shard_state_deferred": [
        (
            ["distributed.shard_state=true", "load_in_8bit=true", "quantization.fold=refresh"],
            ["distributed.shard_state: true", "quantization.fold: refresh"],
            ["distributed.shard_state=true", "load_in_8bit=true"],
        ),
    ],
    "shard_state_streamed": [
        (
            ["distributed.shard_state=true", "memory.placement=host"],
            ["distributed.shard_state: true", "memory.placement: host"],
            ["distributed.shard_state=true", "memory.placement=device"],
        ),
        (
            ["distributed.shard_state=true", "memory.placement=disk"],
            ["memory.placement: disk"],
            ["distributed.shard_state=true", "memory.placement=auto"],
        ),
    ],
    "fold_refresh": [
        (
            ["load_in_8bit=true", "quantization.fold=refresh", "optimizer.type=adamw"],
            ["fold: refresh", "optimizer.type: adamw"],
            ["load_in_8bit=true", "quantization.fold=refresh", "optimizer.type=galore"],
        ),
        (
            ["load_in_8bit=true", "quantization.fold=refresh", "optimizer.galore.residual=fira"],
            ["residual: fira"],
            ["quantization.fold=refresh", "optimizer.galore.residual=fira"],
        ),
        (
            ["load_in_8bit=true", "quantization.fold=refresh", "optimizer.galore.subspace=random"],
            ["subspace: random"],
            ["load_in_8bit=true", "quantization.fold=refresh", "optimizer.galore.subspace=svd"],
        ),
    ],
    "native_only": [
        (
            ["load_in_8bit=true", "quantization.backend=bitsandbytes", "quantization.block_size=64"],
            ["quantization.block_size", "would do nothing"],
            ["load_in_8bit=true", "quantization.backend=bitsandbytes"],
        ),
        (
            ["load_in_8bit=true", "quantization.backend=bitsandbytes", "quantization.rounding=nearest"],
            ["quantization.rounding"],
            ["quantization.backend=bitsandbytes", "quantization.rounding=nearest"],
        ),
    ],
    "nothing_to_stop_by": [
        (
            ["early_stopping_patience=3", "data.eval_fraction=0"],
            ["early_stopping_patience", "nothing to evaluate on"],
            ["early_stopping_patience=3", "data.eval_fraction=0", "data.eval=other.json"],
        ),
    ],
    "threshold_alone": [
        (
            ["early_stopping_threshold=0.5"],
            ["early_stopping_threshold (0.5)", "early_stopping_patience"],
            ["early_stopping_threshold=0.5", "early_stopping_patience=1"],
        ),
    ],
    "nothing_to_choose_by": [
        (
            ["load_best_model_at_end=true", "data.eval_fraction=0"],
            ["load_best_model", "nothing to evaluate on"],
            ["load_best_model_at_end=true"],
        ),
    ],
    "trains_nothing": [
        (["training.trainable=[]"], ["trainable is empty"], ["training.trainable=null"]),
    ],
    "betas": [
        (["optimizer.betas=[0.9, 1]"], ["below 1"], ["optimizer.betas=[0, 0.9999]"]),
        (["optimizer.betas=[-0.1, 0.9]"], ["at least 0"], ["optimizer.betas=[0.0, 0.0]"]),
    ],
    "adaptive_random": [
        (
            ["optimizer.galore.adaptive_gap=true", "optimizer.galore.subspace=random"],
            ["adaptive_gap", "drawn anew"],
            ["optimizer.galore.adaptive_gap=true", "optimizer.galore.subspace=svd"],
        )
    ],
    "fast_residual": [
        (
            ["optimizer.galore.fast_path=always", "optimizer.galore.residual=fira"],
            ["residual: fira"],
            ["optimizer.galore.fast_path=auto", "optimizer.galore.residual=fira"],
        )
    ],
    "fast_clipping": [
        (
            ["optimizer.galore.fast_path=always", "max_grad_norm=0.5"],
            ["max_grad_norm: 0.5", "exact"],
            ["optimizer.galore.fast_path=auto", "max_grad_norm=0.5"],
        )
    ],
    "clip_by_nothing": [
        (
            ["training.clip_by=layer"],
            ["clip_by: layer", "0, which is off"],
            ["training.clip_by=layer", "max_grad_norm=1"],
        ),
    ],
    "clip_by_model": [
        (
            ["training.clip_by=model", "max_grad_norm=1", "optimizer.type=adamw"],
            ["optimizer.type: adamw", "norm over them"],
            ["training.clip_by=model", "max_grad_norm=1", "optimizer.type=galore"],
        ),
        (
            ["training.clip_by=model", "max_grad_norm=1", "optimizer.galore.residual=fira"],
            ["residual: fira"],
            ["training.clip_by=layer", "max_grad_norm=1", "optimizer.galore.residual=fira"],
        ),
    ],
    "warmup_fills_the_run": [
        (
            ["training.max_steps=5", "training.warmup_steps=5"],
            ["warmup_steps (5)", "max_steps (5)"],
            ["training.max_steps=5", "training.warmup_steps=4"],
        ),
        (["max_steps=1", "warmup_steps=9"], ["warm-up"], ["max_steps=0", "warmup_steps=9"]),
    ],
    "constant_with_warmup": [
        (
            ["lr_scheduler_type=constant", "warmup_steps=3"],
            ["constant_with_warmup", "is 3"],
            ["lr_scheduler_type=constant_with_warmup", "warmup_steps=3"],
        )
    ],
    "two_eval_sources": [
        (
            ["data.eval=x.json", "data.eval_fraction=0.05"],
            ["data.eval", "0.05", "Remove"],
            ["data.eval=x.json", "data.eval_fraction=0"],
        ),
        (["data.eval=x.json", "data.eval_fraction=0.2"], ["0.2"], ["data.eval=x.json"]),
    ],
    "nothing_to_evaluate": [
        (
            ["training.eval_every_steps=2", "data.eval_fraction=0"],
            ["nothing to evaluate"],
            ["training.eval_every_steps=2", "data.eval_fraction=0", "data.eval=x.json"],
        )
    ],
    "packed_and_grouped": [
        (
            ["data.packing=true", "data.group_by_length=true"],
            ["data.packing", "data.group_by_length", "Leave out"],
            ["data.packing=true"],
        )
    ],
    "resident_without_streaming": [
        (
            ["memory.resident_layers=2"],
            ["memory.resident_layers: 2", "memory.placement is auto"],
            ["memory.resident_layers=2", "memory.placement=host"],
        ),
        (
            ["memory.resident_layers=0", "memory.placement=device"],
            ["memory.resident_layers: 0", "memory.placement is device"],
            ["memory.resident_layers=auto", "memory.placement=device"],
        ),
    ],
    "keeps_what_streams": [
        (
            ["memory.placement=host", "memory.resident_layers=1", "engine.keep_layers=2"],
            ["memory.resident_layers: 1", "needs its layer's weights until backward"],
            ["memory.placement=host", "memory.resident_layers=2", "engine.keep_layers=2"],
        ),
        (
            ["memory.placement=disk", "gradient_checkpointing=false"],
            ["memory.resident_layers: auto"],
            ["memory.placement=auto", "gradient_checkpointing=false"],
        ),
    ],
    "adapts_what_waits": [
        (
            ["memory.activations=host", "memory.on_oom=adapt"],
            ["memory.on_oom: adapt", "memory.activations: host"],
            ["memory.activations=host", "memory.on_oom=stop"],
        ),
        (["memory.activations=disk", "memory.on_oom=adapt"], ["activations: disk"], ["memory.on_oom=adapt"]),
    ],
    "bitsandbytes_streams": [
        (
            ["memory.placement=host", "load_in_8bit=true", "quantization.backend=bitsandbytes"],
            ["memory.placement: host", "bitsandbytes holds"],
            ["memory.placement=host", "load_in_8bit=true", "quantization.backend=native"],
        ),
        (
            ["memory.placement=disk", "load_in_8bit=true", "quantization.backend=bitsandbytes"],
            ["memory.placement: disk"],
            ["memory.placement=auto", "load_in_8bit=true", "quantization.backend=bitsandbytes"],
        ),
    ],
    "reserve_takes_all": [
        (
            ["memory.limit=1GiB", "memory.reserve=2GiB"],
            ["memory.reserve (2.00 GiB) leaves nothing of memory.limit (1.00 GiB)"],
            ["memory.limit=3GiB", "memory.reserve=2GiB"],
        )
    ],
}
FLAT = [(rule, *case) for rule, cases in CASES.items() for case in cases]


def test_every_rule_has_a_case_and_known_keys() -> None:
    assert set(CASES) == set(RULES)
    assert {key for rule in RULES.values() for key in rule.keys} <= set(keys())


@pytest.mark.parametrize(("rule", "breaking", "expected", "fine"), FLAT)
def test_a_rule_fires_and_only_it(rule: str, breaking: list[str], expected: list[str], fine: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, breaking)
    for part in ("in the override", *expected):
        assert part in str(caught.value)
    assert caught.value.remedy == RULES[rule].remedy
    load_config(None, fine)


def test_the_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training:\n  max_steps: 5\n  warmup_steps: 7\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:3: training\.warmup_steps \(7\)"):
        load_config(path)


def test_several_contradictions_are_one_message() -> None:
    words = ["training.clip_by=layer", "gradient_checkpointing=false", "engine.keep_layers=1"]
    with pytest.raises(ConfigError, match="2 problems"):
        load_config(None, words)


def test_a_configuration_built_in_python_is_held_to_the_same_rules() -> None:
    check(RunConfig())
    config = RunConfig.model_validate({"training": {"clip_by": "layer"}})
    assert len(contradictions(config)) == 1
    with pytest.raises(ConfigError, match="clip_by"):
        check(config)


ALLOWED = [
    ["optim=adamw", "optimizer.galore.residual=fira", "optimizer.galore.fast_path=always"],
    ["optim=adamw", "optimizer.galore.rank=4"],
    ["training.max_steps=5", "training.epochs=3"],
    ["data.eval_fraction=0"],
]


@pytest.mark.parametrize("words", ALLOWED)
def test_what_is_documented_to_go_together_does(words: list[str]) -> None:
    load_config(None, words)
