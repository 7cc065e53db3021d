"""The optimizers under `fully_shard` (FSDP2): as one process, whatever the number of processes and the parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import sophia_galore
from processes import in_processes
from small_net import VARIANTS, assert_same, assert_same_entries, galore, loss_of, make_net, sophia
from sophia_galore.errors import ArgumentError, NonFiniteError
from sophia_galore.optim import sharded_step
from sophia_galore.optim.owner_step import rounds
from tiny import tiny_model

# Worst seen: 2.9e-7 of a weight's norm after 20 steps, from sums in another order.
CLOSE = 1e-6
# Rules that work on each element by itself, without a residual: each process steps its own part.
BY_PARTS = ["tracked", "svd", "randomized-4-bit", "random", "adaptive", "rule-sophia", "rule-sgd", "sophia"]

Ends = dict[str, Tensor]


def sharded(net: nn.Module, placement: Any = None) -> nn.Module:
    """The network, cut; torch cuts no scalars."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(net, mesh=mesh, ignored_params={net.temperature}, shard_placement_fn=placement)
    return net


def gradients(net: nn.Module, step: int) -> dict[str, Tensor]:
    """The gradients of a step, the same for whole and for sharded parameters; one parameter has none."""
    draw = torch.Generator().manual_seed(step)
    return {name: torch.randn(param.shape, generator=draw) for name, param in net.named_parameters() if name != "idle"}


def run(net: nn.Module, optimizer: Any, steps: range) -> None:
    """Steps with given gradients; where there is a curvature, it is observed at every other one."""
    for step in steps:
        for offset in (1000, 0) if optimizer.curved_parameters() and step % 2 else (0,):
            grads = gradients(net, step + offset)
            for name, param in net.named_parameters():
                if name in grads:
                    grad = grads[name].to(param.dtype)
                    cut = isinstance(param, DTensor)
                    param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if cut else grad
            if offset:
                optimizer.observe_curvature(32)
            else:
                optimizer.step()
        optimizer.zero_grad()


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def weights(net: nn.Module) -> Ends:
    return {name: whole(param.detach()).clone() for name, param in net.named_parameters()}


def states(optimizer: Any) -> dict[str, dict[str, Any]]:
    return {
        name: {key: whole(value) for key, value in optimizer.state[param].items()}
        for name, param in optimizer.named_parameters().items()
    }


