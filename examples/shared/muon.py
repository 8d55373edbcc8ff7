"""Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon): momentum, made orthogonal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon, but for all matrices of one shape at once and with rates that are tensors.

    So a step is a few hundred calls instead of thousands, and can be recorded in a CUDA graph. Convolutions count as
    matrices, (outputs, all else).

    Args:
        params: dicts with "params", each of two axes or more, and "lr", a tensor on their device.
        decay: of the weights, relative to the rate.
        momentum: Nesterov's.
    """

    def __init__(self, params: Iterable[dict[str, Any]], decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"decay": decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step along the gradients that there are."""
        assert closure is None
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.flatten(1).shape, []).append(parameter)
            for (rows, columns), parameters in shapes.items():
                rate = group["lr"] * 0.2 * max(rows, columns) ** 0.5  # AdamW's size (Liu et al. 2025)
                updates = rate * orthogonal(torch.stack(self._momenta(parameters, group["momentum"]))).float()
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["decay"])
                torch._foreach_sub_(parameters, [u.reshape(p.shape) for u, p in zip(updates, parameters, strict=True)])

    def _momenta(self, parameters: list[nn.Parameter], momentum: float) -> list[Tensor]:
        """What the gradients have been so far, on average, with the last one ahead."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        kept = [self.state[parameter]["momentum"] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_lerp_(kept, gradients, 1 - momentum)
        return [each.flatten(1) for each in torch._foreach_lerp(gradients, kept, momentum)]


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices whose singular values are all about one, (N, rows, columns), in bfloat16."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
