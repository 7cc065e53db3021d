"""Where the parts of a model are, for every family; what is not known is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from sophia_galore.errors import ModelError
from sophia_galore.model.architecture import SUPPORTED, check_supported, find_architecture
from tiny import FAMILIES, VOCAB, tiny_model

UNKNOWN: list[Any] = [
    transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=VOCAB),
    transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
    transformers.MixtralConfig(hidden_size=16, num_hidden_layers=1),
    transformers.T5Config(d_model=16, num_layers=1),
]


def test_the_table_names_every_family_that_is_tested() -> None:
    assert {tiny_model(family).config.model_type for family in FAMILIES} == set(SUPPORTED)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_are_the_models_own(family: str, tied: bool) -> None:
    model = tiny_model(family, tied=tied)
    architecture = find_architecture(model)
    parameters = dict(model.named_parameters())
    assert architecture.tied is tied
    assert parameters[architecture.embed_name] is architecture.embed.weight is model.get_input_embeddings().weight
    assert parameters[architecture.head_name] is architecture.head.weight is model.get_output_embeddings().weight
    assert (architecture.head_name == architecture.embed_name) is tied
    assert parameters[f"{architecture.norm_name}.weight"] is architecture.norm.weight
    assert len(architecture.layers) == len(architecture.layer_names) == 3
    for layer, name in zip(architecture.layers, architecture.layer_names, strict=True):
        assert all(parameters[f"{name}.{key}"] is value for key, value in layer.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_together_hold_every_parameter_once(family: str, tied: bool) -> None:
    model = tiny_model(family, tied=tied)
    architecture = find_architecture(model)
    shapes = architecture.parameter_shapes()
    parts = [architecture.embed_name, architecture.head_name, f"{architecture.norm_name}.weight"]
    parts += [name for name in shapes if name.startswith(tuple(f"{layer}." for layer in architecture.layer_names))]
    assert sorted(set(parts)) == sorted(shapes)
    assert len(parts) == len(shapes) + tied
    assert sum(shape.numel() for shape in shapes.values()) == sum(each.numel() for each in model.parameters())


def test_the_padding_row_is_kept_for_the_engine_and_taken_from_the_module() -> None:
    architecture = find_architecture(tiny_model("llama"))
    assert architecture.padding_idx == 2
    assert architecture.embed.padding_idx is None


@pytest.mark.parametrize(("family", "cap"), [("gemma2", 30.0), ("llama", None)])
def test_the_cap_of_the_logits(family: str, cap: float | None) -> None:
    assert find_architecture(tiny_model(family)).logit_softcap == cap


@pytest.mark.parametrize(("dropout", "has_dropout"), [(0.0, False), (0.1, True)])
def test_dropout_is_noticed(dropout: float, has_dropout: bool) -> None:
    assert find_architecture(tiny_model("llama", attention_dropout=dropout)).has_dropout is has_dropout


@pytest.mark.parametrize("config", UNKNOWN, ids=lambda config: config.model_type)
def test_other_architectures_are_refused_by_name(config: Any) -> None:
    with pytest.raises(ModelError) as caught:
        check_supported(config)
    assert repr(config.model_type) in caught.value.cause
    assert all(words in caught.value.remedy for words in SUPPORTED.values())


def test_a_head_with_a_bias_is_refused() -> None:
    model = tiny_model("llama", tied=False)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB))
    with pytest.raises(ModelError, match="head of this llama model has a bias"):
        find_architecture(model)
