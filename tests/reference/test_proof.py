"""The proof of an architecture: what is healthy is admitted, and what the engine would train wrongly is refused."""

from __future__ import annotations

import pytest
import transformers

from sophia_galore.engine.proof import TOLERANCE, prove
from strange_models import strange_config
from tiny import FAMILIES, more_families, tiny_config


@pytest.mark.parametrize("family", [*FAMILIES, *more_families()])
def test_families_that_the_tests_cover_are_proved_too(family: str) -> None:
    proof = prove(tiny_config(family))
    assert (proof.problem, proof.packing_problem) == ("", "")
    assert proof.parameter and proof.difference <= TOLERANCE and proof.num_layers >= 2
    # What a model itself fixes has no gradient.
    assert all("e_score_correction_bias" in name for name in proof.unreached)


# The last one has a norm inside the embedding, and a router that also weighs experts that all tokens go to.
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mamba2", "inkling_text"])
def test_twins_of_configurations_of_real_size_are_small(kind: str) -> None:
    proof = prove(transformers.CONFIG_MAPPING[kind]())
    assert proof.problem == "" and proof.num_parameters < 10_000_000


def test_a_healthy_copy_is_admitted() -> None:
    proof = prove(strange_config("same"))
    assert (proof.problem, proof.packing_problem, proof.unreached) == ("", "", ())
    assert 0 < proof.difference < 1e-6  # float32 on both sides, sums in another order
    assert proof.parameter.endswith("weight") and proof.num_parameters > 10_000


@pytest.mark.parametrize("name", ["scaled", "keys_of_another_layer", "weight_of_another_layer"])
def test_what_the_engine_does_not_see_is_refused_by_the_parameter(name: str) -> None:
    proof = prove(strange_config(name))
    assert f"this strange_{name} model would get wrong gradients" in proof.problem
    assert proof.parameter.startswith("model.") and proof.parameter in proof.problem
    assert proof.difference > 1e-3
    if name != "scaled":
        assert ".layers." in proof.parameter


def test_parameters_that_nothing_reaches_are_named_and_no_fault() -> None:
    proof = prove(strange_config("idle"))
    assert (proof.problem, proof.packing_problem) == ("", "")
    assert sorted(proof.unreached) == ["mlp.idle.weight", "model.nowhere"]


def test_a_parameter_that_only_some_layers_use_is_refused() -> None:
    assert "mlp.gain gets a gradient in some layers only" in prove(strange_config("uneven")).problem


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    for config in (strange_config("sees_later_tokens"), transformers.BertConfig(hidden_size=48, num_hidden_layers=2)):
        assert "is no causal language model: what it says of a token depends on the tokens behind" in (
            prove(config).problem
        )


def test_a_model_that_can_not_be_built_small_is_refused_with_the_reason() -> None:
    assert prove(strange_config("broken")).problem == (
        "No small twin of this strange_broken model runs (ValueError: this size is odd), so nothing is known of its "
        "gradients."
    )
