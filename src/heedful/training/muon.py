"""Muon with the matrices of one shape orthogonalised together.

Muon (Jordan et al., 2024) replaces the momentum of a weight matrix by its
nearest (semi-)orthogonal matrix, found with five Newton-Schulz iterations. ``torch.optim.Muon`` walks over the matrices one
by one; a model of this size has 70 small ones, and the launches then take a quarter of a training step. Stacked by shape
the same arithmetic is a few batched products.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the orthogonal factor. ``matrices``: ``(n, rows, columns)``; returns bf16 likewise."""
    a, b, c = _COEFFICIENTS
    x = matrices.to(torch.bfloat16)
    wide = x.size(-2) <= x.size(-1)
    if not wide:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon for 2-D parameters. Embeddings, norms and biases belong to AdamW.

    Args:
        params: matrices. lr: step for a square matrix; a ``rows x columns`` one takes ``lr * max(1, rows / columns) ** 0.5``.
        momentum: of the Nesterov momentum. weight_decay: decoupled, times ``lr``.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(
                        f"Muon takes matrices, not a parameter of shape {tuple(parameter.shape)}: give it to AdamW"
                    )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                gradients: list[Any] = [parameter.grad for parameter in parameters]
                momenta = [self._momentum(parameter) for parameter in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
                updates = orthogonalise(torch.stack(nesterov)).float().unbind()
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, updates, alpha=-group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]
