"""Makes tiny models with the transformers of the interpreter that runs it, or says what it reads in model folders.

    python bench/opens_child.py make FOLDER            a model of each kind below FOLDER
    python bench/opens_child.py read FOLDER...         one JSON line each: logits, tokens, settings, or the error

Nothing of this project is imported, so that any environment with torch and transformers can run it.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT = "what is the sum of one and two?"
_VOCAB = 320
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": _VOCAB,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    # None that is a default: who misses it computes something else.
    "rope_theta": 654_321.0,
}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
_LONG = {
    "type": "longrope",
    "short_factor": [1.0 + 0.1 * index for index in range(8)],
    "long_factor": [2.0 + index for index in range(8)],
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-3.2": ("LlamaConfig", {"rope_scaling": _LLAMA3, "tie_word_embeddings": True}),
    "llama-yarn": ("LlamaConfig", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": ("Gemma2Config", _ALTERNATING),
    "gemma3": ("Gemma3TextConfig", {**_ALTERNATING, "rope_local_base_freq": 4_321.0}),
    "gemma3-linear": (
        "Gemma3TextConfig",
        {**_ALTERNATING, "rope_local_base_freq": 4_321.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "phi3": ("Phi3Config", {"partial_rotary_factor": 0.5}),
    "phi3-long": (
        "Phi3Config",
        {"max_position_embeddings": 128, "original_max_position_embeddings": 16, "rope_scaling": _LONG},
    ),
}


def make(folder: Path) -> None:
    """Write a model of each kind, each with the same tokenizer."""
    for number, (kind, (config, more)) in enumerate(KINDS.items()):
        torch.manual_seed(number)
        made = getattr(transformers, config)(**{**_SIZES, **more})
        model = transformers.AutoModelForCausalLM.from_config(made).float()
        with torch.no_grad():
            for parameter in model.parameters():
                # As initialised, attention is nearly uniform, and positions hardly matter.
                parameter.mul_(6 if parameter.ndim == 2 else 1)
        model.save_pretrained(folder / kind)
        _tokenizer().save_pretrained(folder / kind)
        # As it is written after having been read from a folder, which leaves more behind.
        transformers.AutoTokenizer.from_pretrained(str(folder / kind)).save_pretrained(folder / kind)


def _tokenizer() -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB - 1,
        special_tokens=["<unk>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT, "and what follows it"], trainer)
    made.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        additional_special_tokens=["<|tool|>"],
    )
    fast.chat_template = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    return fast


def read(folder: str) -> dict[str, Any]:
    """What this interpreter's transformers makes of a folder."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokens = tokenizer(TEXT + "<|tool|>")["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([tokens * 2])).logits[0, -8:]
        chat = tokenizer.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False)
        stops = model.generation_config.eos_token_id
    except Exception as error:
        return {"folder": folder, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {
        "folder": folder,
        "transformers": transformers.__version__,
        "tokens": tokens,
        "special": sorted(tokenizer.all_special_tokens),
        "chat": chat,
        "stops": stops,
        "tied": model.lm_head.weight is model.get_input_embeddings().weight,
        "logits": logits.flatten().tolist(),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        for name in sys.argv[2:]:
            print(json.dumps(read(name)))
