"""A model without weights: nothing on the heap but buffers, and clear words for broken folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sophia_galore.errors import ModelError
from sophia_galore.model.skeleton import build_skeleton, load_model_config, load_tokenizer
from tiny import FAMILIES, tiny_model, write_tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_on_meta_and_buffers_are_real(family: str, tied: bool) -> None:
    model = tiny_model(family, tied=tied)
    architecture = build_skeleton(model.config, CPU)
    assert {parameter.device.type for parameter in architecture.model.parameters()} == {"meta"}
    assert architecture.tied is tied
    assert {name: each.shape for name, each in model.named_parameters()} == architecture.parameter_shapes()
    buffers = dict(architecture.model.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert architecture.model.training
    assert architecture.model.config.use_cache is False


def test_the_config_of_a_folder(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "qwen3")
    config = load_model_config(folder)
    assert (config.model_type, config.num_hidden_layers) == ("qwen3", 3)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", '{"model_type": "no such model"}', '{"model_type": 3}'),
        '{"model_type": "llama", "hidden_size": "wide"}',
        '{"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3}',
    ],
)
def test_a_broken_config_is_said_so(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        load_model_config(tmp_path)
    assert "config.json" in caught.value.cause
    assert caught.value.remedy


@pytest.mark.parametrize("kind", ["t5", "vit", "clip"])
def test_what_is_no_causal_language_model_is_refused_before_anything_is_built(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ModelError, match=f"'{kind}' is not one of transformers' causal language models"):
        load_model_config(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "mamba"])
def test_any_causal_language_model_is_read(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert load_model_config(tmp_path).model_type == kind


@pytest.mark.parametrize("text", ["{", "{}", None])
def test_a_broken_tokenizer_is_said_so(text: str | None, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    assert load_tokenizer(folder).eos_token == "<|im_end|>"
    (folder / "tokenizer.json").unlink()
    if text is not None:
        (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"tokenizer in .* can't be read") as caught:
        load_tokenizer(folder)
    assert "tokenizer.json" in caught.value.remedy
