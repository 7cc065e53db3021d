"""A step in a subspace in its plainest form: float64, full-size matrices, the basis is given.

Wide matrices are worked on transposed, so that there is one side only; no rule minds.
"""

from __future__ import annotations

import torch
from plain_rules import Adafactor, PlainRule, Sophia
from torch import Tensor

from sophia_galore.optim.spec import ParamSpec


class PlainProjected:
    """One matrix, stepped by a rule in subspaces that the caller chooses.

    Args:
        spec: What is to be done; read as numbers only.
        rule: The rule, with state for (longer side, rank).
        weight: Where it starts.
    """

    def __init__(self, spec: ParamSpec, rule: PlainRule, weight: Tensor) -> None:
        assert spec.subspace is not None
        self.spec, self.subspace, self.rule = spec, spec.subspace, rule
        self.tall = weight.shape[0] >= weight.shape[1]
        self.w = self._turned(weight)
        self.basis: Tensor | None = None
        self.last_norm = 0.0

    @property
    def weight(self) -> Tensor:
        return self.w if self.tall else self.w.T

    def observe(self, grad: Tensor, basis: Tensor, num_samples: int) -> None:
        """A gradient with sampled labels, seen by the basis that the state is in."""
        self.turn_to(basis)
        assert isinstance(self.rule, Sophia)
        self.rule.observe(self._turned(grad) @ basis.double(), num_samples)

    def turn_to(self, basis: Tensor, *, first: bool = False) -> None:
        """A new basis Q: moments move along if that is wanted (LDAdam, arXiv 2410.16103, section 3.2).

        At the first step a curvature always does: the basis that it was seen by was never used for anything else.
        """
        new, old = basis.double(), self.basis
        if old is not None and (self.subspace.transport or first) and not torch.equal(old, new):
            change = torch.linalg.lstsq(old, new).solution  # P^T Q for an orthonormal P
            for name in self.rule.first:
                setattr(self.rule, name, getattr(self.rule, name) @ change)
            if isinstance(self.rule, Adafactor):
                whole = self._moved(self.rule.r @ self.rule.c / self.rule.r.mean(), change)
                self.rule.r, self.rule.c = whole.mean(1, keepdim=True), whole.mean(0, keepdim=True)
            else:
                for name in self.rule.second:
                    setattr(self.rule, name, self._moved(getattr(self.rule, name), change))
        self.basis = new

    @staticmethod
    def _moved(moment: Tensor, change: Tensor) -> Tensor:
        """V (C * C) and, for the share of each new direction that was not seen, the mean over the old ones."""
        out = torch.zeros_like(moment)
        for j in range(change.shape[1]):
            unseen = max(0.0, 1 - float((change[:, j] ** 2).sum()))
            out[:, j] = moment @ change[:, j] ** 2 + moment.mean(1) * unseen
        return out

    def step(self, grad: Tensor, basis: Tensor, t: int) -> None:
        """One step in the subspace of `basis`."""
        self.turn_to(basis, first=t == 1)
        assert self.basis is not None
        g, p = self._turned(grad), self.basis
        r = g @ p
        n = self.rule.direction(r, t)
        if self.subspace.residual == "none":
            update = n @ p.T
        elif self.subspace.residual == "fira":
            update = n @ p.T + self._limited(self._scales(n, r) * (g - r @ p.T))
        else:
            update = self._limited(self._scales(n, r) * g)
        self.w = (1 - self.spec.learning_rate * self.spec.weight_decay) * self.w
        self.w = self.w - self.spec.learning_rate * self.subspace.scale * update

    def _scales(self, n: Tensor, r: Tensor) -> Tensor:
        """One factor a channel (arXiv 2410.01623, equation 7; 2412.05270, equation 5), or one for the matrix."""
        if self.subspace.residual == "tensor":
            return n.norm() / r.norm()
        return n.norm(dim=1, keepdim=True) / r.norm(dim=1, keepdim=True)

    def _limited(self, update: Tensor) -> Tensor:
        """arXiv 2410.01623, equation 9: the norm grows by the factor gamma at most."""
        norm, gamma = float(update.norm()), self.subspace.growth_limit
        if gamma and self.last_norm and norm > gamma * self.last_norm:
            update = update / norm * gamma * self.last_norm
        self.last_norm = float(update.norm())
        return update

    def _turned(self, matrix: Tensor) -> Tensor:
        return matrix.double() if self.tall else matrix.double().T
