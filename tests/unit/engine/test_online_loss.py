"""Cross-entropy by blocks of the vocabulary, against torch's own in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sophia_galore.engine.online_loss import OnlineLoss
from sophia_galore.numerics.clocks import Clocks

NUM_TOKENS, VOCAB = 40, 330
SOFTCAP = pytest.mark.parametrize("softcap", [None, 1.5], ids=["uncapped", "capped"])


def tiles(block: int, chunk: int, num_tokens: int = NUM_TOKENS, vocab: int = VOCAB) -> Iterator[tuple[slice, slice]]:
    for start in range(0, vocab, block):
        for first in range(0, num_tokens, chunk):
            yield slice(first, min(first + chunk, num_tokens)), slice(start, min(start + block, vocab))


def by_blocks(
    logits: Tensor,
    labels: Tensor,
    softcap: float | None,
    block: int,
    chunk: int,
    clocks: Clocks | None = None,
) -> tuple[float, Tensor]:
    """Loss, and gradient of loss / 7."""
    online = OnlineLoss(labels, softcap, clocks)
    every = list(tiles(block, chunk, *logits.shape))
    for tokens, words in every:
        online.take(tokens, words, logits[tokens, words].clone())
    grad = torch.full_like(logits, torch.nan)
    for tokens, words in every:
        grad[tokens, words] = online.grad(tokens, words, logits[tokens, words].clone(), 1 / 7.0)
    return online.total(), grad


def exact(logits: Tensor, labels: Tensor, softcap: float | None) -> tuple[float, Tensor]:
    wide = logits.double().requires_grad_()
    capped = wide if softcap is None else softcap * torch.tanh(wide / softcap)
    loss = functional.cross_entropy(capped, labels, reduction="sum")
    (loss / 7).backward()
    assert wide.grad is not None
    return float(loss.detach()), wide.grad


def random_logits(scale: float) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    logits = scale * torch.randn(NUM_TOKENS, VOCAB, generator=draw)
    return logits, torch.randint(VOCAB, (NUM_TOKENS,), generator=draw)


@SOFTCAP
@pytest.mark.parametrize("scale", [0.1, 3.0, 300.0])
@pytest.mark.parametrize(("block", "chunk"), [(330, 40), (64, 40), (7, 3), (1, 40), (100, 1)])
def test_loss_and_gradient_equal_torch(block: int, chunk: int, scale: float, softcap: float | None) -> None:
    """Blocks that divide the vocabulary or don't, and logits whose exponentials float32 does not hold."""
    logits, labels = random_logits(scale)
    loss, grad = by_blocks(logits, labels, softcap, block, chunk)
    expected_loss, expected = exact(logits, labels, softcap)
    # float32 roundings of single logits (6e-8 of a logit of up to 1000 moves its exponential by 6e-5, but such a
    # token's gradient is nearly one-hot) and sums of 330; worst seen 1.7e-7 and 1.1e-7.
    assert loss == pytest.approx(expected_loss, rel=2e-6)
    assert float((grad - expected).norm() / expected.norm()) <= 2e-6


def test_a_gradient_sums_to_nothing() -> None:
    """Each token's gradient by its logits is softmax - onehot; a softmax sums to 1."""
    logits, labels = random_logits(3.0)
    _, grad = by_blocks(logits, labels, None, 17, 9)
    assert float(grad.sum(1).abs().max()) <= 1e-6  # 330 float32 roundings of numbers that sum to 1 / 7


def test_logits_that_are_not_finite_show_in_the_loss() -> None:
    for bad in (torch.nan, torch.inf):
        for clocks in (None, Clocks(0, ("test",))):
            logits, labels = random_logits(1.0)
            logits[3, 200] = bad
            loss, _ = by_blocks(logits, labels, None, 64, 40, clocks)
            assert not torch.isfinite(torch.tensor(loss))
            assert bool(((labels >= 0) & (labels < VOCAB)).all())


@SOFTCAP
@pytest.mark.parametrize("block", [5, 12])
def test_drawn_labels_follow_the_softmax(softcap: float | None, block: int) -> None:
    num_draws, vocab = 20_000, 12
    logits = 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(num_draws, dtype=torch.int64)
    every = logits.expand(num_draws, vocab).contiguous()
    loss, grad = by_blocks(every, labels, softcap, block, 6000, Clocks(0, ("test",)))
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = num_draws * capped.softmax(0)
    # Pearson's sum has 11 degrees of freedom: 11 on average, above 31.3 once in 1000.
    assert float(((labels.bincount(minlength=vocab) - expected) ** 2 / expected).sum()) <= 31.3
    # Loss and gradient are those of the labels that were drawn.
    expected_loss, expected_grad = exact(every, labels, softcap)
    assert loss == pytest.approx(expected_loss, rel=2e-6)  # as above
    assert float((grad - expected_grad).norm() / expected_grad.norm()) <= 2e-6


def test_a_drawn_label_does_not_depend_on_the_tiles() -> None:
    """Nor on the tokens before it, which another process may have."""
    logits, labels = random_logits(1.0)
    drawn = []
    for block, chunk in ((64, 16), (330, 40), (7, 3)):
        drawn.append(labels.clone())
        by_blocks(logits, drawn[-1], None, block, chunk, Clocks(0, ("one",)))
    assert all(torch.equal(other, drawn[0]) for other in drawn)
    later = labels[25:].clone()
    by_blocks(logits[25:], later, None, 64, 16, Clocks(0, ("one",), first=25))
    assert torch.equal(later, drawn[0][25:])
    other = labels.clone()
    by_blocks(logits, other, None, 64, 16, Clocks(0, ("other",)))
    assert not torch.equal(other, drawn[0])


def test_neighbouring_tokens_draw_independently() -> None:
    num_draws, vocab = 60_000, 6
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1))
    _, drawn = Clocks(5, ("test",)).sample(logits.repeat(num_draws, 1), slice(0, num_draws), slice(0, vocab))
    share = logits.softmax(0)
    for gap in (1, 2, 64):
        pairs = (drawn[:-gap] * vocab + drawn[gap:]).bincount(minlength=vocab**2)
        expected = (num_draws - gap) * (share[:, None] * share).flatten()
        # Pearson's sum has 35 degrees of freedom: above 66.6 once in 1000.
        assert float(((pairs - expected) ** 2 / expected).sum()) <= 66.6, gap
