"""Answers of the model, by Hugging Face's own `generate` over the stored weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sophia_galore.model.anatomy import Anatomy
from sophia_galore.model.skeleton import load_tokenizer
from sophia_galore.model.store import WeightStore


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
    """The model with the stored weights in their places, without copying them."""
    places = [
        (module, name, parameter)
        for module in anatomy.model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    names = {id(parameter): name for name, parameter in anatomy.model.named_parameters()}
    whole = {id(meta): nn.Parameter(store[names[id(meta)]], requires_grad=False) for _, _, meta in places}
    was_training = anatomy.model.training
    try:
        for module, name, meta in places:
            setattr(module, name, whole[id(meta)])
        anatomy.model.eval()
        yield anatomy.model
    finally:
        for module, name, meta in places:
            setattr(module, name, meta)
        anatomy.model.train(was_training)


def stream_answer(folder: Path, question: str, *, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Print the answer of a model folder token by token.

    Args:
        folder: An ordinary Hugging Face model folder.
        question: What to ask.
        max_new_tokens: Longest answer in tokens.
        temperature: 0: always the likeliest token.
        seed: Of the draws at temperatures above 0.
    """
    from transformers import AutoModelForCausalLM, TextStreamer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the answer is what is to be seen

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    prompt = prompt_tokens(tokenizer, question).to(device)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )
