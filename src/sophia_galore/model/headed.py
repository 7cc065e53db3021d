"""A causal language model of a text model for which transformers has no such class: the text model and a head.

Some models that see or hear have their head outside of the text model, and no class for the language model alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def give_causal_class(config: Any) -> None:
    """Let transformers build a causal language model from a text configuration, if it has no class for that.

    Args:
        config: The configuration of the text part of a larger model; nothing happens for any other.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoModelForCausalLM

    kind = type(config)
    is_part = getattr(kind, "base_config_key", "") == "text_config"
    if is_part and kind not in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_MAPPING:
        # exist_ok, or it is not registered: transformers would take it for code that came with a model.
        AutoModelForCausalLM.register(kind, _headed(MODEL_MAPPING[kind], kind), exist_ok=True)


def _headed(text_model: Any, config_kind: Any) -> Any:
    from transformers import GenerationMixin
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class Headed(text_model.__bases__[0], GenerationMixin):  # type: ignore[misc]
        config_class = config_kind
        base_model_prefix = "model"
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = text_model(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, input_ids: Any = None, *, logits_to_keep: int = 0, **how: Any) -> Any:
            out = self.model(input_ids=input_ids, **how)
            logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
            return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)

    Headed.__name__ = Headed.__qualname__ = f"{text_model.__name__}WithHead"
    return Headed
