"""Keys and values: what is accepted, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from sophia_galore.config import RunConfig, load_config
from sophia_galore.config.dump import flatten
from sophia_galore.errors import ConfigError

UNKNOWN: dict[str, str] = {
    "optimizer.rank": "optimizer.galore.rank",
    "optimiser.type": "optimizer.type",
    "trainning": "training",
    "training.sed": "training.seed",
    "training.batchsize": "training.batch_size",
    "model.train": "data.train",
    "training.betas": "optimizer.betas",
    "per_device_batch_size": "training.batch_size",
    "warmup_step": "training.warmup_steps",
    "lr": "training.learning_rate",
    "training.optimizer": "optimizer.type",
    "optimizer.galore.update-proj-gap": "optimizer.galore.update_proj_gap",
    "optimizer.optim": "optimizer.type",
}

REFUSED: list[tuple[str, str, list[str]]] = [
    ("training.seed", "1.5", ["whole number", "1.5", "42"]),
    ("training.seed", "-1", ["at least 0", "-1"]),
    ("training.seed", str(2**63), ["below 9223372036854775808"]),
    ("training.max_steps", "true", ["whole number", "got true"]),
    ("training.max_steps", '"10"', ["without quotes"]),
    ("training.max_steps", "1,000", ["underscores"]),
    ("training.output_dir", "{model}", ["begins with { needs quotes"]),
    ("training.output_dir", "~", ["your home folder is ~/"]),
    ("training.max_steps", "[1]", ["whole number", "[1]"]),
    ("training.max_steps", "null", ["whole number", "got null"]),
    ("training.learning_rate", "true", ["number above 0", "or null", "got true"]),
    ("training.learning_rate", ".inf", ["finite"]),
    ("training.learning_rate", "1" + "0" * 400, ["finite", "..."]),
    ("training.weight_decay", ".nan", ["finite"]),
    ("training.epochs", "nan", ["finite"]),
    ("training.epochs", "0", ["above 0"]),
    ("training.gradient_checkpointing", "yes", ["true or false", '"yes"', "Write true or false"]),
    ("training.gradient_checkpointing", "1", ["true or false"]),
    ("engine.keep_layers", "-1", ["a whole number of at least 0 or auto", "-1"]),
    ("engine.keep_layers", "true", ["whole number", "got true"]),
    ("training.compute_dtype", "bf61", ["auto, fp32, bf16, fp16", "Did you mean bf16?"]),
    ("training.compute_dtype", "[bf16]", ["one of", '["bf16"]']),
    ("training.output_dir", "''", ["not empty"]),
    ("model.name", "123", ["takes text", '"123"', "in quotes"]),
    ("model.fallback", "false", ["takes text that is not empty, or null"]),
    ("model.name", "{a: 1}", ["takes text"]),
    ("data.eval_fraction", "1.0", ["below 1"]),
    ("optimizer.betas", "[0.9]", ["a list of 2 values", "[0.9]"]),
    ("optimizer.betas", "0.9", ["a list of 2 values"]),
    ("training.sample_questions", "why?", ["a list, each item text"]),
    ("training.sample_questions", "[1]", ["each item text"]),
    ("training.report_to", "all", ["each item one of tensorboard, trackio, wandb, mlflow", '"all"']),
    ("training.report_to", "tensorbord", ["Did you mean tensorboard?"]),
    ("training.report_to", "[wandb, none]", ['["wandb", "none"]']),
    ("training.report_to", "[3]", ["a list", "[3]"]),
    ("training.report_to", "null", ["a list", "got null"]),
]

ACCEPTED: list[tuple[str, str, object]] = [
    ("training.learning_rate", "1e-3", 1e-3),
    ("training.learning_rate", "1E-3", 1e-3),
    ("training.learning_rate", "+.5e-2", 5e-3),
    ("training.learning_rate", "1", 1.0),
    ("training.learning_rate", "null", None),
    ("training.learning_rate", "~", None),
    ("optimizer.eps", "1e-12", 1e-12),
    ("training.max_steps", "1e3", 1000),
    ("training.max_steps", "20.0", 20),
    ("training.max_steps", "010", 10),  # not eight, as in YAML 1.1
    ("training.max_steps", "1_000", 1000),
    ("training.gradient_checkpointing", "True", True),
    ("engine.keep_layers", "auto", "auto"),
    ("engine.keep_layers", "1e1", 10),
    ("model.name", "yes", "yes"),
    ("model.name", "1:30", "1:30"),
    ("model.name", "2024-01-01", "2024-01-01"),
    ("model.name", "'1e-3'", "1e-3"),
    ("model.name", "Qwen/Qwen2-0.5B", "Qwen/Qwen2-0.5B"),
    ("optimizer.betas", "[0, 9e-1]", (0.0, 0.9)),
    ("training.sample_questions", "[a, 'b: c']", ("a", "b: c")),
    ("training.report_to", "none", ()),
    ("training.report_to", "[none]", ()),
    ("training.report_to", "[]", ()),
    ("training.report_to", "trackio", ("trackio",)),
    ("training.report_to", "[wandb, mlflow, wandb]", ("wandb", "mlflow")),
]


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("key", UNKNOWN)
def test_an_unknown_key_gets_the_nearest_known_one(tmp_path: Path, key: str) -> None:
    for path, words, place in (
        (write(tmp_path, f"# a comment\n{key}: 1\n"), (), "run.yaml:2"),
        (None, (f"{key}=1",), f"in the override '{key}=1'"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(path, words)
        assert place in caught.value.cause
        assert f"'{key}'" in caught.value.cause
        assert caught.value.remedy == f"Did you mean {UNKNOWN[key]}?"


def test_an_unknown_key_like_no_other_gets_the_list(tmp_path: Path) -> None:
    known = "limit, reserve, on_oom, placement, resident_layers, host_limit, activations, prefetch, predict"
    with pytest.raises(ConfigError, match=f"Known under memory: {known}, logits_chunk_mib, track_steps"):
        load_config(None, ["memory.zzzzzz=1"])
    with pytest.raises(ConfigError, match="Known sections: model, data"):
        load_config(None, ["zzzzzz=1"])


@pytest.mark.parametrize(("key", "value", "expected"), REFUSED)
def test_a_refused_value_says_what_is_accepted(tmp_path: Path, key: str, value: str, expected: list[str]) -> None:
    for path, words, place in (
        (write(tmp_path, f"\n{key}: {value}\n"), (), "run.yaml:2"),
        (None, (f"{key}={value}",), "in the override"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(path, words)
        message = str(caught.value)
        for part in (place, key, *expected):
            assert part in message
        assert "pydantic" not in message
        assert "Input should" not in message


@pytest.mark.parametrize(("key", "value", "expected"), ACCEPTED)
def test_an_accepted_value_means_what_was_written(tmp_path: Path, key: str, value: str, expected: object) -> None:
    for config in (load_config(write(tmp_path, f"{key}: {value}\n")), load_config(None, [f"{key}={value}"])):
        got = flatten(config)[key]
        assert got == expected
        assert type(got) is type(expected)


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "optimizer:\n  rank: 8\n  eps: -1\ntraining:\n  seed: x\n  max_steps: true\n  epochs: 0\n  sed: 1\n  lr: 1\n"
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    message = str(caught.value)
    assert message.startswith("7 problems")
    places = [message.index(f"run.yaml:{line}:") for line in (2, 3, 5, 6, 7)]
    assert places == sorted(places)
    assert "and 2 more" in message


BAD_WORDS = [
    ("foo", "key=value"),
    ("=3", "key=value"),
    ("training.seed=", "training.seed=null"),
    ("data.train=@x", "needs quotes"),
    ("data.train=[a", "never closed"),
    ("optimizer=galore", "optimizer is a section"),
]


@pytest.mark.parametrize(("word", "expected"), BAD_WORDS)
def test_a_bad_override_is_quoted(word: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [word])
    assert f"in the override '{word}'" in caught.value.cause
    assert expected in str(caught.value)


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    path = write(tmp_path, "training:\n  seed: 1\n  epochs: 3\n")
    config = load_config(path, ["training.seed=2", "training.seed=3", "optimizer.galore={rank: 4, scale: 1}"])
    assert (config.training.seed, config.training.epochs) == (3, 3.0)
    assert (config.optimizer.galore.rank, config.optimizer.galore.scale) == (4, 1.0)


def test_a_value_may_hold_an_equals_sign_and_null() -> None:
    assert load_config(None, ["data.train=a=b"]).data.train == "a=b"
    assert load_config(None, ["data.eval=null"]).data.eval is None


def test_dotted_keys_work_in_a_file_too(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "optimizer.galore.rank: 7\n")).optimizer.galore.rank == 7
    with pytest.raises(ConfigError, match="both mean the same key"):
        load_config(write(tmp_path, "training.seed: 7\ntraining:\n  seed: 8\n"))


def test_only_what_was_given_counts_as_given() -> None:
    config = load_config(None, ["training.seed=3"])
    assert config.model_fields_set == {"training"}
    assert config.training.model_fields_set == {"seed"}
    assert RunConfig().model_fields_set == set()


@pytest.mark.parametrize("key", flatten(RunConfig()))
def test_no_key_takes_an_empty_text(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load_config(None, [f"{key}=''"])
