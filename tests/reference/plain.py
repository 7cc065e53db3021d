"""The plainest form of the optimizers, float64, straight from the papers."""

from __future__ import annotations

import torch
from torch import Tensor


class PlainGaLore:
    """GaLore (arXiv 2403.03507), algorithm 1 with Adam inside, for one matrix; no staggering, no extras."""

    def __init__(
        self,
        weight: Tensor,
        *,
        rank: int,
        gap: int,
        scale: float,
        lr: float,
        weight_decay: float = 0.0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        self.weight = weight.double().clone()
        self.rank, self.gap, self.scale, self.lr, self.weight_decay = rank, gap, scale, lr, weight_decay
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.step_number = 0

    def step(self, grad: Tensor) -> None:
        grad = grad.double()
        tall = grad.shape[0] >= grad.shape[1]
        if self.step_number % self.gap == 0:
            u, _, vh = torch.linalg.svd(grad, full_matrices=False)
            new = vh[: self.rank].T if tall else u[:, : self.rank]
            # A vector's sign is arbitrary, and the moments stay as they are (as published), so both sides
            # must take the same one: the largest entry is positive.
            self.basis = new * new.gather(0, new.abs().argmax(0, keepdim=True)).sign()
        self.step_number += 1
        low = grad @ self.basis if tall else self.basis.T @ grad
        if self.step_number == 1:
            self.m, self.v = torch.zeros_like(low), torch.zeros_like(low)
        self.m = self.beta1 * self.m + (1 - self.beta1) * low
        self.v = self.beta2 * self.v + (1 - self.beta2) * low**2
        m_hat = self.m / (1 - self.beta1**self.step_number)
        v_hat = self.v / (1 - self.beta2**self.step_number)
        normed = m_hat / (v_hat.sqrt() + self.eps)
        back = normed @ self.basis.T if tall else self.basis @ normed
        self.weight = self.weight * (1 - self.lr * self.weight_decay) - self.lr * self.scale * back
