"""A peer for `processes.py`: torch's DistributedDataParallel with AdamW, on the same micro-batches.

    torchrun --nproc-per-node 2 bench/ddp_adamw.py RESULT WORD...

WORD are those of `sophia-galore train`. The first process writes tokens and seconds of each step to RESULT.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from sophia_galore.config import load_config
from sophia_galore.data.batches import pad_token
from sophia_galore.data.feed import Feed
from sophia_galore.data.portion import deal
from sophia_galore.train.callback import Callback
from sophia_galore.train.prepare import prepare


def main(result: Path, words: list[str]) -> None:
    """Train, and write what each step took."""
    config = load_config(None, words)
    prepared = prepare(config, Callback())
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    module = AutoModelForCausalLM.from_pretrained(prepared.folder, dtype=torch.float32)
    module.train()
    model = DistributedDataParallel(module, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.training.learning_rate or 1e-5, foreach=True)
    feed = Feed.of(config, prepared.dataset.train, pad_token(prepared.tokenizer))
    steps = []
    for step in range(1, prepared.plan.num_steps + 1):
        dist.barrier()
        began_s = time.perf_counter()
        portion = deal(feed.step(step), rank, count)
        for number, batch in enumerate(portion.batches, 1):
            is_last = number == len(portion.batches)
            with nullcontext() if is_last else model.no_sync():
                logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
                loss = functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
                (loss * count / portion.num_counted).backward()  # the gradients are averaged over processes
        optimizer.step()
        optimizer.zero_grad()
        steps.append([portion.num_tokens, time.perf_counter() - began_s])
    if rank == 0:
        gradients = sum(param.numel() for param in module.parameters()) * 4
        result.write_text(json.dumps({"steps": steps, "summed_bytes": gradients}), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
