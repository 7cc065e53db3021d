"""Tiny models whose files are otherwise than the model: mixtures of experts, saved buffers, and models that see.

transformers writes them, so their tensors have the names and shapes that hubs have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from tiny import SIZES, VOCAB, tiny_tokenizer

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_GEMMA4 = {
    "num_kv_shared_layers": 1,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16,
}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_SEES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_SEES = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}

# Name -> class of the configuration, what differs from the sizes of all.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", _EXPERTS),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None}),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {**_EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "shared_intermediate_size": 32,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_EXPERTS,
            **_LATENT,
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "n_group": 1,
            "topk_group": 1,
            "head_dim": 8,
        },
    ),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}),
}
CONVERTED: dict[str, tuple[str, dict[str, Any]]] = {
    **MIXTURES,
    "apertus": ("ApertusConfig", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "gemma4_text": ("Gemma4TextConfig", _GEMMA4),
    "olmo_hybrid": ("OlmoHybridConfig", {}),
}
# Name -> class of the configuration, class of the model, what differs in the text, what sees.
WHOLE: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8},
        {**_SEES, "vision_use_head": False},
    ),
    "gemma4": (
        "Gemma4Config",
        "Gemma4ForConditionalGeneration",
        _GEMMA4,
        {**_SEES, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16},
    ),
    "mistral3": (
        "Mistral3Config",
        "Mistral3ForConditionalGeneration",
        {"model_type": "ministral3"},
        {**_SEES, "model_type": "pixtral", "head_dim": 16},
    ),
    "qwen3_5": ("Qwen3_5Config", "Qwen3_5ForConditionalGeneration", _LINEAR, _QWEN_SEES),
    "qwen3_5_moe": (
        "Qwen3_5MoeConfig",
        "Qwen3_5MoeForConditionalGeneration",
        {**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 32},
        _QWEN_SEES,
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        {},
        {**_QWEN_SEES, "deepstack_visual_indexes": [0]},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeConfig",
        "Qwen3VLMoeForConditionalGeneration",
        _EXPERTS,
        {**_QWEN_SEES, "deepstack_visual_indexes": [0]},
    ),
    "llama4": (
        "Llama4Config",
        "Llama4ForConditionalGeneration",
        {"num_local_experts": 4, "intermediate_size_mlp": 96},
        {**_SEES, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
}


def other_model(name: str, *, tied: bool = False) -> Any:
    """A randomly initialised model of a table above, float32, whose norms, biases and buffers are not all equal."""
    torch.manual_seed(0)
    if name in WHOLE:
        kind, model_kind, text, sees = WHOLE[name]
        more = {"audio_config": None} if name == "gemma4" else {}
        config = getattr(transformers, kind)(
            text_config={**SIZES, **text}, vision_config=sees, tie_word_embeddings=tied, **more
        )
        model = getattr(transformers, model_kind)(config).float()
    else:
        model = transformers.AutoModelForCausalLM.from_config(other_config(name, tie_word_embeddings=tied)).float()
    saved = model.state_dict()
    with torch.no_grad():
        for tensors in (model.named_parameters(), model.named_buffers()):
            for key, tensor in tensors:
                if key in saved and tensor.ndim < 2 and tensor.is_floating_point():
                    tensor.add_(0.1 * torch.rand(tensor.shape))
    return model.eval()


def other_config(name: str, **more: Any) -> Any:
    """The configuration of a model that only reads."""
    kind, extra = CONVERTED[name]
    # Whatever is None is left to the architecture's own default.
    values = {key: value for key, value in {**SIZES, **extra, **more}.items() if value is not None}
    return getattr(transformers, kind)(**values)


def write_other_model(folder: Path, name: str, **more: Any) -> Path:
    """A folder with such a model, as the hub would give it."""
    other_model(name, **more).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's folder."""
    return {
        name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(path).items()
    }


def differing(first: Path, second: Path) -> list[str]:
    """The names of the tensors that are not the same in both folders, to the bit."""
    one, other = tensors_in(first), tensors_in(second)
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one
        or name not in other
        or one[name].dtype != other[name].dtype
        or not torch.equal(one[name], other[name])
    )