def error(found: Ends, wanted: Ends) -> float:
    """The largest difference of a weight, relative to its norm."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


ALL = [
    (variant, bits, dtype) for bits in (32, 16, 8) for variant in VARIANTS for dtype in (torch.float32, torch.bfloat16)
]


def compare_to_the_bit(cases: list[tuple[str, int, torch.dtype]], num: int, folder: Path) -> None:
    def ends(shard: Callable[[nn.Module], nn.Module]) -> list[Any]:
        made = []
        for variant, bits, dtype in cases:
            net = shard(make_net(dtype))
            optimizer = VARIANTS[variant](net, state_bits=bits)
            run(net, optimizer, range(1, 6))
            made.append((weights(net), states(optimizer)))
        return made

    results, alone = in_processes(lambda: ends(sharded), num, folder), ends(lambda net: net)
    for result in results:
        for found, wanted in zip(result, alone, strict=True):
            assert_same(found[0], wanted[0])
            assert_same_entries(found[1], wanted[1])


@pytest.mark.parametrize("num", [2, 3, 4])
def test_owners_equal_one_process_to_the_bit(num: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With three and four processes rows do not divide, and some have none."""
    monkeypatch.setattr(sharded_step, "is_local", lambda *_: False)
    # Each variant once; what is left is thorough.
    compare_to_the_bit([ALL[(5 * index) % len(ALL)] for index in range(num - 2, 13, 3)], num, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("num", [2, 3, 4])
def test_owners_equal_one_process_in_every_format(num: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_step, "is_local", lambda *_: False)
    compare_to_the_bit(ALL, num, tmp_path)


PLACEMENTS: dict[str, Callable[[int], Any]] = {
    "rows": lambda num: None,
    "longer": sophia_galore.shard_placement,
    # the shorter side of tall matrices
    "columns": lambda num: lambda param: Shard(1) if param.ndim == 2 and param.shape[1] % num == 0 else None,
}


@pytest.mark.parametrize(
    ("num", "placement"),
    [
        (3, "rows"),
        (2, "longer"),
        *(pytest.param(*case, marks=pytest.mark.thorough) for case in [(2, "rows"), (4, "rows"), (4, "columns")]),
    ],
)
def test_parts_equal_one_process(num: int, placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose, by_parts = sharded_step.is_local, []
    monkeypatch.setattr(sharded_step, "is_local", lambda *given: by_parts.append(choose(*given)) or by_parts[-1])

    def ends(shard: Callable[[nn.Module], nn.Module]) -> list[Ends]:
        made = []
        for variant in BY_PARTS:
            net = shard(make_net())
            run(net, VARIANTS[variant](net), range(1, 21))
            made.append(weights(net))
        return made

    def body() -> tuple[list[Ends], float]:
        made = ends(lambda net: sharded(net, PLACEMENTS[placement](num)))
        return made, sum(by_parts) / len(by_parts)

    results, alone = in_processes(body, num, tmp_path), ends(lambda net: net)
    for found, share in results:
        assert share > 0.8  # all but the refreshes
        assert max(map(error, found, alone)) < CLOSE


class Wide(nn.Module):
    """Matrices whose parts hold whole groups of noise and whole eight-bit blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.rise = nn.Linear(64, 256)
        self.fall = nn.Linear(256, 64, bias=False)
        self.head = nn.Linear(64, 256)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rounding_is_that_of_one_process(placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise belongs to elements, whoever has them; without a product, bits are those of one process."""
    choose, by_parts = sharded_step.is_local, []
    monkeypatch.setattr(sharded_step, "is_local", lambda *given: by_parts.append(choose(*given)) or by_parts[-1])
    makes = {
        (name, bits): (make, bits) for name, make in (("low", galore(rank=8)), ("sophia", sophia())) for bits in (16, 8)
    }

    def ends(num: int | None) -> list[Ends]:
        made = []
        for make, bits in makes.values():
            torch.manual_seed(0)
            net = Wide().bfloat16()
            if num is not None:
                mesh = init_device_mesh("cpu", (num,))
                fully_shard(net, mesh=mesh, shard_placement_fn=PLACEMENTS[placement](num))
            run(net, make(net, state_bits=bits), range(1, 9))
            made.append(weights(net))
        return made

    def body() -> tuple[list[Ends], list[bool]]:
        return ends(2), by_parts

    alone = ends(None)
    for found, chosen in in_processes(body, 2, tmp_path):
        assert any(chosen)
        for (name, _), one, other in zip(makes, found, alone, strict=True):
            if name == "sophia":
                assert_same(one, other)
            else:
                # A direction that differs in its last bits rounds a few weights and moments the other way.
                differ = sum(int((one[key] != other[key]).sum()) for key in other) / sum(
                    w.numel() for w in other.values()
                )
                assert differ < 0.01


CHECKPOINTS = {
    "tracked": {},
    "tracked, 16": {"state_bits": 16},
    "tracked, 8": {"state_bits": 8},
    "randomized-4-bit": {"state_bits": 8},
    "adaptive": {},
    "fira": {"state_bits": 16},
    "rule-adafactor": {"state_bits": 8},
    "apollo": {},
    "apollo, 8": {"state_bits": 8},
    "sophia": {},
    "sophia, 16": {"state_bits": 16},
}


@pytest.mark.parametrize("flat", [pytest.param(False, marks=pytest.mark.thorough), True], ids=["named", "flat"])
def test_saved_by_two_goes_on_with_one_two_and_four(flat: bool, tmp_path: Path) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def make(name: str) -> tuple[nn.Module, Any]:
        net = make_net() if not dist.is_initialized() else sharded(make_net())
        return net, VARIANTS[name.split(",")[0]](net, **CHECKPOINTS[name])

    def save() -> dict[str, Ends]:
        ends = {}
        for name in CHECKPOINTS:
            net, optimizer = make(name)
            run(net, optimizer, range(1, 4))
            before, kept = weights(net), states(optimizer)
            saved = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer, options=options), strict=True))
            dcp.save(saved, checkpoint_id=tmp_path / name)
            assert_same(weights(net), before)
            assert_same_entries(states(optimizer), kept)
            run(net, optimizer, range(4, 8))
            ends[name] = weights(net)
        return ends

    def go_on() -> dict[str, Ends]:
        ends = {}
        for name in CHECKPOINTS:
            net, optimizer = make(name)
            saved = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer, options=options), strict=True))
            dcp.load(saved, checkpoint_id=tmp_path / name)
            set_state_dict(
                net,
                optimizer,
                model_state_dict=saved["model"],
                optim_state_dict=saved["optimizer"],
                options=options,
            )
            assert optimizer.num_steps == 3
            run(net, optimizer, range(4, 8))
            ends[name] = weights(net)
        return ends

    undisturbed = in_processes(save, 2, tmp_path / "save")[0]
    for result in in_processes(go_on, 2, tmp_path / "two"):
        for name in CHECKPOINTS:
            assert_same(result[name], undisturbed[name])
    others = in_processes(go_on, 4, tmp_path / "four")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there is one process only
        others.append(go_on())
    for result in others:
        assert max(error(result[name], undisturbed[name]) for name in CHECKPOINTS) < CLOSE


