"""FSDP2 as Accelerate and the Trainer set it up: they replace parameters, wrap optimizers, and save by themselves.

They shard on GPUs only, so each process is told that it has one; tensors stay on the CPU.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer

from contract.test_torch_optimizers_nameless import arguments, rows
from processes import in_processes
from small_net import assert_same
from sophia_galore import GaLore
from tiny import tiny_model

SETTINGS: dict[str, Any] = {"lr": 1e-3, "rank": 16, "update_proj_gap": 3, "projection_bits": 32}


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        for name, param in model.named_parameters()
    }


def begin_anew() -> None:
    """Forget what Accelerate found out in the process that this one is a copy of."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def with_accelerate(folder: Path, kind: str, *, named: bool, resumes: bool) -> dict[str, Tensor]:
    """Five steps, saved, and five more; or only the last five."""
    begin_anew()
    PartialState(cpu=True)._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
        state_dict_type=kind,
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    model = tiny_model("llama", tied=False)
    model, optimizer = accelerator.prepare(
        model, GaLore(model.named_parameters() if named else model.parameters(), **SETTINGS)
    )
    assert all(isinstance(param, DTensor) for group in optimizer.param_groups for param in group["params"])
    rows = torch.randint(3, 320, (4, 12), generator=torch.Generator().manual_seed(0))
    rows = rows.chunk(dist.get_world_size())[dist.get_rank()]

    def train() -> None:
        for _ in range(5):
            accelerator.backward(model(input_ids=rows, labels=rows).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    if resumes:
        accelerator.load_state(str(folder))
    else:
        train()
        before = weights(model)
        accelerator.save_state(str(folder))
        assert_same(weights(model), before)
    train()
    return weights(model)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("SHARDED_STATE_DICT", False),
        pytest.param("SHARDED_STATE_DICT", True, marks=pytest.mark.thorough),
        ("FULL_STATE_DICT", True),
    ],
)
def test_accelerate(kind: str, named: bool, tmp_path: Path) -> None:
    def run(num: int, *, resumes: bool) -> dict[str, Tensor]:
        return in_processes(
            lambda: with_accelerate(tmp_path / "saved", kind, named=named, resumes=resumes), num, tmp_path / "run"
        )[0]

    undisturbed = run(2, resumes=False)
    assert_same(run(2, resumes=True), undisturbed)
    for name, weight in run(4, resumes=True).items():
        # Worst seen: 5.5e-8 of the norm, from sums in another order.
        assert float((weight - undisturbed[name]).norm() / undisturbed[name].norm()) < 1e-6


def test_the_trainer_makes_it_by_class_and_arguments(tmp_path: Path) -> None:
    """Nameless, after the model was sharded; what was resumed ends on the same bits."""

    def run(*, resumes: bool) -> dict[str, Tensor]:
        begin_anew()
        asked = arguments(
            tmp_path / "out",
            fsdp=True,
            fsdp_config={
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                "cpu_ram_efficient_loading": False,
                "state_dict_type": "SHARDED_STATE_DICT",
            },
        )
        assert asked.device.type == "cpu"  # which sets up the state that is changed now
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        trainer = Trainer(
            tiny_model("llama", tied=False),
            asked,
            train_dataset=rows(),
            optimizer_cls_and_kwargs=(GaLore, {"lr": 1e-2, "rank": 8, "update_proj_gap": 2, "state_bits": 8}),
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2") if resumes else None)
        optimizer = trainer.optimizer.optimizer
        assert optimizer.num_steps == 4
        assert all(isinstance(param, DTensor) for group in optimizer.param_groups for param in group["params"])
        return weights(trainer.model)

    undisturbed = in_processes(lambda: run(resumes=False), 2, tmp_path / "run")[0]
    assert_same(in_processes(lambda: run(resumes=True), 2, tmp_path / "run")[0], undisturbed)
