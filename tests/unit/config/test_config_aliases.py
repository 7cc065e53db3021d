"""Hugging Face names: each reaches its key, and none is accepted and ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from sophia_galore.config import load_config
from sophia_galore.config.aliases import ALIASES
from sophia_galore.config.dump import flatten
from sophia_galore.config.keys import keys
from sophia_galore.errors import ConfigError

# alias: (value as written, our value)
EXAMPLES: dict[str, tuple[str, object]] = {
    "model_name_or_path": ("gpt2", "gpt2"),
    "trust_remote_code": ("true", True),
    "train_file": ("a.json", "a.json"),
    "validation_file": ("b.json", "b.json"),
    "max_train_samples": ("5", 5),
    "max_eval_samples": ("6", 6),
    "packing": ("true", True),
    "group_by_length": ("true", True),
    "train_sampling_strategy": ("group_by_length", True),
    "output_dir": ("out", "out"),
    "seed": ("7", 7),
    "num_train_epochs": ("2", 2.0),
    "max_steps": ("-1", 0),
    "per_device_train_batch_size": ("3", 3),
    "gradient_accumulation_steps": ("2", 2),
    "learning_rate": ("2e-5", 2e-5),
    "lr_scheduler_type": ("linear", "linear"),
    "warmup_steps": ("9", 9),
    "weight_decay": ("1e-2", 0.01),
    "max_grad_norm": ("1.0", 1.0),
    "gradient_checkpointing": ("true", True),
    "max_seq_length": ("256", 256),
    "max_length": ("256", 256),
    "cutoff_len": ("256", 256),
    "bf16": ("true", "bf16"),
    "fp16": ("true", "fp16"),
    "fp32": ("true", "fp32"),
    "logging_steps": ("10", 10),
    "report_to": ("wandb", ("wandb",)),
    "eval_steps": ("11", 11),
    "save_steps": ("12", 12),
    "save_total_limit": ("4", 4),
    "optim": ("adamw_torch", "adamw"),
    "adam_epsilon": ("1e-6", 1e-6),
    "load_in_8bit": ("false", False),
    "early_stopping_patience": ("3", 3),
    "early_stopping_threshold": ("0.01", 0.01),
    "load_best_model_at_end": ("true", True),
    "neftune_noise_alpha": ("5", 5.0),
    "unfrozen_parameters": ('["*norm*"]', ("*norm*",)),
}


# Keys without which another one would do nothing.
NEEDED = {"early_stopping_threshold": ("early_stopping_patience", "2")}


def test_every_alias_has_an_example_and_a_field() -> None:
    assert set(EXAMPLES) == set(ALIASES)
    assert {alias.target for alias in ALIASES.values()} <= set(keys())


@pytest.mark.parametrize("prefix", ["", "training."])
@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_reaches_its_key(tmp_path: Path, name: str, prefix: str) -> None:
    value, expected = EXAMPLES[name]
    if prefix and name == "max_steps":
        value = "0"  # there it is our own key, whose "off" is 0
    path = tmp_path / "run.yaml"
    given = {f"{prefix}{name}": value, **dict([NEEDED[name]] if name in NEEDED else [])}
    path.write_text("".join(f"{key}: {text}\n" for key, text in given.items()))
    for config in (load_config(path), load_config(None, [f"{key}={text}" for key, text in given.items()])):
        assert flatten(config)[ALIASES[name].target] == expected


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("adamw", "adamw"),
        ("adamw_torch", "adamw"),
        ("galore_adamw", "galore"),
        ("galore_adamw_layerwise", "galore"),
    ],
)
def test_optimizer_names(theirs: str, ours: str) -> None:
    assert load_config(None, [f"optim={theirs}"]).optimizer.type == ours


CONFLICTS: list[tuple[str, list[str]]] = [
    (
        "per_device_train_batch_size: 4\ntraining:\n  batch_size: 8\n",
        ["run.yaml:3", "batch_size is 8", "per_device_train_batch_size", "is 4", "run.yaml:1"],
    ),
    ("seed: 1\ntraining:\n  seed: 2\n", ["run.yaml:3", "run.yaml:1"]),
    ("bf16: true\nfp16: true\n", ["run.yaml:2", "fp16", "bf16"]),
    ("max_length: 5\ncutoff_len: 6\n", ["max_length", "cutoff_len"]),
    ("bf16: false\ntraining:\n  compute_dtype: bf16\n", ["run.yaml:1", "bf16 is false", "run.yaml:3"]),
    ("trust_remote_code: true\nmodel:\n  trust_remote_code: false\n", ["run.yaml:3"]),
    ("optim: adafactor\n", ["run.yaml:1", "adamw_torch", "galore_adamw_layerwise", "adafactor"]),
    ("bf16: yes\n", ["run.yaml:1", "true, false", '"yes"']),
    ("fp16: 1\n", ["run.yaml:1", "true, false"]),
    ("metric_for_best_model: eval_accuracy\n", ["run.yaml:1", '"eval_loss" or "loss" only', '"eval_accuracy"']),
    ("training:\n  metric_for_best_model: null\n", ["run.yaml:2", "training.metric_for_best_model", "null"]),
    ("greater_is_better: true\n", ["run.yaml:1", "greater_is_better takes false only; got true", "lowest"]),
    ("greater_is_better: 0\n", ["run.yaml:1", "takes false only; got 0"]),
    ("per_device_train_batch_size: 0\n", ["per_device_train_batch_size (training.batch_size)", "at least 1"]),
]


@pytest.mark.parametrize(("text", "expected"), CONFLICTS)
def test_aliases_that_contradict_are_refused(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for part in expected:
        assert part in str(caught.value)


def test_alias_and_key_may_agree(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("per_device_train_batch_size: 4\nbf16: false\nfp16: true\ntraining:\n  batch_size: 4\n")
    config = load_config(path)
    assert config.training.batch_size == 4
    assert config.training.compute_dtype == "fp16"


def test_an_override_may_contradict_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-3\nbf16: false\n")
    config = load_config(path, ["training.learning_rate=2e-3", "learning_rate=3e-3", "training.compute_dtype=bf16"])
    assert config.training.learning_rate == 3e-3
    assert config.training.compute_dtype == "bf16"


def test_a_flag_turned_off_on_the_command_line_is_not_ignored(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training:\n  compute_dtype: bf16\n")
    with pytest.raises(ConfigError, match="bf16 is false"):
        load_config(path, ["bf16=false"])


@pytest.mark.parametrize("prefix", ["", "training."])
def test_what_is_always_so_may_be_said(prefix: str) -> None:
    words = [
        f"{prefix}metric_for_best_model=eval_loss",
        f"{prefix}greater_is_better=false",
        "metric_for_best_model=loss",
    ]
    assert load_config(None, words) == load_config(None)
