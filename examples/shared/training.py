"""What every stage of training shares: a run bounded by minutes that can be stopped and taken up again."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from muon import Muon
from recorded import Function, Recorded
from torch import Tensor, nn

SAVED_EVERY, SHOWN_EVERY = 120.0, 20.0  # seconds
WARM_UP = 50  # steps
OTHERS = 0.4  # the rate of what is no matrix, relative to that of matrices
DECAY = 0.01  # of matrices


def device() -> torch.device:
    """CUDA where there is a device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def half() -> torch.autocast:
    """Convolutions and products in bfloat16, sums in float32: much faster on both, and good enough to train in."""
    return torch.autocast(device().type, torch.bfloat16, cache_enabled=False)  # what is cached cannot be recorded


def batch_of(count: int) -> int:
    """So many on a CPU, where steps are dear; more on a GPU, where the networks are too small to fill it."""
    return 4 * count if device().type == "cuda" else count


def timesteps(count: int) -> Tensor:
    """One from each part of a schedule of 1,000, so that every batch has noise of all levels."""
    parts = (torch.arange(count) + torch.rand(count)) / count
    return (parts[torch.randperm(count)] * 1000).long()


class Run:
    """Trains modules for some minutes, with a rate that rises, stays and falls, and keeps averaged weights (EMA).

    Matrices and convolutions are trained by Muon (Jordan 2024), all else by AdamW: on a CPU steps are few, and these go
    further (README.md has what was measured).

    The weights, the optimizers and the seconds spent are kept in `folder`/state.pt, the figures in `folder`/log.csv. A
    run that was stopped goes on where it was saved last; more minutes than before lift the rate again.

    Args:
        folder: made where it is not there.
        modules: by name; they are moved to `device()`.
        minutes: in all, with those of earlier calls.
        rate: the highest learning rate.
        scales: by module: its own rate, relative to `rate`; 1 where it is not named.
        until: the part of the time after which the rate falls, by half a cosine.
        average: how much of the averaged weights each step keeps.
        seed: of everything drawn from now on; a run that goes on at a step draws from seed + step.
    """

    def __init__(
        self,
        folder: Path,
        modules: Mapping[str, nn.Module],
        *,
        minutes: float,
        rate: float,
        scales: Mapping[str, float] | None = None,
        until: float = 0.4,
        average: float = 0.998,
        seed: int = 0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._limit = folder, 60 * minutes
        self._rate, self._until, self._average = rate, until, average
        self._modules = {name: module.to(device()).train() for name, module in modules.items()}
        self.parameters: list[nn.Parameter] = [p for module in self._modules.values() for p in module.parameters()]
        self._optimizers = self._two_optimizers(scales or {})
        self._averaged = [parameter.detach().clone() for parameter in self.parameters]
        self.step, self.seconds = 0, 0.0
        self._recent: dict[str, list[float]] = {}
        self._last: dict[str, Tensor] = {}
        self._recorded: Recorded | None = None
        if self._state.exists():
            self._restore()
        torch.manual_seed(seed + self.step)

    def _two_optimizers(self, scales: Mapping[str, float]) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        """Muon for what works like a matrix, AdamW for embeddings, norms and biases."""
        matrices, others = [], []
        for name, module in self._modules.items():
            tables = {id(each.weight) for each in module.modules() if isinstance(each, nn.Embedding)}
            chosen = [p for p in module.parameters() if p.ndim >= 2 and id(p) not in tables]
            rest = [p for p in module.parameters() if p.ndim < 2 or id(p) in tables]
            scale = scales.get(name, 1.0)
            matrices.append({"params": chosen, "scale": scale, "lr": _rate()})
            others.append({"params": rest, "scale": scale * OTHERS, "lr": _rate()})
        on_gpu = device().type == "cuda"
        adamw = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0, fused=True, capturable=on_gpu)
        return Muon(matrices, DECAY), adamw

    @property
    def _state(self) -> Path:
        return self._folder / "state.pt"

    @property
    def share(self) -> float:
        """The part of the minutes that is spent, 0 to 1."""
        return min(1.0, self.seconds / self._limit)

    def __iter__(self) -> Iterator[int]:
        """The steps until time is up; each has to call `learn`."""
        saved = shown = last = time.monotonic()
        while self.seconds < self._limit:
            yield self.step
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            if now - shown > SHOWN_EVERY:
                shown = now
                self._show()
            if now - saved > SAVED_EVERY:
                saved = now
                self._save()
        self._save()

    def learn(self, losses: Function, *inputs: Tensor) -> None:
        """One step.

        Args:
            losses: the same function at every step; what it makes of `inputs` on `device()` are numbers for the log by
                name, "loss" among them. On a GPU it is recorded, so it may not wait for the GPU (see `recorded`).
            inputs: of as few different shapes as may be.
        """
        self._note()
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"].fill_(self._rate * group["scale"] * self._height())
        moved = [each.to(device()) for each in inputs]
        if device().type == "cuda":
            self._recorded = self._recorded or Recorded(lambda *values: self._descend(losses, *values))
            self._last = self._recorded(*moved)
        else:
            self._last = self._descend(losses, *moved)
        self.step += 1
        kept = min(self._average, self.step / (self.step + 10))
        torch._foreach_lerp_(self._averaged, [parameter.detach() for parameter in self.parameters], 1 - kept)

    def _descend(self, losses: Function, *inputs: Tensor) -> dict[str, Tensor]:
        for parameter in self.parameters:
            parameter.grad = None
        figures = losses(*inputs)
        figures["loss"].backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        return {name: value.detach() for name, value in figures.items()}

    def _note(self) -> None:
        """Wait for the last step, and keep its figures for the log."""
        for name, value in self._last.items():
            self._recent.setdefault(name, []).append(float(value))
        self._last = {}

    def _height(self) -> float:
        """The learning rate, relative to the highest."""
        fall = max(0.0, (self.share - self._until) / (1 - self._until))
        return min(1.0, (self.step + 1) / WARM_UP) * (0.02 + 0.49 * (1 + math.cos(math.pi * fall)))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The modules have their averaged weights meanwhile, and are in evaluation mode."""
        own = [parameter.detach().clone() for parameter in self.parameters]
        self._put(self._averaged)
        for module in self._modules.values():
            module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._put(own)
            for module in self._modules.values():
                module.train()

    def _put(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)

    def _show(self) -> None:
        self._note()
        means = {name: sum(values) / len(values) for name, values in self._recent.items()}
        self._recent.clear()
        row: dict[str, Any] = {"seconds": round(self.seconds), "step": self.step}
        row |= {name: f"{value:.4g}" for name, value in means.items()}
        print(
            f"{self._folder.name}, {self.share:.0%}:", *(f"{name} {value}" for name, value in row.items()), flush=True
        )
        path = self._folder / "log.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)

    def _save(self) -> None:
        state = {
            "modules": {name: module.state_dict() for name, module in self._modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "averaged": self._averaged,
            "step": self.step,
            "seconds": self.seconds,
        }
        new = self._state.with_suffix(".new")
        torch.save(state, new)
        new.replace(self._state)

    def _restore(self) -> None:
        state = torch.load(self._state, map_location=device(), weights_only=True)
        for name, module in self._modules.items():
            module.load_state_dict(state["modules"][name])
        for optimizer, kept in zip(self._optimizers, state["optimizers"], strict=True):
            settings = optimizer.state_dict()["param_groups"]  # this device's, whatever the run began on
            optimizer.load_state_dict({**kept, "param_groups": settings})
        self._averaged = state["averaged"]
        self.step, self.seconds = state["step"], state["seconds"]


def _rate() -> Tensor:
    """A learning rate, to be set: a tensor can change between the launches of a recorded step."""
    return torch.zeros((), device=device())