def own_bytes(optimizer: Any) -> int:
    """Memory of a process's states."""
    tensors = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.itemsize for tensor in own)


def train_tiny(family: str, *, parts: bool, projection_bits: Any) -> tuple[Ends, int]:
    """Twenty steps, layers and root sharded one by one: the weights and the bytes of states."""
    rows = torch.randint(3, 320, (4, 12), generator=torch.Generator().manual_seed(0))
    model = tiny_model(family)
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in [*model.model.layers, model]:
            fully_shard(layer, mesh=mesh)
        rows = rows.chunk(dist.get_world_size())[dist.get_rank()] if parts else rows
    optimizer = sophia_galore.GaLore(
        model.named_parameters(), lr=1e-3, rank=16, update_proj_gap=8, projection_bits=projection_bits
    )
    for _ in range(20):
        model(input_ids=rows, labels=rows).loss.backward()
        if parts:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model), own_bytes(optimizer)


families = pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.thorough), "gemma3"])


@families
@pytest.mark.parametrize("num", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_real_models_train_as_in_one_process(family: str, num: int, tmp_path: Path) -> None:
    """Each process has a part of the batch, so gradients are sums in another order.

    Worst seen: 4.4e-7 with float32 bases; torch.optim.AdamW's weights differ by 3.5e-6. A basis in bfloat16 rounds
    some entries the other way, which makes 5e-4 of such a difference. The softmax does not feel a bias of the keys,
    whose gradient is rounding alone; AdamW makes steps of full length of it, which differ by 3.4e-6 of the bias.
    """
    alone, all_bytes = train_tiny(family, parts=True, projection_bits=32)
    for found, num_bytes in in_processes(lambda: train_tiny(family, parts=True, projection_bits=32), num, tmp_path):
        felt = [name for name in alone if not name.endswith("k_proj.bias")]
        assert error({name: found[name] for name in felt}, {name: alone[name] for name in felt}) < CLOSE
        assert num_bytes * num < 1.1 * all_bytes


@families
def test_real_models_by_their_owners_to_the_bit(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes have the same batch: the mean of two equal gradients is exact."""
    monkeypatch.setattr(sharded_step, "is_local", lambda *_: False)
    alone, _ = train_tiny(family, parts=False, projection_bits=16)
    for found, _ in in_processes(lambda: train_tiny(family, parts=False, projection_bits=16), 2, tmp_path):
        assert_same(found, alone)


def test_update_in_backward(tmp_path: Path) -> None:
    def body() -> list[Ends]:
        ends = []
        for attached in (True, False):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 8))
            fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
            optimizer = sophia_galore.GaLore(net.named_parameters(), lr=1e-2, rank=6, update_proj_gap=3)
            if attached:
                sophia_galore.attach(optimizer, net)
            for step in range(1, 6):
                loss_of(net, step).backward()
                assert not attached or all(param.grad is None for param in net.parameters())
                optimizer.step()
                optimizer.zero_grad()
            ends.append(weights(net))
        return ends

    for attached, stepped in in_processes(body, 2, tmp_path):
        assert_same(attached, stepped)


def test_a_limit_in_backward_is_that_of_the_whole_gradient(tmp_path: Path) -> None:
    def end() -> Ends:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 8))
        if dist.is_initialized():
            fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        optimizer = sophia_galore.GaLore(net.named_parameters(), lr=1e-2, rank=6, rule="sgd", dense_lr=1e-3)
        with sophia_galore.attach(optimizer, net, max_grad_norm=1e-3):
            for step in range(1, 4):
                loss_of(net, step).backward()
                optimizer.step()
        return weights(net)

    alone = end()
    for found in in_processes(end, 2, tmp_path):
        assert error(found, alone) < CLOSE


def test_what_one_process_sees_all_refuse(tmp_path: Path) -> None:
    """A gradient that is not finite in one part; nothing moves anywhere."""

    def body() -> str:
        net = sharded(make_net())
        optimizer = VARIANTS["tracked"](net)
        run(net, optimizer, range(1, 3))
        before, kept = weights(net), states(optimizer)
        for param in net.parameters():
            param.grad = torch.ones_like(param)
        if dist.get_rank() == 1:
            net.head.bias.grad.to_local()[-1] = float("nan")
        with pytest.raises(NonFiniteError) as refused:
            optimizer.step()
        assert_same(weights(net), before)
        assert_same_entries(states(optimizer), kept)
        return str(refused.value)

    assert all("head.bias is not finite at step 3" in said for said in in_processes(body, 2, tmp_path))


def test_what_is_refused_with_its_reason(tmp_path: Path) -> None:
    def body() -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        weight = nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh, [Shard(0), Shard(1)]))
        weight.grad = torch.ones_like(weight)
        with pytest.raises(ArgumentError, match="only one dimension of the mesh may cut a parameter"):
            sophia_galore.GaLore([("w", weight)], lr=1.0, rank=2).step()
        net = sharded(make_net())
        with pytest.raises(ArgumentError, match=r"sharded \(fully_shard\)(.|\n)*observe_curvature"):
            sophia_galore.watch(VARIANTS["sophia"](net), net)
        with pytest.raises(ArgumentError, match="Each process has all of temperature"):
            sophia_galore.attach(VARIANTS["tracked"](net), net)
        # Replicas of parts (HSDP) and parameters of which each process has all are stepped.
        for placements in ([Replicate(), Shard(0)], [Replicate(), Replicate()]):
            torch.manual_seed(0)
            weight = nn.Parameter(distribute_tensor(torch.randn(8, 8), mesh, placements))
            weight.grad = torch.ones_like(weight)
            optimizer = sophia_galore.GaLore([("w", weight)], lr=1.0, rank=2)
            optimizer.step()
            alone = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
            alone.grad = torch.ones_like(alone)
            sophia_galore.GaLore([("w", alone)], lr=1.0, rank=2).step()
            assert torch.equal(weight.full_tensor(), alone)

    in_processes(body, 4, tmp_path)


def test_states_made_before_the_model_was_sharded(tmp_path: Path) -> None:
    """Accelerate makes the optimizer first, and replaces its parameters then; states may exist already."""

    def body() -> list[Ends]:
        ends = []
        for first in (True, False):
            net = make_net()
            old = dict(net.named_parameters())
            optimizer = VARIANTS["adaptive"](net, state_bits=8)
            run(net, optimizer, range(1, 4) if first else range(0))
            sharded(net)
            new = dict(net.named_parameters())
            names = {id(param): name for name, param in old.items()}
            for group in optimizer.param_groups:
                group["params"] = [new[names[id(param)]] for param in group["params"]]
            run(net, optimizer, range(4, 7) if first else range(1, 7))
            assert all(isinstance(param, DTensor) == (name != "temperature") for name, param in new.items())
            ends.append(weights(net))
        return ends

    net = make_net()
    run(net, VARIANTS["adaptive"](net, state_bits=8), range(1, 7))
    for results in in_processes(body, 2, tmp_path):
        for found in results:
            assert error(found, weights(net)) < CLOSE


def test_rounds_are_balanced() -> None:
    sizes = [100, 90, 60, 40, 40, 30, 20, 10, 5, 5, 1]
    dealt = list(rounds(sizes, 3))
    assert sorted(index for bins in dealt for jobs in bins for index in jobs) == list(range(len(sizes)))
    for bins in dealt:
        loads = [sum(sizes[index] for index in jobs) for jobs in bins]
        assert max(loads) == max(sizes[index] for jobs in bins for index in jobs)
    assert len(dealt) == 2


def test_shard_placement() -> None:
    place = sophia_galore.shard_placement(4)
    assert place(nn.Parameter(torch.ones(8, 16))) == Shard(1)
    assert place(nn.Parameter(torch.ones(8, 18))) is None  # does not divide
    assert place(nn.Parameter(torch.ones(16, 8))) is None
    assert place(nn.Parameter(torch.ones(16))) is None
    with pytest.raises(ArgumentError, match="num_processes=0"):
        sophia_galore.shard_placement(0)
