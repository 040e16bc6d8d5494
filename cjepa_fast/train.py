"""The main job, read from top to bottom:  torchrun -m cjepa_fast.train [--preset NAME] [--data.root PATH ...] ...

Without arguments it trains the demo. `--check` checks settings and images, prints the cost of the run and exits;
`--help` lists every setting. Bad input ends with one line and exit code 2, a loss that is not finite with 3.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist

from cjepa_fast import distributed
from cjepa_fast.config import World, cli, read_world
from cjepa_fast.engine.build import build_learner
from cjepa_fast.engine.device import keep_freed_memory
from cjepa_fast.errors import UserError
from cjepa_fast.feed.batches import Batches
from cjepa_fast.feed.order import Order
from cjepa_fast.feed.views import Views
from cjepa_fast.run.job import prepare
from cjepa_fast.run.meter import Meter
from cjepa_fast.run.session import Session, quiet_garbage_collector


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job with command-line arguments `argv`; return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    world = None
    try:
        world = read_world(os.environ)
        code = train(cli.load(sys.argv[1:] if argv is None else argv), world)
    except UserError as error:
        # One line, not one per process. The group is left to the end of the process, which aborts it: NCCL would
        # first wait for the other ranks, who wait for this one.
        if world is None or world.rank == 0 or dist.is_initialized():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def train(command: cli.Command, world: World) -> int:
    """Train, or check, what `command` asks for as process `world`; return the exit code."""
    # What to do: all of it is checked before a process group exists or a file is written.
    c = command.config
    job = prepare(command, world)
    if command.check:
        if world.rank == 0:
            print(job.report())
        return 0

    # What learns.
    if c.runtime.cpu_threads is not None:
        torch.set_num_threads(c.runtime.cpu_threads)
    if job.device.type == "cpu":
        keep_freed_memory()
    distributed.connect(world.rank, world.size, job.device)
    plan = job.plan()
    learner = build_learner(c, world, job.device, plan)
    method = learner.method

    # Where it is recorded, and where it begins.
    session = Session(job, learner, plan)
    views = Views(c.model.image_size, method.views, method.independent_views)
    order = Order(c.seed, c.optim.batch_size, session.first_step, job.length.total)
    batches = Batches(job.source, c.data, views, order, job.place, session.bad)
    meter = Meter((*method.local_terms, *method.batch_terms), c.optim.batch_size, job.device)

    # The loop. Nothing in it waits for the device, except at the end of an interval.
    with quiet_garbage_collector():
        for step, batch in enumerate(batches, start=session.first_step):
            whole = session.wants_whole(step, meter.window)
            parts = learner.masks(step, batch.ids, whole=whole)
            out = learner.step(batch.images, parts, job.schedule.apply(learner.optimizer, step))
            meter.add(out, batch.wait_ms)
            if session.ends_interval(step + 1):
                learner.tidy()
                figures, flags = meter.read(out, parts, flags=session.flags())
                if not session.record(step + 1, figures, flags):
                    break
                meter.restart()
        batches.close()

    # What came of it.
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
