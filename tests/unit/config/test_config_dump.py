"""What is written down loads back: for any valid configuration, not only for those we thought of."""

from __future__ import annotations

import json
import tempfile
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sophia_galore.config import RunConfig, dump_config, load_config
from sophia_galore.config.check import contradictions
from sophia_galore.config.dump import config_reference, flatten
from sophia_galore.config.keys import keys
from sophia_galore.config.paths import PATH_KEYS, named_paths
from sophia_galore.config.schema_data import DataSource
from sophia_galore.config.schema_optimizer import OptimizerConfig
from sophia_galore.config.size import LEAST_BYTES, Size, SizeOrZero

# Where the type allows more than the rules: without these most random configurations would be refused.
NARROWED: dict[str, st.SearchStrategy[Any]] = {
    "data.date": st.none() | st.dates().map(str),
    "training.warmup_steps": st.integers(0, 3),
    "training.clip_by": st.just("auto"),
    "training.learning_rate": st.none() | st.floats(1e-12, 10),
    "optimizer.betas": st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
    "quantization.enabled": st.sampled_from([None, False]),
    "quantization.load_in_8bit": st.sampled_from([None, False]),
}


def values_of(annotation: Any, limits: dict[str, Any]) -> st.SearchStrategy[Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation == Size:
        return st.integers(LEAST_BYTES, 2**63 - 1)
    if annotation == SizeOrZero:
        return st.just(0) | values_of(Size, {})
    if origin is typing.Annotated:
        return values_of(arguments[0], limits_in(arguments[1].metadata))
    if origin in (typing.Union, types.UnionType):
        if any(DataSource in typing.get_args(argument) for argument in arguments):
            limits = {**limits, "min_length": 1}
        return st.one_of(*(values_of(argument, limits) for argument in arguments))
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        least = 1 if arguments[0] is DataSource else 0
        return st.lists(values_of(arguments[0], {}), min_size=least, max_size=3).map(tuple)
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        top = limits["lt"] - 1 if "lt" in limits else limits.get("le")
        return st.integers(limits.get("ge", 0), top)
    if annotation is float:
        low, high = limits.get("ge", limits.get("gt", 0)), limits.get("lt", limits.get("le"))
        return st.floats(low, high, exclude_min="gt" in limits, exclude_max="lt" in limits, allow_infinity=False)
    if annotation is DataSource:
        return st.builds(
            DataSource,
            path=st.text(min_size=1),
            weight=st.floats(0, 1000, exclude_min=True),
            max_examples=st.none() | st.integers(1, 10**6),
            format=st.sampled_from([None, "alpaca", "text"]),
        )
    assert annotation is str, annotation
    return st.text(min_size=limits.get("min_length", 0))


def field_of(name: str) -> Any:
    model: Any = RunConfig
    *path, last = name.split(".")
    for word in path:
        model = model.model_fields[word].annotation
    return model.model_fields[last]


def limits_in(metadata: list[Any]) -> dict[str, Any]:
    names = ("ge", "gt", "le", "lt", "min_length")
    return {n: getattr(c, n) for c in metadata for n in names if getattr(c, n, None) is not None}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        section = root
        for word in path:
            section = section.setdefault(word, {})
        section[last] = value
    return root


def paths_in(config: RunConfig) -> list[str]:
    values = flatten(config)
    return [str(path) for key in PATH_KEYS for path in named_paths(values[key])]


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    choices = {
        name: values_of(key.annotation, limits_in(field_of(name).metadata)) for name, key in keys().items()
    } | NARROWED
    flat = draw(st.fixed_dictionaries({}, optional=choices))
    if flat.get("data.eval") is not None:
        flat.pop("data.eval_fraction", None)
    if not flat.get("training.gradient_checkpointing", True):
        flat.pop("engine.keep_layers", None)
    config = RunConfig.model_validate(nested(flat))
    # What was read from a file has a home folder's name in place of "~".
    assume(not any(path.startswith("~") for path in paths_in(config)))
    assume(not contradictions(config))
    return config


def through_a_file(text: str) -> RunConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(text, encoding="utf-8", newline="")
        return load_config(path)


def named(name: str) -> RunConfig:
    return RunConfig.model_validate({"model": {"name": name}})


@settings(max_examples=60, deadline=None)
@given(configs())
@example(RunConfig())
@example(RunConfig.model_validate({"data": {"eval": "x.json"}}))
@example(RunConfig.model_validate({"data": {"eval": "x.json", "eval_fraction": 0.0}}))
@example(RunConfig.model_validate({"training": {"gradient_checkpointing": False}}))
@example(
    RunConfig.model_validate({"training": {"gradient_checkpointing": False}, "engine": {"full_gradients": "matrix"}})
)
@example(RunConfig.model_validate({"engine": {"keep_layers": "auto"}}))
@example(RunConfig.model_validate({"training": {"sample_questions": ("1e-3", "yes", "a: b", "# c", "- d", "")}}))
@example(RunConfig.model_validate({"model": {"name": "a$HOME${x}$$"}, "training": {"output_dir": "{{x}}/$1"}}))
@example(RunConfig.model_validate({"model": {"name": "a\x85b"}, "data": {"train": "\u2028"}}))
def test_a_dump_loads_back_to_an_equal_configuration(config: RunConfig) -> None:
    assert through_a_file(dump_config(config)) == config


LOOKS = ["1e-3", "yes", "010", "2024-01-01", "=", "<<", "$HOME/x", "a$$b", "null", "1:30", "*a", "a: b", " a "]


@pytest.mark.parametrize("text", [*LOOKS, "\u00e9\U0001f600", "\x85\x07\n", "@x", "'\""])
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    dumped = dump_config(named(text))
    assert through_a_file(dumped).model.name == text
    # Readers of YAML 1.1 get it right too; a dollar is written as our own reader wants it.
    assert yaml.safe_load(dumped)["model"]["name"] == text.replace("$", "$$")


@settings(max_examples=20, deadline=None)
@given(configs())
def test_numbers_as_overrides_arrive_exactly(config: RunConfig) -> None:
    implied = {"data.eval_fraction": config.data.eval is not None}
    implied["engine.keep_layers"] = not config.training.gradient_checkpointing
    # A number of layers that stay contradicts a placement that is left out, and the placement is a word.
    implied["memory.resident_layers"] = True
    numbers = {
        name: value
        for name, value in flatten(config).items()
        if isinstance(value, int | float) and not implied.get(name, False)
    }
    loaded = flatten(load_config(None, [f"{name}={json.dumps(value)}" for name, value in numbers.items()]))
    assert {name: loaded[name] for name in numbers} == numbers


def test_flatten_has_every_key_once() -> None:
    flat = flatten(RunConfig())
    assert flat.keys() == keys().keys()
    assert flat["optimizer.betas"] == OptimizerConfig().betas


def test_the_reference_has_a_row_for_every_key() -> None:
    table = config_reference()
    rows = table.splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(keys())
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)
    assert all(key.description for key in keys().values())
    assert "<class" not in table
    assert "typing." not in table
