"""What is fake and what stays real where arithmetic needs no memory."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sophia_galore.errors import NotPredictable
from sophia_galore.memory.fake_tensors import FakeTensors
from sophia_galore.memory.forecast import naming_unpredictable
from sophia_galore.memory.report import peak_process_bytes

CPU = torch.device("cpu")


def is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def test_what_is_made_out_of_nothing() -> None:
    with FakeTensors(CPU):
        fake = [torch.zeros(3), torch.ones(3, 2, dtype=torch.bfloat16), torch.empty(4), torch.rand(2), torch.randn(2)]
        fake += [torch.full((2,), 0.5), torch.arange(0.0, 1.0, 0.25), torch.linspace(0, 1, 3)]
        fake += [torch.zeros(3, dtype=torch.int8), torch.randint(0, 255, (3,), dtype=torch.int32)]
        real = [torch.arange(5), torch.zeros(2, dtype=torch.int64), torch.ones(3, dtype=torch.bool)]
        real += [torch.full((2,), 7), torch.full((2,), True), torch.tensor([3, 4])]
    assert all(map(is_fake, fake)) and not any(map(is_fake, real))
    assert real[0].tolist() == [0, 1, 2, 3, 4] and real[3].tolist() == [7, 7] and real[5].tolist() == [3, 4]
    assert [tuple(tensor.shape) for tensor in fake[:3]] == [(3,), (3, 2), (4,)] and fake[1].dtype == torch.bfloat16


def test_what_exists_stays_what_it_is_and_a_fake_argument_makes_a_fake_result() -> None:
    weight, tokens = torch.ones(4, 2), torch.tensor([1, 3, 3])
    with FakeTensors(CPU):
        table = torch.zeros(4, 2)
        assert not is_fake(weight * 2) and is_fake(weight @ table.T)
        assert is_fake(table[tokens]) and table[tokens].shape == (3, 2)
        assert weight.add_(table) is weight and not is_fake(weight), "what would be written is dropped"
        assert not is_fake(tokens + 1) and (tokens == 3).sum().item() == 2
    assert weight.tolist() == [[1.0, 1.0]] * 4


def test_a_real_mask_gives_the_right_shape() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    with FakeTensors(CPU):
        hidden = torch.zeros(2, 3, 5)
        assert hidden[mask].shape == (3, 5)
        hidden[mask] = torch.ones(3, 5)
        grad = torch.zeros(2, 3, 5).index_put((mask,), torch.ones(3, 5))
        assert grad.shape == (2, 3, 5) and is_fake(grad)


def test_asked_for_values_all_is_well() -> None:
    with FakeTensors(CPU):
        values = torch.randn(3)
        assert bool(torch.isfinite(values).all()) is True
        assert bool((values < 0).any()) is False
        assert values.sum().item() == 0.5, "not 1, so that whatever scales by it does"
        assert torch.zeros(3, dtype=torch.int32).sum().item() == 1
        assert bool(torch.isfinite(torch.zeros(3)).all()) is True


def test_what_was_made_as_zeros_holds_nothing_else_until_it_is_written_to() -> None:
    with FakeTensors(CPU):
        state = torch.zeros(4, 2)
        assert not state.any() and not state.clone().any() and not state[1:].bfloat16().any()
        state.mul_(0.9)
        assert not state.any()
        state[2:].add_(torch.randn(2))
        assert state.any() and state.clone().any()
        state.zero_()
        assert not state.any()
        state.copy_(torch.randn(4, 2))
        assert state.any()
        assert torch.empty(3).any() and torch.ones_like(torch.zeros(3)).any() and torch.rand_like(state.zero_()).any()
        assert torch.empty_like(torch.zeros(3)).exponential_(generator=torch.Generator()).any()


@pytest.mark.parametrize("device", ["cpu"])
def test_a_hundred_gib_take_no_memory(device: str) -> None:
    before_bytes = peak_process_bytes()
    with FakeTensors(CPU):
        large = torch.zeros(25 * 2**30, device=device)
        assert large.untyped_storage().nbytes() == 100 * 2**30
        assert (large + 1).view(-1, 1024).sum(1).shape == (25 * 2**20,)
        large[::2].add_(1)
    assert peak_process_bytes() < before_bytes + 2**30


def test_outside_of_the_context_tensors_are_real() -> None:
    with FakeTensors(CPU):
        torch.zeros(3)
    assert not is_fake(torch.zeros(3)) and torch.zeros(3).sum().item() == 0


def test_autograd_goes_through() -> None:
    with FakeTensors(CPU):
        weight = torch.zeros(3, 2, requires_grad=True)
        (torch.zeros(4, 2) @ weight.T).sum().backward()
        assert weight.grad is not None and weight.grad.shape == (3, 2)


def test_what_a_models_code_can_not_do_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch would log a traceback of some errors; a message has what it says."""
    logged: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("torch._subclasses.fake_tensor"), "callHandlers", logged.append)
    with pytest.raises(NotPredictable, match="split_with_sizes"), naming_unpredictable("other"), FakeTensorMode():
        torch.empty(4).split([1, 1])
    assert not logged
