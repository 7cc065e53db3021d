"""Send tensors between processes: all of them at once, of any shapes and dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from sophia_galore.optim.sharding import Sharding

# So that each tensor in a buffer begins where its dtype may begin.
_ALIGNMENT = 16


def exchange(sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]], sharding: Sharding) -> None:
    """Send tensors to all processes, and receive tensors from all of them.

    Args:
        sent: For each process, the tensors that it gets from this one.
        received: For each process, what this one gets from it, in the same order and of the same shapes and dtypes;
            overwritten. They must not overlap.
        sharding: The processes.
    """
    device = torch.device(sharding.mesh.device_type)
    num_sent, num_received = ([sum(map(_num_bytes, tensors)) for tensors in way] for way in (sent, received))
    outgoing = torch.empty(sum(num_sent), dtype=torch.uint8, device=device)
    start = 0
    for tensor in chain.from_iterable(sent):
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        outgoing[start : start + len(flat)].copy_(flat)
        start += _num_bytes(tensor)
    incoming = torch.empty(sum(num_received), dtype=torch.uint8, device=device)
    torch.distributed.all_to_all_single(incoming, outgoing, num_received, num_sent, group=sharding.group)
    start = 0
    for tensor in chain.from_iterable(received):
        used = tensor.numel() * tensor.dtype.itemsize
        tensor.copy_(incoming[start : start + used].view(tensor.dtype).view(tensor.shape))
        start += _num_bytes(tensor)


def _num_bytes(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
