"""Parameters of which each process holds a part, as `fully_shard` (FSDP2) makes them: where the parts begin and end.

torch cuts a dimension of length L for N processes into parts of ceil(L / N), so that the last ones may be shorter or
empty. The states of a parameter are cut too, each along one of its own dimensions; what has one element is kept by all.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sophia_galore.errors import ArgumentError
from sophia_galore.optim.spec import ParamSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sharding:
    """How a parameter is cut.

    Args:
        mesh: The processes.
        mesh_dim: Dimension of the mesh over which it is cut; None: each process has all of it.
        dim: Dimension of the parameter that is cut.
    """

    mesh: DeviceMesh
    mesh_dim: int | None
    dim: int

    @property
    def group(self) -> ProcessGroup | None:
        """The processes that share the parameter; None: there is only one."""
        return None if self.mesh_dim is None or self.size == 1 else self.mesh.get_group(self.mesh_dim)

    @property
    def size(self) -> int:
        """Number of these processes."""
        return 1 if self.mesh_dim is None else self.mesh.size(self.mesh_dim)

    @property
    def rank(self) -> int:
        """Number of this process among them."""
        return 0 if self.mesh_dim is None else self.mesh.get_local_rank(self.mesh_dim)

    def shard(self, shape: Sequence[int], dim: int | None, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return a tensor of zeros that is cut for the same processes.

        Args:
            shape: Its whole shape.
            dim: The dimension that is cut; None: each process has all of it.
            device: Device of this process's part.
            dtype: Its dtype.
        """
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placements = [
            Shard(dim) if dim is not None and index == self.mesh_dim else Replicate() for index in range(self.mesh.ndim)
        ]
        local = torch.zeros(part_shape(shape, dim, self.rank, self.size), dtype=dtype, device=device)
        strides = torch.empty(shape, device="meta").stride()
        made: Tensor = DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
        )
        return made


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there are none, and importing it takes time
    return module is not None and isinstance(tensor, module.DTensor)


def sharding_of(name: str, tensor: Tensor) -> Sharding | None:
    """Return how a parameter is cut; None: it is an ordinary tensor.

    Args:
        name: Its name, for the message.
        tensor: The parameter.

    Raises:
        ArgumentError: It is cut over several dimensions of the mesh, or in another way than in whole parts.
    """
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor import DTensor, Replicate, Shard

    assert isinstance(tensor, DTensor)
    placements = tuple(tensor.placements)
    cut = [index for index, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    if len(cut) > 1 or any(type(placements[index]) is not Shard for index in cut):
        raise ArgumentError(
            f"{name} is sharded as {placements}, and only one dimension of the mesh may cut a parameter.",
            "Shard with fully_shard alone, over a mesh of one dimension or with replicas (HSDP); tensor parallelism "
            "can't be combined with it.",
        )
    mesh_dim = cut[0] if cut else None
    return Sharding(tensor.device_mesh, mesh_dim, dim_of(tensor) or 0)


def part(length: int, rank: int, size: int) -> slice:
    """Return which part of a length a process has.

    Args:
        length: The whole length.
        rank: Number of the process.
        size: Number of processes.
    """
    step = -(-length // size)
    return slice(min(rank * step, length), min((rank + 1) * step, length))


def part_shape(shape: Sequence[int], dim: int | None, rank: int, size: int) -> Shape:
    """Return the shape of a process's part of a tensor; `dim` None: it has all of it."""
    if dim is None:
        return tuple(shape)
    own = part(shape[dim], rank, size)
    return (*shape[:dim], own.stop - own.start, *shape[dim + 1 :])


def part_of(full: Tensor, dim: int | None, rank: int, size: int) -> Tensor:
    """Return a process's part of a whole tensor, a view; `dim` None: it has all of it."""
    if dim is None:
        return full
    own = part(full.shape[dim], rank, size)
    return full.narrow(dim, own.start, own.stop - own.start)


def cut_dim(spec: ParamSpec, shape: Shape, sharding: Sharding) -> int | None:
    """Return the dimension along which a state tensor is cut; None: each process has all of it.

    Args:
        spec: Its parameter.
        shape: Shape of the state tensor.
        sharding: How the parameter is cut.
    """
    if sharding.mesh_dim is None or math.prod(shape) <= 1:
        return None
    if shape == spec.shape:
        return sharding.dim
    if spec.subspace is not None and shape == spec.held_shape:
        # (m, r) by rows, whatever is cut; (r, n) by columns if the parameter is: its parts are products of parts then.
        return sharding.dim if spec.side == "left" else 0
    return max(range(len(shape)), key=lambda dim: shape[dim])


def local_of(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, which shares its memory; an ordinary tensor is returned unchanged."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local


def dim_of(tensor: Tensor) -> int | None:
    """Return the dimension along which a tensor is cut; None: each process has all of it."""
    if is_sharded(tensor):
        for placement in tensor.placements:  # type: ignore[attr-defined]
            if placement.is_shard():
                return int(placement.dim)
    return None


def copy_parts(own: Tensor, saved: Tensor, sharding: Sharding | None) -> None:
    """Copy a saved state tensor into one's own, each of which may be whole or cut.

    Args:
        own: Changed in place.
        saved: Of the same whole shape. If it is cut in another way, the processes send each other their parts.
        sharding: How the parameter is cut.
    """
    if is_sharded(own) and is_sharded(saved) and own.placements == saved.placements:  # type: ignore[attr-defined]
        local_of(own).copy_(local_of(saved))
        return
    full = saved.full_tensor() if is_sharded(saved) else saved  # type: ignore[attr-defined]
    if sharding is not None and is_sharded(own):
        full = part_of(full, dim_of(own), sharding.rank, sharding.size)
    local_of(own).copy_(full)


def shard_states(
    tensors: Mapping[str, tuple[Shape, torch.dtype]], spec: ParamSpec, sharding: Sharding, device: torch.device
) -> dict[str, Tensor]:
    """Return state tensors of zeros that are cut as `cut_dim` says.

    Args:
        tensors: Whole shapes and dtypes by name.
        spec: The parameter.
        sharding: How it is cut.
        device: Device of this process's parts.
    """
    return {
        key: sharding.shard(shape, cut_dim(spec, shape, sharding), device, dtype)
        for key, (shape, dtype) in tensors.items()
    }


def all_true(flags: Tensor, groups: Sequence[ProcessGroup]) -> Tensor:
    """Return which flags are true in every process.

    Args:
        flags: (N,) bool.
        groups: The groups of processes that are asked, one after the other.
    """
    whole = flags.to(torch.uint8)
    for group in groups:
        torch.distributed.all_reduce(whole, op=torch.distributed.ReduceOp.MIN, group=group)
    return whole.bool()


def groups_of(tensors: Mapping[str, Tensor]) -> list[ProcessGroup]:
    """Return the groups of processes over which some of these tensors are cut, each once and in order.

    Args:
        tensors: By the parameter's name.
    """
    groups: dict[int, ProcessGroup] = {}
    for name, tensor in tensors.items():
        sharding = sharding_of(name, tensor)
        if sharding is not None and sharding.group is not None:
            groups[id(sharding.group)] = sharding.group
    return list(groups.values())


def whole_norm(grad: Tensor) -> float:
    """Return the Euclidean norm of a gradient, of which each process may have a part."""
    square = torch.linalg.vector_norm(local_of(grad), dtype=torch.float64).square()
    for group in groups_of({"": grad}):
        torch.distributed.all_reduce(square, group=group)
    return float(square.sqrt())
