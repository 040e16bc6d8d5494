"""Averages between two lines of metrics, kept on the device and read once at the end of the interval."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from cjepa_fast.distributed import gather_rows, mean_over_ranks
from cjepa_fast.engine.step import Parts, StepOutput
from cjepa_fast.evaluation.health import cosine_gap, feature_std, rankme

FEATURE_ROWS = 2048  # images behind feature_std and RankMe: the last ones of the interval


class Meter:
    """Averages of an interval. `add` never waits for the device, `read` does; `restart` begins the next interval.

    Args:
        terms: names of the loss's terms, in the order of `StepOutput.terms`.
        batch_size: images per step over all processes.
    """

    def __init__(self, terms: Sequence[str], batch_size: int, device: torch.device) -> None:
        self._names, self._batch_size = ("loss", *(f"loss_{term}" for term in terms)), batch_size
        self._sums = torch.zeros(len(self._names), device=device)
        self.window = -(-FEATURE_ROWS // batch_size)  # last steps of an interval whose embeddings `read` needs whole
        self._features: deque[Tensor] = deque(maxlen=self.window)
        self.restart()

    def restart(self) -> None:
        """Begin a new interval now."""
        self._sums.zero_()
        self._features.clear()
        self._steps, self._waited_ms, self._since = 0, 0.0, time.perf_counter()

    def add(self, out: StepOutput, wait_ms: float) -> None:
        """Record one step of this process: its results, and its wait for data in milliseconds."""
        self._sums += torch.cat([out.loss[None], out.terms])
        if out.embeddings is not None:
            self._features.append(out.embeddings.float().mean(dim=1))
        self._steps += 1
        self._waited_ms += wait_ms

    def read(self, out: StepOutput, parts: Parts, *, flags: Sequence[bool]) -> tuple[dict[str, float], list[bool]]:
        """Return the interval's figures over all processes, and for each flag whether any process raised it.

        Collective. `out` and `parts` are results, with whole embeddings, and masks of the last step.
        """
        assert out.embeddings is not None
        gap = out.loss.new_zeros(())
        if out.predictions is not None:
            gap = cosine_gap(out.predictions, out.embeddings, torch.cat([masks.target for masks in parts if masks]))
        host = torch.tensor([self._waited_ms, *map(float, flags)], device=gap.device)
        means = mean_over_ranks(torch.cat([self._sums, gap[None], host])).tolist()
        sums, (mean_gap, waited_ms, *raised) = means[: len(self._names)], means[len(self._names) :]
        seconds = time.perf_counter() - self._since
        features = gather_rows(torch.cat(list(self._features)))
        figures = {name: total / self._steps for name, total in zip(self._names, sums, strict=True)}
        figures |= {"feature_std": float(feature_std(features)), "rankme": float(rankme(features))}
        if out.predictions is not None:
            figures["cosine_gap"] = mean_gap
        figures |= {
            "images_per_s": self._steps * self._batch_size / seconds,
            "data_wait_ms": waited_ms / self._steps,
        }
        return figures, [flag > 0 for flag in raised]
