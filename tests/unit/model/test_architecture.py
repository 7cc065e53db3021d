"""Where the parts of a model are: for every family, and for models whose parts have other names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from sophia_galore.errors import ModelError
from sophia_galore.model.architecture import SUPPORTED
from sophia_galore.model.find_parts import find_architecture
from sophia_galore.model.logit_form import LogitForm
from tiny import FAMILIES, MORE_FAMILIES, SHORT_FAMILIES, VOCAB, tiny_config, tiny_model


def test_the_table_names_every_family_that_is_tested() -> None:
    tested = {tiny_config(family).model_type for family in (*FAMILIES, *MORE_FAMILIES)}
    assert tested == set(SUPPORTED) and set(SHORT_FAMILIES) <= MORE_FAMILIES.keys()


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
    inside = dict(architecture.norm.named_parameters())
    assert all(parameters[name] is inside[inner] for name, inner in architecture.norm_names.items())
    assert len(architecture.norm_names) == len(inside) == 1
    assert len(architecture.layers) == len(architecture.layer_names) == 3
    for layer, name in zip(architecture.layers, architecture.layer_names, strict=True):
        assert all(parameters[f"{name}.{key}"] is value for key, value in layer.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_together_hold_every_parameter_once(family: str, tied: bool) -> None:
    model = tiny_model(family, tied=tied)
    architecture = find_architecture(model)
    shapes = architecture.parameter_shapes()
    parts = [architecture.embed_name, architecture.head_name, *architecture.norm_names]
    parts += [name for name in shapes if name.startswith(tuple(f"{layer}." for layer in architecture.layer_names))]
    assert sorted(set(parts)) == sorted(shapes)
    assert len(parts) == len(shapes) + tied
    assert sum(shape.numel() for shape in shapes.values()) == sum(each.numel() for each in model.parameters())


def test_the_padding_row_is_kept_for_the_engine_and_taken_from_the_module() -> None:
    architecture = find_architecture(tiny_model("llama"))
    assert architecture.padding_idx == {"model.embed_tokens.weight": 2}
    assert architecture.embed.padding_idx is None


@pytest.mark.parametrize(("family", "cap"), [("gemma2", 30.0), ("llama", None)])
def test_the_cap_of_the_logits(family: str, cap: float | None) -> None:
    assert find_architecture(tiny_model(family)).logit_form == LogitForm(1.0, cap)


def tiny(kind: str, **more: Any) -> Any:
    """A model of a type, with as few and small layers as its configuration takes."""
    config = transformers.CONFIG_MAPPING[kind](**{"vocab_size": VOCAB, **more})
    return transformers.AutoModelForCausalLM.from_config(config)


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        ("granite", {**SMALL, "num_key_value_heads": 1, "logits_scaling": 8.0}, LogitForm(1 / 8)),
        ("cohere", {**SMALL, "num_key_value_heads": 1, "logit_scale": 0.0625}, LogitForm(0.0625)),
        ("nanochat", {**SMALL, "num_key_value_heads": 1, "final_logit_softcapping": 15.0}, LogitForm(1.0, 15.0)),
    ],
)
def test_what_becomes_of_the_logits_is_found_by_trying(kind: str, more: dict[str, Any], expected: LogitForm) -> None:
    assert find_architecture(tiny(kind, **more)).logit_form == expected


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_that_calls_the_inner_part_of_its_base(device: str) -> None:
    """OPT: what enters the head is not what the base model was to return, so nothing is read from it."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}
    with torch.device(device):
        model = tiny("opt", num_hidden_layers=2, num_attention_heads=2, **sizes)
    architecture = find_architecture(model)
    assert architecture.base_name == "model.decoder" and architecture.logit_form == LogitForm()


def test_parts_with_other_names() -> None:
    """GPT-2 calls everything otherwise, and has a second embedding, of the positions."""
    architecture = find_architecture(tiny("gpt2", n_embd=32, n_layer=2, n_head=2))
    assert architecture.embed_name == "transformer.wte.weight"
    assert dict(architecture.norm_names) == {f"transformer.ln_f.{key}": key for key in ("weight", "bias")}
    assert architecture.layer_names == ("transformer.h.0", "transformer.h.1")
    assert architecture.entry_names == ("transformer.wpe.weight",) and not architecture.lookups
    assert architecture.has_dropout and architecture.tied and architecture.head_bias_name is None


def test_a_bias_of_the_head_is_a_parameter_of_its_own() -> None:
    architecture = find_architecture(tiny("phi", **SMALL))
    assert (architecture.head_name, architecture.head_bias_name) == ("lm_head.weight", "lm_head.bias")
    norm = ("model.final_layernorm.weight", "model.final_layernorm.bias")
    assert architecture.exit_names == (*norm, "lm_head.weight", "lm_head.bias")


def test_further_embeddings_of_tokens_and_what_is_made_of_them() -> None:
    config = {**SMALL, "head_dim": 16, "global_head_dim": 16, "num_key_value_heads": 1}
    per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
    architecture = find_architecture(tiny("gemma4_text", **config, **per_layer))
    assert list(architecture.lookups) == ["model.embed_tokens_per_layer.weight"]
    assert sorted(architecture.entry_names) == [
        "model.per_layer_model_projection.weight",
        "model.per_layer_projection_norm.weight",
    ]


def test_layers_with_a_state_run_each_packed_example_alone() -> None:
    kinds = ["full_attention", "conv", "full_attention"]
    more = {**SMALL, "num_hidden_layers": 3, "num_key_value_heads": 1, "layer_types": kinds}
    assert find_architecture(tiny("lfm2", **more)).runs_alone == (False, True, False)
    assert find_architecture(tiny_model("gemma3")).runs_alone == (False, False, False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model, "lm_head", torch.nn.Identity()), "has no linear head that can be found"),
        (lambda model: setattr(model.model, "embed_tokens", torch.nn.Identity()), "has no token embedding"),
        (lambda model: setattr(model.model, "layers", torch.nn.ModuleList()), "has no list of 3 layers"),
    ],
)
def test_a_missing_part_is_named(change: Callable[[Any], None], reason: str) -> None:
    model = tiny_model("llama", tied=False)
    change(model)
    with pytest.raises(ModelError, match=reason):
        find_architecture(model)


def test_logits_that_are_neither_scaled_nor_capped_are_refused() -> None:
    model = tiny_model("llama", tied=False)
    own = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = own(self, *args, **kwargs)
        out.logits = out.logits.abs().sqrt()
        return out

    model.forward = forward.__get__(model)
    with pytest.raises(ModelError, match="neither a factor nor a cap"):
        find_architecture(model)


@pytest.mark.parametrize(("dropout", "has_dropout"), [(0.0, False), (0.1, True)])
def test_dropout_is_noticed(dropout: float, has_dropout: bool) -> None:
    assert find_architecture(tiny_model("llama", attention_dropout=dropout)).has_dropout is has_dropout
