"""A model that is sharded over several processes (FSDP2): `torchrun --nproc-per-node 2 examples/fsdp2_loop.py`."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from small import arguments, batch, model_and_tokenizer, show_loss
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sophia_galore

options = arguments()
backend = "nccl" if options.device == "cuda" else "gloo"
if "RANK" in os.environ:
    dist.init_process_group(backend)
else:  # without torchrun: one process
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
rank, num_processes = dist.get_rank(), dist.get_world_size()
if options.device == "cuda":
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))

model, tokenizer = model_and_tokenizer(options.model)
model.to(options.device)
mesh = init_device_mesh(options.device, (num_processes,))
placement = sophia_galore.shard_placement(num_processes)  # cuts the dimension with which little is sent
for layer in [*model.model.layers, model]:
    fully_shard(layer, mesh=mesh, shard_placement_fn=placement)
optimizer = sophia_galore.GaLore(
    model.named_parameters(),  # after fully_shard, which replaces the parameters
    lr=1e-2 if options.model is None else 1e-3,
    rank=16 if options.model is None else 128,
)
inputs = batch(tokenizer, options.device)
own = {key: rows.chunk(num_processes)[rank] for key, rows in inputs.items()}

show_loss("before", model, tokenizer, quiet=rank > 0)
for _ in range(options.steps):
    model(**own).loss.backward()  # gradients are averaged over the processes
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
show_loss("after", model, tokenizer, quiet=rank > 0)
dist.destroy_process_group()
