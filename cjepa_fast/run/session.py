"""A run on its way: its records, its checkpoints, where it begins and how it ends."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cjepa_fast import config, distributed
from cjepa_fast.engine.build import Learner
from cjepa_fast.engine.cost import Plan, layout
from cjepa_fast.engine.device import device_name, peak_tflop_s
from cjepa_fast.errors import UserError
from cjepa_fast.feed.bad import BadImages
from cjepa_fast.feed.index import save_sources
from cjepa_fast.run import checkpoint
from cjepa_fast.run.guard import Guard
from cjepa_fast.run.job import Job
from cjepa_fast.run.records import CHECKPOINTS, INDEX, RunDirectory
from cjepa_fast.run.signals import InterruptFlag


class Session:
    """The records and checkpoints of one process's share of a run.

    Construction resumes from the newest checkpoint, or probes the untrained encoder. It is collective.

    Raises UserError if the checkpoint does not fit, the images changed, or the run is complete.
    """

    def __init__(self, job: Job, learner: Learner, plan: Plan) -> None:
        c = job.config
        self._job, self._learner = job, learner
        self._directory = _run_directory(job)
        self._checkpoints = self._directory / CHECKPOINTS
        self.bad, self._skipped = BadImages(job.source, c.data.on_error), frozenset[int]()
        self.first_step, self.status, self._accuracy, self._untrained = 0, "completed", None, None
        regularised = "std" in learner.method.batch_terms
        self._guard, self._total = Guard(regularised), job.length.total
        self._peak = peak_tflop_s(job.device)
        self._gflop = sum(plan.cost.gflop.values()) if plan.cost is not None else None
        every = [c.run.log_every, c.run.checkpoint_every]
        self._every = [*every, c.run.probe_every] if job.probe and c.run.probe_every else every
        if job.world.rank == 0:
            self._describe(plan)
        if job.resume is not None:
            self._resume()
        elif job.probe is not None:
            self._untrained = job.probe.accuracy(learner.method.judged)
        self._records = self._open_records() if job.world.rank == 0 else None
        self._stop = InterruptFlag()

    def ends_interval(self, done: int) -> bool:
        """Return whether a line of metrics follows step number `done`, counted from 1."""
        return done == self._total or any(done % interval == 0 for interval in self._every)

    def wants_whole(self, step: int, window: int) -> bool:
        """Return whether `step` is among the last `window` of an interval: health figures need every target token."""
        return any(self.ends_interval(step + ahead) for ahead in range(1, window + 1))

    def flags(self) -> tuple[bool, bool]:
        """Return this process's flags for `Meter.read`: a request to stop, and images that turned bad."""
        return self._stop.is_set, self.bad.ids != self._skipped

    def record(self, done: int, figures: dict[str, float], flags: Sequence[bool]) -> bool:
        """Log an interval's figures, probe and save if due; return whether the run goes on. Collective."""
        c, job = self._job.config, self._job
        stop, new_bad = flags
        if new_bad:
            self._skipped = distributed.union_over_ranks(self.bad.ids)
            self.bad.add(self._skipped)
        self._done = done
        if not self._guard.finite(figures):
            self.status = "failed"
            return False
        last = done == self._total
        schedule = job.schedule
        values: dict[str, Any] = {
            "step": done, "epoch": done / job.length.per_epoch, "lr": schedule.lr[done - 1],
            "weight_decay": schedule.weight_decay[done - 1], "ema": schedule.ema[done - 1], **figures,
            "skipped_images": len(self._skipped),
        }  # fmt: skip
        probe_due = last or (c.run.probe_every > 0 and done % c.run.probe_every == 0)
        if job.probe is not None and probe_due:
            self._accuracy = values["knn_top1"] = job.probe.accuracy(self._learner.method.judged)
        warning = self._guard.warning(done, figures)
        if self._records is not None:
            self._records.log(values, mfu=self._share_of_peak(figures["images_per_s"]))
            if warning is not None:
                self._records.say(warning)
        if stop and not last:
            self.status = "preempted"
        # A checkpoint ends an interval, so that a resumed run writes the same lines.
        if stop or last or done % c.run.checkpoint_every == 0:
            self._save(done)
        return not stop and not last

    def finish(self) -> int:
        """Write how the run ended; return the exit code: 0, or 3 if the loss is not finite."""
        if self._records is not None:
            self._write_state(self.status)
            if self.status == "failed":
                self._records.say(f"error: the loss is not finite at step {self._done}; lower optim.lr in a new run")
            elif self.status == "preempted":
                where = f"--resume {self._directory}"
                self._records.say(f"stopped on request after step {self._done}; continue with {where}")
            elif self._job.probe is not None:
                judged = "target encoder" if self._learner.method.averages() else "encoder"
                self._records.say(
                    f"20-NN top-1: {judged} {self._accuracy:.1%}, untrained encoder {self._untrained:.1%}, "
                    f"chance {self._job.probe.chance:.1%}"
                )
            self._records.say(f"run directory: {self._directory} ({time.perf_counter() - self._job.started:.0f} s)")
            self._records.close()
        return 3 if self.status == "failed" else 0

    def _describe(self, plan: Plan) -> None:
        c, job, length = self._job.config, self._job, self._job.length
        left = job.source.visits - length.per_epoch * c.optim.batch_size
        rest = f" ({left:,} of its {job.source.visits:,} images left over, others each time)" if left else ""
        print(f"data: {job.roots}: {job.source.description}")
        print(f"{length.per_epoch} steps an epoch{rest}, {length.total} steps in all")
        where = f"{job.world.size} process(es) on {device_name(job.device)}"
        print(f"{where}, {c.model.precision}, {self._learner.compiled}")
        print(f"{layout(c, job.world)}; {plan.reason}")
        figures = "feature_std, rankme and cosine_gap" if self._learner.method.masked else "feature_std and rankme"
        without = f"no labels, so no 20-NN probe: health shows in {figures}"
        print(without if job.probe is None else job.probe.description, flush=True)

    def _resume(self) -> None:
        job, learner = self._job, self._learner
        checkpoint.init_state(learner.optimizer)
        state = checkpoint.training_state(learner.method, learner.optimizer)
        self.first_step, extra = checkpoint.load(self._checkpoints, state)
        learner.optimizer.refresh_copies()
        self._untrained, self._guard.initial_std = extra["untrained"], extra["initial_std"]
        if extra["data"] != job.source.fingerprint:
            raise UserError(f"data.root: {job.roots}: the run began with other weights or images; restore them")
        self.bad.add(extra["skipped"])
        self._skipped = self.bad.ids
        if self.first_step == self._total:
            raise UserError(f"--resume {job.resume}: the run is complete, all of its {self._total} steps are done")

    def _open_records(self) -> RunDirectory:
        c, fresh = self._job.config, self._job.resume is None
        records = RunDirectory(
            self._directory, config_yaml=config.to_yaml(c) if fresh else None, resume_step=self.first_step,
            total_steps=self._total, tensorboard=c.run.tensorboard, wandb_project=c.run.wandb,
        )  # fmt: skip
        if fresh:
            save_sources(self._job.source, self._directory / INDEX)
        self._records, self._done = records, self.first_step
        self._write_state("running")
        records.say(f"run directory: {self._directory}")
        if self._untrained is not None:
            records.say(f"20-NN top-1 of the untrained encoder: {self._untrained:.1%}")
        return records

    def _save(self, done: int) -> None:
        state = checkpoint.training_state(self._learner.method, self._learner.optimizer)
        extra = {
            "untrained": self._untrained, "initial_std": self._guard.initial_std, "data": self._job.source.fingerprint,
            "skipped": sorted(self._skipped),
        }  # fmt: skip
        checkpoint.save(self._checkpoints, done, state, keep=self._job.config.run.keep_checkpoints, extra=extra)
        if self._records is not None:
            self._write_state("running")

    def _write_state(self, status: str) -> None:
        assert self._records is not None
        figures = {"untrained": self._untrained} | (
            {"knn_top1": self._accuracy} if self._done > self.first_step else {}
        )
        self._records.state(status, self._done, **figures, skipped_images=len(self._skipped))

    def _share_of_peak(self, images_per_s: float) -> float | None:
        if self._peak is None or self._gflop is None:
            return None
        return images_per_s * self._gflop / 1e3 / (self._peak * self._job.world.size)


def _run_directory(job: Job) -> Path:
    """Return the folder of the run: given, resumed, or runs/ENCODER-TIME by rank 0's clock."""
    c = job.config
    if job.resume is not None or c.run.dir is not None:
        return job.resume or c.run.dir or Path()
    stamp = torch.tensor(int(time.time()), device=job.device)
    if dist.is_initialized():
        dist.broadcast(stamp, 0)
    return Path("runs") / time.strftime(f"{c.model.encoder}-%Y%m%d-%H%M%S", time.localtime(int(stamp)))


class quiet_garbage_collector:
    """Context without automatic garbage collection, which would stall the host in some step."""

    def __enter__(self) -> None:
        gc.collect()
        gc.freeze()
        gc.disable()

    def __exit__(self, *error: object) -> None:
        gc.enable()
        gc.unfreeze()
