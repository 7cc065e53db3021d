"""A written model is an ordinary Hugging Face folder, exactly as stored or rounded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from engines import load_parts
from sophia_galore.model.export import read_generation_config, write_model
from sophia_galore.model.source_files import read_source_files
from tiny import FAMILIES, write_tiny_model

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def export(source: Path, target: Path, store_dtype: torch.dtype, dtype: torch.dtype | None) -> Any:
    """Load a folder into a store and write it out again; returns the store."""
    _, store = load_parts(source, store_dtype)
    target.mkdir()
    write_model(
        target,
        store=store,
        dtype=dtype,
        source=read_source_files(source),
    )
    return store


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_exact(family: str, tied: bool, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source", family, tied=tied)
    export(source, tmp_path / "target", torch.float32, None)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "target"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    original = AutoModelForCausalLM.from_pretrained(source)
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, original(tokens).logits)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("store_dtype", [torch.float32, torch.bfloat16])
def test_the_precision_is_the_stores_or_what_is_asked(
    store_dtype: torch.dtype, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    source = write_tiny_model(tmp_path / "source")
    store = export(source, tmp_path / "target", store_dtype, dtype)
    written = load_file(tmp_path / "target" / "model.safetensors")
    expected = dtype or store_dtype
    assert all(torch.equal(tensor, store[name].values(expected)) for name, tensor in written.items())
    assert {tensor.dtype for tensor in written.values()} == {expected}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert model.dtype == expected
    assert f'"dtype": "{NAMES[expected]}"' in (tmp_path / "target" / "config.json").read_text()
    assert all(weight.dtype == store_dtype for _, weight in store.items()), "the store stays as it was"


def test_the_cache_is_on_again_and_the_skeletons_config_untouched(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    architecture, store = load_parts(source)
    assert architecture.model.config.use_cache is False
    (tmp_path / "target").mkdir()
    write_model(
        tmp_path / "target",
        store=store,
        dtype=None,
        source=read_source_files(source),
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "target").config.use_cache is True
    assert architecture.model.config.use_cache is False


def test_tokenizer_and_generation_settings_come_along(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    GenerationConfig(max_new_tokens=17, do_sample=True, temperature=0.6).save_pretrained(source)
    export(source, tmp_path / "target", torch.float32, None)
    settings = GenerationConfig.from_pretrained(tmp_path / "target")
    assert (settings.max_new_tokens, settings.do_sample, settings.temperature) == (17, True, 0.6)
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("source", "target"))
    text = "what is the sum of ünïcödé 🙂"
    assert before(text)["input_ids"] == after(text)["input_ids"]
    assert before.chat_template == after.chat_template
    assert (after.eos_token, after.bos_token) == ("<|im_end|>", "<|im_start|>")


def test_a_folder_without_generation_settings(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) is None
