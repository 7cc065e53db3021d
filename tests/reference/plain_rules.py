"""Every rule in its plainest form: float64, one class a rule, straight from the papers.

A rule is told gradients by `direction` and keeps its state in attributes: those named in `first` are made of
gradients, those in `second` of their squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sophia_galore.numerics.hyper import Hyper


class PlainRule:
    """What all have in common."""

    first: tuple[str, ...] = ()
    second: tuple[str, ...] = ()

    def __init__(self, hyper: Hyper, shape: tuple[int, ...]) -> None:
        self.hyper = hyper
        for name in (*self.first, *self.second):
            setattr(self, name, torch.zeros(shape, dtype=torch.float64))

    def direction(self, g: Tensor, t: int) -> Tensor:
        raise NotImplementedError


class AdamW(PlainRule):
    """arXiv 1412.6980, algorithm 1."""

    first, second = ("m",), ("v",)
    m: Tensor
    v: Tensor

    def direction(self, g: Tensor, t: int) -> Tensor:
        b1, b2 = self.hyper.beta1, self.hyper.beta2
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        m_hat = self.m / (1 - b1**t)
        v_hat = self.v / (1 - b2**t)
        return m_hat / (v_hat.sqrt() + self.hyper.eps)


class Sophia(PlainRule):
    """arXiv 2305.14342, algorithms 2 and 3; the first estimate of h is taken as it is."""

    first, second = ("m",), ("h",)
    m: Tensor
    h: Tensor
    seen = False

    def observe(self, g: Tensor, num_samples: int) -> None:
        estimate = num_samples * g * g
        b2 = self.hyper.beta2 if self.seen else 0.0
        self.h = b2 * self.h + (1 - b2) * estimate
        self.seen = True

    def direction(self, g: Tensor, t: int) -> Tensor:
        self.m = self.hyper.beta1 * self.m + (1 - self.hyper.beta1) * g
        floor = torch.tensor(self.hyper.eps, dtype=torch.float64)
        return torch.clip(self.m / torch.maximum(self.hyper.rho * self.h, floor), -1, 1)


class Adafactor(PlainRule):
    """arXiv 1804.04235, algorithm 4, with V = r c / mean(r) written out, and a first moment of the updates."""

    first, second = ("m",), ("r", "c")
    m: Tensor

    def __init__(self, hyper: Hyper, shape: tuple[int, ...]) -> None:
        super().__init__(hyper, shape)
        self.r, self.c = torch.zeros(shape[0], 1).double(), torch.zeros(1, shape[1]).double()

    def direction(self, g: Tensor, t: int) -> Tensor:
        decay = 1 - t**-0.8
        squares = g**2 + self.hyper.eps**2
        self.r = decay * self.r + (1 - decay) * squares.mean(1, keepdim=True)
        self.c = decay * self.c + (1 - decay) * squares.mean(0, keepdim=True)
        u = g / (self.r @ self.c / self.r.mean()).sqrt()
        u = u / max(1.0, float((u**2).mean().sqrt()))
        self.m = self.hyper.beta1 * self.m + (1 - self.hyper.beta1) * u
        return self.m / (1 - self.hyper.beta1**t)


class Sgd(PlainRule):
    """Polyak 1964: b <- beta b + g."""

    first = ("m",)
    m: Tensor

    def direction(self, g: Tensor, t: int) -> Tensor:
        self.m = self.hyper.beta1 * self.m + g
        return self.m


class Muon(PlainRule):
    """Jordan et al., with Nesterov momentum; on singular values, where Newton-Schulz is a polynomial in each."""

    first = ("m",)
    m: Tensor

    def direction(self, g: Tensor, t: int) -> Tensor:
        b1 = self.hyper.beta1
        self.m = b1 * self.m + (1 - b1) * g
        u, s, vh = torch.linalg.svd(b1 * self.m + (1 - b1) * g, full_matrices=False)
        length = s.norm()
        s = s / length if length > 0 else s
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        return 0.2 * max(g.shape) ** 0.5 * (u * s) @ vh


class Scale(PlainRule):
    """arXiv 2506.16659, algorithm 1: each column divided by its norm; no state."""

    def direction(self, g: Tensor, t: int) -> Tensor:
        return _columns_of_length_1(g)


class ScaleMomentum(PlainRule):
    """The same, of a running mean: what the paper does for the last layer."""

    first = ("m",)
    m: Tensor

    def direction(self, g: Tensor, t: int) -> Tensor:
        self.m = self.hyper.beta1 * self.m + (1 - self.hyper.beta1) * g
        return _columns_of_length_1(self.m)


def _columns_of_length_1(g: Tensor) -> Tensor:
    out = g.clone()
    for column in range(g.shape[1]):
        length = g[:, column].norm()
        if length > 0:
            out[:, column] /= length
    return out


PLAIN_RULES: dict[str, type[PlainRule]] = {
    "adamw": AdamW,
    "sophia": Sophia,
    "adafactor": Adafactor,
    "sgd": Sgd,
    "muon": Muon,
    "scale": Scale,
    "scale_momentum": ScaleMomentum,
}
