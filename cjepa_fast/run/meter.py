"""What happens between two lines of metrics, kept on the device and read once at the end of the interval."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from cjepa_fast.distributed import gather_rows, mean_over_ranks
from cjepa_fast.engine.step import StepOutput, Terms
from cjepa_fast.evaluation.health import cosine_gap, feature_std, rankme
from cjepa_fast.masks import Masks

FEATURE_ROWS = 2048  # images behind feature_std and RankMe: the last ones of the interval


class Meter:
    """Averages of an interval. `add` never waits for the device, `read` does; `restart` begins the next interval."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self._batch_size = batch_size  # of all ranks
        self._sums = torch.zeros(len(Terms._fields), device=device)
        self.window = -(-FEATURE_ROWS // batch_size)  # steps before a `read` whose outputs it wants whole
        self._features: deque[Tensor] = deque(maxlen=self.window)
        self.restart()

    def restart(self) -> None:
        """Starts a new interval now."""
        self._sums.zero_()
        self._features.clear()
        self._steps, self._waited_ms, self._since = 0, 0.0, time.perf_counter()

    def add(self, out: StepOutput, wait_ms: float) -> None:
        """Records one step of this rank: its results, and how long it waited for data."""
        self._sums += torch.stack(out.terms)
        if out.targets is not None:
            self._features.append(out.targets.float().mean(dim=1))
        self._steps += 1
        self._waited_ms += wait_ms

    def read(
        self, out: StepOutput, masks: Sequence[Masks], *, flags: Sequence[bool]
    ) -> tuple[dict[str, float], list[bool]]:  # fmt: skip
        """The interval's figures over all ranks, and for each of `flags` whether any rank has raised it. Collective.

        out, masks: results, all targets among them, and masks of the last step, for the cosine gap.
        """
        assert out.targets is not None
        local_gap = cosine_gap(out.predictions, out.targets, torch.cat([mask.target for mask in masks]))
        host = torch.tensor([self._waited_ms, *map(float, flags)], device=local_gap.device)
        means = mean_over_ranks(torch.cat([self._sums, local_gap[None], host])).tolist()
        *sums, gap, waited_ms = means[: len(means) - len(flags)]
        seconds = time.perf_counter() - self._since
        features = gather_rows(torch.cat(list(self._features)))
        loss, prediction, sim, std, cov = (total / self._steps for total in sums)
        return {
            "loss": loss,
            "loss_prediction": prediction,
            "loss_sim": sim,
            "loss_std": std,
            "loss_cov": cov,
            "feature_std": float(feature_std(features)),
            "rankme": float(rankme(features)),
            "cosine_gap": gap,
            "images_per_s": self._steps * self._batch_size / seconds,
            "data_wait_ms": waited_ms / self._steps,
        }, [mean > 0 for mean in means[len(means) - len(flags) :]]
