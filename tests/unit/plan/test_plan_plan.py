"""The plan as a whole: counts, ledger, `plan.json`, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sophia_galore.config.schema import RunConfig
from sophia_galore.data.dataset import Dataset, DataSummary, PartSummary
from sophia_galore.data.example import Example
from sophia_galore.errors import ConfigError
from sophia_galore.model.source import ResolvedModel
from sophia_galore.plan.detect import model_facts
from sophia_galore.plan.facts import Facts, Param
from sophia_galore.plan.plan import RunPlan, make_plan

SHAPES = {"embed.weight": (320, 64), "down.weight": (64, 96), "norm.weight": (64,)}
NUM_PARAMETERS = 320 * 64 + 64 * 96 + 64


def make_dataset(num_train: int, num_eval: int, largest_token: int) -> Dataset:
    part = PartSummary(0, 0, 0, 0, 0, 0, 0, 0)
    examples = [Example.of([1, largest_token], [False, True], "x")] * (num_train + num_eval)
    summary = DataSummary(part, part, 0)
    return Dataset(examples[:num_train], examples[num_train:], "alpaca", summary, "f" * 64)


def plan_for(
    values: dict[str, Any] | None = None,
    *,
    num_train: int = 18,
    num_eval: int = 4,
    largest_token: int = 319,
    used_fallback: bool = False,
    **model_config: Any,
) -> RunPlan:
    given = {"optimizer": {"galore": {"rank": 8}}, **(values or {})}
    config = RunConfig.model_validate(given)
    known = SimpleNamespace(
        **{"model_type": "llama", "max_position_embeddings": 512, "vocab_size": 320, **model_config}
    )
    facts = Facts(
        config,
        model=model_facts(known, name="m", instead_of=config.model.name if used_fallback else ""),
        parameters=tuple(Param(name, shape, is_head=name == "embed.weight") for name, shape in SHAPES.items()),
    )
    return make_plan(
        facts,
        model=ResolvedModel(Path("/models/m"), "m", "local", used_fallback),
        dataset=make_dataset(num_train, num_eval, largest_token),
    )


@pytest.mark.parametrize(
    ("training", "num_train", "steps_per_epoch", "num_steps"),
    [
        ({"batch_size": 2, "gradient_accumulation_steps": 2}, 16, 4, 4),
        ({"batch_size": 2, "gradient_accumulation_steps": 2}, 17, 5, 5),
        ({"batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 3}, 17, 5, 15),
        ({"batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 0.5}, 17, 5, 3),
        ({"batch_size": 1, "gradient_accumulation_steps": 8, "epochs": 0.001}, 100, 13, 1),
        ({"batch_size": 1, "gradient_accumulation_steps": 8, "max_steps": 7}, 1, 1, 7),
        ({"batch_size": 1, "gradient_accumulation_steps": 1, "epochs": 9, "max_steps": 2}, 5, 5, 2),
    ],
)
def test_steps(training: dict[str, Any], num_train: int, steps_per_epoch: int, num_steps: int) -> None:
    plan = plan_for({"training": training}, num_train=num_train)
    assert (plan.steps_per_epoch, plan.num_steps) == (steps_per_epoch, num_steps)
    assert (plan.num_train_examples, plan.num_eval_examples) == (num_train, 4)


@pytest.mark.parametrize(("store", "itemsize"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize("optimizer", ["galore", "adamw"])
def test_the_ledger_adds_up(store: str, itemsize: int, optimizer: str) -> None:
    plan = plan_for({"model": {"store": store}, "optimizer": {"type": optimizer, "galore": {"rank": 8}}})
    assert plan.num_parameters == NUM_PARAMETERS
    assert plan.standing_bytes["weights"] == itemsize * NUM_PARAMETERS
    assert plan.standing_bytes["optimizer state"] == sum(route.state_bytes for route in plan.routes)
    assert plan.standing_bytes["projections"] == sum(route.projection_bytes for route in plan.routes)
    if optimizer == "adamw":
        assert plan.standing_bytes["optimizer state"] == 8 * NUM_PARAMETERS
        assert plan.standing_bytes["projections"] == 0
    else:
        # Two moments in the subspace or, for the norm, whole; bases of 64 x 8 in bf16.
        assert plan.standing_bytes["optimizer state"] == 8 * (320 * 8 + 8 * 96 + 64)
        assert plan.standing_bytes["projections"] == 2 * (64 * 8 + 64 * 8)


def test_plan_json_says_everything_of_every_parameter() -> None:
    plan = plan_for({"training": {"weight_decay": 0.1, "learning_rate": 0.01}})
    written = json.loads(json.dumps(plan.to_json()))
    assert written["model_name"] == "m" and written["model_folder"] == str(Path("/models/m"))
    assert (written["device"], written["compute_dtype"], written["optimizer"]) == ("cpu", "float32", "galore")
    assert written["data_fingerprint"] == "f" * 64
    assert written["num_parameters"] == written["num_trained_parameters"] == NUM_PARAMETERS
    assert written["bytes"] == plan.standing_bytes
    assert [route["name"] for route in written["routes"]] == list(SHAPES)
    embed, down, norm = written["routes"]
    assert embed["shape"] == [320, 64] and down["shape"] == [64, 96] and norm["shape"] == [64]
    assert (embed["rule"], embed["rank"], embed["subspace"]["offset"], embed["learning_rate"]) == ("galore", 8, 0, 0.01)
    assert (down["rule"], down["subspace"]["offset"]) == ("galore", 100)
    assert (norm["rule"], norm["rank"], norm["subspace"], norm["learning_rate"]) == ("adamw", None, None, 0.0025)
    assert [route["side"] for route in written["routes"]] == ["right", "left", None]
    assert [route["weight_decay"] for route in written["routes"]] == [0.1, 0.1, 0.0]
    assert sum(route["state_bytes"] for route in written["routes"]) == written["bytes"]["optimizer state"]
    assert all(route["trained"] is True and route["why"] and route["format"] == "fp32" for route in written["routes"])


@pytest.mark.parametrize(
    ("values", "more", "cause", "remedy"),
    [
        ({"training": {"max_length": 513}}, {}, "max_length is 513, but the model knows 512", "max_length=512"),
        ({}, {"largest_token": 320}, "hold token 320, but the model's embedding only 320 rows", "tokenizer"),
        (
            {"training": {"warmup_steps": 3, "batch_size": 8, "gradient_accumulation_steps": 1}},
            {},
            "warmup_steps is 3, but the run has only 3 steps",
            "Lower training.warmup_steps",
        ),
        (
            {"training": {"max_grad_norm": 1, "clip_by": "model"}, "optimizer": {"galore": {"rank": 64}}},
            {},
            "would keep 100% of all gradients",
            "Lower optimizer.galore.rank",
        ),
    ],
    ids=["positions", "vocabulary", "warm-up", "clipping"],
)
def test_what_does_not_fit_is_refused(values: dict[str, Any], more: dict[str, Any], cause: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_for(values, **more)
    assert cause in caught.value.cause
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("values", "more"),
    [
        ({"training": {"max_length": 512}}, {}),
        ({"training": {"max_length": 9999}}, {"max_position_embeddings": None}),
        ({}, {"vocab_size": 320}),
        ({"training": {"warmup_steps": 2, "batch_size": 8, "gradient_accumulation_steps": 1}}, {}),
        ({}, {"num_eval": 0}),
    ],
)
def test_what_just_fits_is_accepted(values: dict[str, Any], more: dict[str, Any]) -> None:
    assert plan_for(values, **more).num_steps > 0


@pytest.mark.parametrize(
    ("values", "more", "words"),
    [
        ({}, {}, []),
        ({"training": {"max_grad_norm": 0.5}}, {}, ["gradient over the whole model is clipped to 0.5"]),
        ({"training": {"max_grad_norm": 0.5, "clip_by": "layer"}}, {}, ["clipped to 0.5 by itself"]),
        ({"training": {"max_grad_norm": 0.5}, "optimizer": {"type": "adamw"}}, {}, ["clipped to 0.5 by itself"]),
        ({"optimizer": {"galore": {"rank": 60, "fast_path": "always"}}}, {}, ["No matrix is large enough"]),
        # Nothing is projected: kept until the norm is known, gradients would be kept in full size.
        (
            {"training": {"max_grad_norm": 0.5}, "optimizer": {"galore": {"rank": 64}}},
            {},
            ["No matrix has both sides above the rank", "clipped to 0.5 by itself"],
        ),
        ({"training": {"compute_dtype": "bf16"}}, {}, ["bf16 arithmetic is slower than fp32 on a CPU"]),
        ({}, {"used_fallback": True}, ["No source could be reached for smollm2-135m: m is trained instead"]),
        (
            {"training": {"max_grad_norm": 1, "compute_dtype": "fp16"}},
            {"used_fallback": True},
            ["is scaled", "fp16 arithmetic is slower", "trained instead", "clipped"],
        ),
    ],
)
def test_notes_say_what_the_user_should_know(values: dict[str, Any], more: dict[str, Any], words: list[str]) -> None:
    plan = plan_for(values, **more)
    notes = plan.notes
    assert notes == tuple(verdict.sentence() for verdict in plan.verdicts)
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))
