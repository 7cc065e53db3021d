"""Tiny real models, tokenizers and data that tests make for themselves."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sophia_galore.data.batches import MicroBatch, collate
from sophia_galore.data.example import Example
from sophia_galore.doctor.tiny_model import SPECIAL, byte_tokenizer
from sophia_galore.doctor.tiny_model import TEMPLATE as CHATML

VOCAB = 320
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_GEMMA = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}
PACKED_LENGTHS = (13, 7, 21, 5, 5, 9, 2, 3, 30)
PACKED_ROWS = (((2, 0, 3), (8,)), ((1, 5, 4, 7), (6,)))
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 8}),
    "gemma2": (transformers.Gemma2Config, _GEMMA),
    "gemma3": (transformers.Gemma3TextConfig, _GEMMA),
    "phi3": (transformers.Phi3Config, {}),
}

_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MAMBA = {
    **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8},
    **{"mamba_d_ssm": 128, "mamba_expand": 2, "shared_intermediate_size": 32},
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "shared_expert_intermediate_size": 32,
}
_GEMMA4 = {
    **{**_GEMMA, "global_head_dim": 32, "hidden_size_per_layer_input": 0},
    **{"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
# By the model_type, and a word for another form of it.
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo2": {},
    "olmo3": _GEMMA,
    "ministral3": {"sliding_window": 8},
    "exaone4": _GEMMA,
    "ernie4_5": {},
    "glm4": {},
    "arcee": {},
    "hunyuan_v1_dense": {},
    "gemma": {},
    "granite": {
        **{"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
        "attention_multiplier": 0.125,
    },
    "granite_swa": {**_GEMMA, "logits_scaling": 8.0},
    "helium": {},
    "starcoder2": {"sliding_window": 8},
    "stablelm": {"use_qkv_bias": True},
    "cohere2": {**_GEMMA, "logit_scale": 0.25},
    "nanochat": {},
    "apertus": {},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {},
    "phi": {},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "qwen3_5_text": _LINEAR,
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "lm_head_multiplier": 0.5, "key_multiplier": 0.5, "ssm_out_multiplier": 0.5},
    "jamba": {
        **{"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"mamba_dt_rank": 4, "mamba_d_state": 8, "use_mamba_kernels": False, **_EXPERTS},
    },
    "granitemoehybrid": {**_MAMBA, **_EXPERTS, "layer_types": ["mamba", "attention", "mamba"]},
    "qwen3_next": {**_LINEAR, **_EXPERTS},
    "qwen3_5_moe_text": {**_LINEAR, **_EXPERTS},
    "qwen3_moe": _EXPERTS,
    "olmoe": _EXPERTS,
    "mixtral": _EXPERTS,
    "gpt_oss": {**_EXPERTS, **_GEMMA},
    "granitemoe": {**_EXPERTS, "logits_scaling": 8.0},
    "lfm2_moe": {**_EXPERTS, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "ernie4_5_moe": {
        **_EXPERTS,
        **{"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 2},
    },
    # The last two layers use keys and values of the first two; each layer has embeddings of its own.
    "gemma4_text": {
        **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "global_head_dim": 32, "sliding_window": 8},
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
    },
    # The same, and four hidden states for each token.
    "gemma3n_text": {
        **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 8, "laurel_rank": 8},
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
        **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
    },
    "gemma4_text dense": _GEMMA4,
    "gemma4_text experts": {**_GEMMA4, **_EXPERTS, "enable_moe_block": True, "top_k_experts": 2},
}
# Of these, so many in every run of the tests; each is another way in which models differ from Llama: a factor on the
# logits, a state from token to token, experts, tensors that layers share.
SHORT_FAMILIES = ("granite", "lfm2", "qwen3_moe", "gemma4_text")


def more_families() -> list[Any]:
    """`MORE_FAMILIES` for a parameter of a test; most are thorough."""
    return [
        pytest.param(family, marks=() if family in SHORT_FAMILIES else pytest.mark.thorough) for family in MORE_FAMILIES
    ]


def tiny_config(family: str = "llama", *, tied: bool = True, **more: Any) -> Any:
    """The Hugging Face configuration of three small layers."""
    kind, extra = FAMILIES.get(family) or (transformers.CONFIG_MAPPING[family.split()[0]], MORE_FAMILIES[family])
    return kind(**{**SIZES, **extra, "tie_word_embeddings": tied, **more})


def tiny_model(family: str = "llama", *, tied: bool = True, seed: int = 0, **more: Any) -> Any:
    """A randomly initialised Hugging Face model of three small layers, float32."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, tied=tied, **more)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh norms and biases are all equal; a swap of two of them would not be seen.
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
            elif "embed" in name or "head" in name:
                parameter.mul_(3)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with ChatML turns; every text can be written in it."""
    made = byte_tokenizer(["what is the sum of one and two, and what follows it"], VOCAB, SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=SPECIAL[1], eos_token=SPECIAL[2])
    fast.chat_template = CHATML
    return fast


def write_tiny_model(folder: Path, family: str = "llama", **more: Any) -> Path:
    """A model folder as the hub would give it."""
    tiny_model(family, **more).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_tiny_data(path: Path, num_records: int = 22, seed: int = 0) -> Path:
    """Alpaca records of different lengths."""
    draw = random.Random(seed)
    words = ["what", "is", "the", "sum", "of", "one", "two", "three", "four", "and", "so", "it", "follows"]
    records = [
        {
            "instruction": " ".join(draw.choices(words, k=draw.randint(1, 4))),
            "output": f"{number} " + " ".join(draw.choices(words, k=draw.randint(1, 6))),
        }
        for number in range(num_records)
    ]
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def ragged_batches(seed: int = 0) -> list[MicroBatch]:
    """Three micro-batches of different shapes, two of them padded; some prompts don't count."""
    draw = torch.Generator().manual_seed(seed)
    batches = []
    for lengths in ([13], [7, 21], [5, 5, 9]):
        longest = max(lengths)
        tokens = torch.randint(3, VOCAB, (len(lengths), longest), generator=draw)
        tokens[0, 3] = 2  # a real token that is also the padding token
        mask = torch.zeros_like(tokens)
        labels = torch.full_like(tokens, -100)
        for row, length in enumerate(lengths):
            mask[row, :length] = 1
            tokens[row, length:] = 2
            labels[row, 2 : length - 1] = tokens[row, 3:length]
        batches.append(
            MicroBatch(
                input_ids=tokens,
                attention_mask=mask if len(set(lengths)) > 1 else None,
                labels=labels,
                num_tokens=sum(lengths),
                num_counted=int((labels != -100).sum()),
            )
        )
    return batches


def packed_batches(seed: int = 0) -> list[MicroBatch]:
    """Two micro-batches of two rows, with examples longer and shorter than a window; in some rows is room left."""
    of = examples_of(PACKED_LENGTHS, seed)
    return [collate([[of[number] for number in row] for row in rows], pad_id=2) for rows in PACKED_ROWS]


def examples_of(lengths: Sequence[int], seed: int = 0) -> list[Example]:
    """Examples of random tokens, of which the second one does not count."""
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, VOCAB, (length,), generator=draw).tolist() for length in lengths]
    return [Example.of(tokens, [place != 1 for place in range(len(tokens))], "") for tokens in ids]


def autograd_loss(model: Any, batches: list[MicroBatch]) -> float:
    """Ordinary backward through a Hugging Face model: loss a token, summed over the batches."""
    num_counted = sum(batch.num_counted for batch in batches)
    total = 0.0
    for batch in batches:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum"
        )
        (loss / num_counted).backward()
        total += float(loss.detach()) / num_counted
    return total
