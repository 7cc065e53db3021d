"""Find the parts of a Hugging Face causal language model, whatever its architecture is.

What is found is a proposal: whether the model is nothing but these parts, run one after the other, is proved by
comparison with autograd (`engine/proof.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from sophia_galore.errors import ModelError
from sophia_galore.model.architecture import Architecture, Place, Router
from sophia_galore.model.experts import expert_tensors
from sophia_galore.model.logit_form import LogitForm, find_logit_form
from sophia_galore.model.streams import JoinedStreams

# Attribute names of the norm behind the last layer; the usual ones first.
_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "embedding_norm", "layer_norm", "layernorm")
# The projections that join several hidden states of a token, a list of modules beside the layers.
_JOINS = ("altup_unembed_projections",)
# What configurations call the number of experts of a token.
_CHOSEN = ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k")
# Kinds of layers in which tokens meet in nothing but attention.
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


def find_architecture(model: Any) -> Architecture:
    """Find the parts of a model.

    Args:
        model: An `AutoModelForCausalLM`, on any device.

    Returns:
        Its parts.

    Raises:
        ModelError: It has no token embedding, no list of layers, or no linear head.
    """
    config, kind = model.config, type(model).__name__
    names = {id(module): name for name, module in model.named_modules()}
    embed, head = _end(model, "get_input_embeddings"), _end(model, "get_output_embeddings")
    if not isinstance(embed, nn.Embedding) or not isinstance(head, nn.Linear):
        which = "token embedding" if not isinstance(embed, nn.Embedding) else "linear head"
        raise ModelError(f"{kind} has no {which} that can be found.", "Give a decoder-only language model.")
    layers_place = _layers_place(model, getattr(config, "num_hidden_layers", 0), kind)
    layers = layers_place.module
    norm_place = _norm_place(layers_place, embed)
    join_place = next((Place(layers_place.owner, name) for name in _JOINS if hasattr(layers_place.owner, name)), None)
    norm = nn.Identity() if norm_place is None else norm_place.module
    if join_place is not None:
        norm = JoinedStreams(join_place.module, norm)
    base, logit_form = _base(model, layers_place.owner, head)
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    embed_name = parameters[id(embed.weight)]
    tied = head.weight is embed.weight
    head_name = parameters[id(head.weight)]
    bias_name = None if head.bias is None else parameters[id(head.bias)]
    layer_names = tuple(names[id(layer)] for layer in layers)
    norm_names = {parameters[id(parameter)]: inner for inner, parameter in norm.named_parameters()}
    known = {embed_name, head_name, bias_name, *norm_names}
    inside = tuple(f"{name}." for name in layer_names)
    rest = [name for name in parameters.values() if name not in known and not name.startswith(inside)]
    lookups = _lookups(model, config, rest)
    embeddings = {embed_name: embed, **lookups}
    padding_idx = {name: each.padding_idx for name, each in embeddings.items()}
    # The engine looks up rows in a smaller embedding of the batch's tokens only, in which this row number would mean
    # another token. So the engine applies `padding_idx` itself.
    for each in embeddings.values():
        each.padding_idx = None
    return Architecture(
        model=model,
        base=base,
        base_name=names[id(base)],
        embed=embed,
        layers=layers,
        norm=norm,
        head=head,
        embed_place=_place(model, embed),
        layers_place=layers_place,
        norm_place=norm_place,
        join_place=join_place,
        embed_name=embed_name,
        layer_names=layer_names,
        norm_names=norm_names,
        head_name=embed_name if tied else head_name,
        head_bias_name=bias_name,
        entry_names=tuple(name for name in rest if name not in lookups),
        lookups=lookups,
        lookup_places={name: _place(model, module) for name, module in lookups.items()},
        expert_tensors=expert_tensors(model),
        routers=tuple(_router(model, config, layer) for layer in layers),
        balance=_balance(config),
        tied=tied,
        padding_idx=padding_idx,
        logit_form=logit_form,
        runs_alone=tuple(_runs_alone(model, *each) for each in zip(layers, _kinds(config, len(layers)), strict=True)),
        has_dropout=_draws(model),
        most_short_positions=_most_short_positions(config),
    )


def _base(model: Any, owner: nn.Module, head: nn.Module) -> tuple[nn.Module, LogitForm]:
    """Return the model below the head, which some models call by its inner part, and what becomes of the logits."""
    try:
        return model.base_model, find_logit_form(model, model.base_model, head)
    except ModelError:
        if owner is model.base_model:
            raise
        return owner, find_logit_form(model, owner, head)


def _end(model: Any, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


def _place(model: nn.Module, wanted: nn.Module) -> Place:
    return next(
        Place(owner, attribute)
        for owner in model.modules()
        for attribute, child in owner.named_children()
        if child is wanted
    )


def _layers_place(model: nn.Module, count: int, kind: str) -> Place:
    for owner in model.modules():
        for attribute, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count > 0 and any(True for _ in child.parameters()):
                return Place(owner, attribute)
    raise ModelError(f"{kind} has no list of {count} layers that can be found.", "Give a decoder-only language model.")


def _norm_place(layers_place: Place, embed: nn.Module) -> Place | None:
    """Return the place of the norm behind the last layer, a module beside the list of layers."""
    beside = {
        name: child
        for name, child in layers_place.owner.named_children()
        if child is not embed and name != layers_place.attribute
    }
    named = [name for name in _NORMS if name in beside]
    alike = [name for name, child in beside.items() if "norm" in type(child).__name__.lower()]
    found = next(iter([*named, *reversed(alike)]), None)
    return None if found is None else Place(layers_place.owner, found)


def _lookups(model: nn.Module, config: Any, names: list[str]) -> dict[str, nn.Embedding]:
    """Return the embeddings of tokens among the modules whose weights have these names."""
    sizes = {config.vocab_size, getattr(config, "vocab_size_per_layer_input", None)}
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and f"{name}.weight" in names and module.num_embeddings in sizes
    }


def _runs_alone(model: Any, layer: nn.Module, kind: str) -> bool:
    """Return whether a layer of a kind does more with several tokens than attention that transformers can replace."""
    replaceable = getattr(model, "_supports_attention_backend", False) and kind in _ATTENTION
    return not replaceable or any(isinstance(module, nn.Conv1d) for module in layer.modules())


def _kinds(config: Any, count: int) -> list[str]:
    return list(getattr(config, "layer_types", None) or ["full_attention"] * count)


def _router(model: Any, config: Any, layer: nn.Module) -> Router | None:
    """Return the module of a layer whose logits transformers records as the router's."""
    recorder = next(
        (
            found
            for part in (model, model.base_model, *model.base_model.children())
            if (found := (getattr(part, "_can_record_outputs", None) or {}).get("router_logits"))
        ),
        None,
    )
    chosen = next((value for key in _CHOSEN if isinstance(value := getattr(config, key, None), int)), 0)
    kind = getattr(recorder, "target_class", recorder)
    if not isinstance(kind, type) or not chosen:
        return None
    module = next((module for module in layer.modules() if isinstance(module, kind)), None)
    weight: Any = getattr(module, "weight", None)
    if module is None or weight is None:
        return None
    counted = getattr(module, "num_experts", None)  # fewer than its rows if it also weighs experts that all tokens get
    count = counted if isinstance(counted, int) and 0 < counted <= len(weight) else len(weight)
    return Router(module, getattr(recorder, "index", 0), count, chosen)


def _balance(config: Any) -> float:
    if not getattr(config, "output_router_logits", False):
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", None) or getattr(config, "aux_loss_coef", None) or 0.0)


def _draws(model: nn.Module) -> bool:
    """Return whether a model draws random numbers in training, by its modules or as its configuration says."""
    dropouts = (module.p for module in model.modules() if isinstance(module, nn.Dropout))
    return any(dropouts) or any(_rates(model.config))


def _rates(config: Any) -> Iterator[float]:
    for key, value in vars(config).items():
        asks = "drop" in key or "jitter" in key or key.endswith("pdrop")
        if asks and isinstance(value, float) and "classifier" not in key:
            yield value


def _most_short_positions(config: Any) -> int | None:
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
