"""Accelerate shards the model (FSDP2) over several GPUs; with one, or on a CPU, the same program does not shard.

accelerate launch --num-processes 2 examples/accelerate_fsdp2.py
"""

from __future__ import annotations

import os

from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from small import arguments, batch, model_and_tokenizer, show_loss

import sophia_galore

options = arguments()
plugin = None
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT"
    )
accelerator = Accelerator(cpu=options.device == "cpu", fsdp_plugin=plugin)
model, tokenizer = model_and_tokenizer(options.model)
# Before prepare, as Accelerate wants it: it puts the sharded parameters into the optimizer's groups.
optimizer = sophia_galore.GaLore(
    model.named_parameters(),
    lr=1e-2 if options.model is None else 1e-3,
    rank=16 if options.model is None else 128,
)
model, optimizer = accelerator.prepare(model, optimizer)
inputs = batch(tokenizer, accelerator.device)
own = {key: rows.chunk(accelerator.num_processes)[accelerator.process_index] for key, rows in inputs.items()}

show_loss("before", model, tokenizer, quiet=not accelerator.is_main_process)
for _ in range(options.steps):
    accelerator.backward(model(**own).loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
show_loss("after", model, tokenizer, quiet=not accelerator.is_main_process)
# accelerator.save_state(FOLDER) and accelerator.load_state(FOLDER) keep the optimizer's state too.
