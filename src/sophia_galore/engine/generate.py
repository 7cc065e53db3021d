"""Answers of the model, by Hugging Face's own `generate` over the stored weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sophia_galore.model.anatomy import Anatomy
from sophia_galore.model.frozen import Frozen8bit
from sophia_galore.model.skeleton import build_skeleton, load_model_config, load_tokenizer
from sophia_galore.model.store import INT8_FILE, WeightStore, open_store
from sophia_galore.numerics.int8 import Packed


def answer(
    anatomy: Anatomy,
    store: WeightStore,
    tokenizer: Any,
    questions: Sequence[str],
    *,
    max_new_tokens: int,
    device: torch.device,
) -> list[str]:
    """Answer questions greedily, in the store's own precision, so that no second copy of the weights is made.

    Weights in eight bits are decoded one at a time.

    Args:
        anatomy: The model's parts; parameters on the meta device, before and after.
        store: The weights.
        tokenizer: The model's tokenizer.
        questions: What a user would ask; put into the chat template if there is one.
        max_new_tokens: Longest answer in tokens.
        device: Where the store lives.

    Returns:
        One answer a question.
    """
    answers: list[str] = []
    if not questions:
        return answers
    with _whole(anatomy, store) as model:
        for question in questions:
            prompt = prompt_tokens(tokenizer, question).to(device)
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.eos_token_id,
            )
            answers.append(tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip())
    return answers


def prompt_tokens(tokenizer: Any, question: str) -> torch.Tensor:
    """(1, T) token ids of a question as the model expects it."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": question}]
        encoded = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(question, return_tensors="pt")
    tokens: torch.Tensor = encoded["input_ids"]
    return tokens


@contextmanager
def _whole(anatomy: Anatomy, store: WeightStore) -> Iterator[Any]:
    """The model with the stored weights in their places; those that must be decoded are there while they work only."""
    names = {
        id(parameter): name
        for name, parameter in anatomy.model.named_parameters()
        if not isinstance(store[name], Frozen8bit)  # which its module holds and decodes itself
    }
    places = [
        (module, key, parameter)
        for module in anatomy.model.modules()
        for key, parameter in module.named_parameters(recurse=False)
        if id(parameter) in names
    ]
    dtype = store.plain_dtype()
    hooks: list[RemovableHandle] = []
    whole: dict[int, nn.Parameter] = {}
    for module, key, meta in places:
        stored = store[names[id(meta)]]
        if isinstance(stored, Tensor):
            value = stored
        else:
            # It says shape, precision and device, which the model is asked for, and takes no memory.
            value = torch.empty((), dtype=dtype, device=stored.device).expand(stored.shape)
            hooks += _decode_while_working(module, key, stored, dtype)
        whole.setdefault(id(meta), nn.Parameter(value, requires_grad=False))
    was_training = anatomy.model.training
    try:
        for module, key, meta in places:
            setattr(module, key, whole[id(meta)])
        anatomy.model.eval()
        yield anatomy.model
    finally:
        for hook in hooks:
            hook.remove()
        for module, key, meta in places:
            setattr(module, key, meta)
        anatomy.model.train(was_training)


def _decode_while_working(module: nn.Module, key: str, stored: Packed, dtype: torch.dtype) -> list[RemovableHandle]:
    """Hooks that put a module's decoded weight in its place before its forward, and take it away after."""
    placeholder: list[Any] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        placeholder.append(getattr(module, key))
        if isinstance(module, nn.Embedding):  # of which a few rows will do
            tokens, places = torch.unique(args[0], return_inverse=True)
            setattr(module, key, nn.Parameter(stored[tokens].dequantise(dtype), requires_grad=False))
            return (places, *args[1:])
        setattr(module, key, nn.Parameter(stored.dequantise(dtype), requires_grad=False))
        return args

    def after(module: nn.Module, args: Any, out: Any) -> None:
        setattr(module, key, placeholder.pop())

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def stream_answer(folder: Path, question: str, *, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Print the answer of a model folder token by token.

    Args:
        folder: A model folder.
        question: What to ask.
        max_new_tokens: Longest answer in tokens.
        temperature: 0: always the likeliest token.
        seed: Of the draws at temperatures above 0.
    """
    from transformers import TextStreamer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the answer is what is to be seen

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(folder)
    prompt = prompt_tokens(tokenizer, question).to(device)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with _loaded(folder, device) as model:
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )


@contextmanager
def _loaded(folder: Path, device: torch.device) -> Iterator[Any]:
    """The model of a folder; one in eight bits stays so."""
    from transformers import AutoModelForCausalLM

    if (folder / INT8_FILE).is_file():
        with _whole(build_skeleton(load_model_config(folder), device), open_store(folder, device)) as model:
            yield model
    else:
        yield AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
