"""JSON files of a model folder that both transformers 4.x and 5 read correctly.

transformers 5 writes some settings under new names, which 4.x silently ignores, so that the model computes something
else. Settings in the new form are also written in the old form; settings in the old form are read by both versions and
stay unchanged. Each function takes a parsed file and returns a new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]

# These describe from where the model was loaded on some machine, not the model.
_TRACES = ("_name_or_path", "name_or_path", "local_files_only", "is_local", "_commit_hash")
# Quantisations, which our files never use.
_PACKING = ("quantization_config", "quantization", "compression_config")
# In the old form, these are next to the scaling, not inside it.
_BESIDE_SCALING = ("rope_theta", "partial_rotary_factor")
# The models whose layers of different kinds transformers 4.x gives different settings.
_ROPE_BY_LAYER = ("gemma3_text", "gemma3n_text")
# transformers 4.x accepts three fields in Phi-3's scaling, and reads this one outside of it.
_BESIDE_PHI3_SCALING = "original_max_position_embeddings"


def model_config(source: Mapping[str, Any], *, dtype: str, untied: bool, keeps_code: bool) -> Json:
    """Return a `config.json` for trained weights.

    Args:
        source: The `config.json` of the original model.
        dtype: Precision of the weights, such as "bfloat16".
        untied: Whether the head has separate weights.
        keeps_code: Whether the Python files that `auto_map` names are kept.

    Returns:
        The source's keys in their order. Only values that training changed, or that other versions of transformers
        would read differently, are changed.
    """
    drop = {*_TRACES, *_PACKING, *(() if keeps_code else ("auto_map",))}
    written = {key: value for key, value in source.items() if key not in drop}
    # `dtype` alone is the new form.
    names = ("torch_dtype",) if "torch_dtype" in written and "dtype" not in written else ("torch_dtype", "dtype")
    written |= dict.fromkeys(names, dtype)
    written["use_cache"] = True
    if untied and written.get("tie_word_embeddings") is not False:
        written["tie_word_embeddings"] = False
    return written | _old_rope(written)


def _old_rope(config: Json) -> Json:
    """Return the rope settings in the form of transformers 4.x, if they are in the new form."""
    new = config.get("rope_parameters")
    if not isinstance(new, Mapping) or not new:
        return {}
    by_layer = {name: value for name, value in new.items() if isinstance(value, Mapping)}
    if by_layer and config.get("model_type") not in _ROPE_BY_LAYER:
        return {}  # 4.x does not know the model, and 5 would take the old form for that of all layers
    if by_layer:
        full, local = by_layer.get("full_attention", {}), by_layer.get("sliding_attention", {})
        old = _old_rope_of(full, config)
        return old | ({"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {})
    # If a file has both forms, transformers 5 reads the scaling, and the rest from the new form.
    return _old_rope_of({**new, **(config.get("rope_scaling") or {})}, config)


def _old_rope_of(rope: Mapping[str, Any], config: Json) -> Json:
    old = {key: rope[key] for key in _BESIDE_SCALING if rope.get(key) is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    inside = {key: value for key, value in rope.items() if key not in (*_BESIDE_SCALING, "rope_type", "type")}
    if kind == "default":
        return old | {"rope_scaling": None}
    if config.get("model_type") != "phi3":
        return old | {"rope_scaling": {"rope_type": kind, **inside}}
    length = inside.pop(_BESIDE_PHI3_SCALING, None)
    if length is not None:
        old[_BESIDE_PHI3_SCALING] = config.get(_BESIDE_PHI3_SCALING, length)
    return old | {"rope_scaling": {"type": kind, **inside}}


def tokenizer_config(source: Mapping[str, Any], *, chat_template: str | None, whole: bool, keeps_code: bool) -> Json:
    """Return a `tokenizer_config.json`.

    Args:
        source: The file of the original model.
        chat_template: Another chat template; None: unchanged.
        whole: Whether the folder has a `tokenizer.json`, which describes the tokenizer completely.
        keeps_code: Whether the Python files that `auto_map` names are kept.
    """
    drop = {*_TRACES, *(() if keeps_code else ("auto_map",))}
    written = {key: value for key, value in source.items() if key not in drop}
    extra = written.get("extra_special_tokens")
    is_new = "backend" in source or isinstance(extra, list) or source.get("tokenizer_class") == "TokenizersBackend"
    if isinstance(extra, list):
        # transformers 4.x expects names there; both versions read the older key.
        del written["extra_special_tokens"]
        written["additional_special_tokens"] = [*written.get("additional_special_tokens", []), *extra]
    if is_new and whole:
        # 4.x does not know the class, or its class of the same name adds more tokens.
        written["tokenizer_class"] = "PreTrainedTokenizerFast"
    if chat_template is not None:
        written["chat_template"] = chat_template
    return written


def generation_config(source: Mapping[str, Any] | None, model: Mapping[str, Any], stops: Sequence[int]) -> Json:
    """Return a `generation_config.json` with other tokens that end an answer.

    Args:
        source: The file of the original model; None: it has none.
        model: The model's config.json, from which a missing file is derived as in transformers.
        stops: Ids of the tokens that end an answer.
    """
    if source is None:
        kinds = ("bos_token_id", "pad_token_id")
        source = {key: model[key] for key in kinds if model.get(key) is not None}
    return {**source, "eos_token_id": stops[0] if len(stops) == 1 else list(stops)}
