"""The job behind a command line, checked in full before a process group exists or a file is written."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from cjepa_fast import config, distributed, ops
from cjepa_fast.cache import cached_folder
from cjepa_fast.config import Config, World
from cjepa_fast.config.cli import Command
from cjepa_fast.engine import cost, graphs
from cjepa_fast.engine.build import build_sampler
from cjepa_fast.engine.device import memory_gb, pick_device
from cjepa_fast.engine.schedules import Length, Schedules, count_steps, schedules
from cjepa_fast.errors import UserError
from cjepa_fast.evaluation.knn import Probe
from cjepa_fast.feed.decode import Place
from cjepa_fast.feed.demo import DEMO_VERSION, write_demo_dataset
from cjepa_fast.feed.index import open_sources, reopen_sources
from cjepa_fast.feed.mixture import Mixture
from cjepa_fast.masks import MultiBlockSampler
from cjepa_fast.methods import Method, build_method
from cjepa_fast.methods.parts import activation_dtype
from cjepa_fast.run import checkpoint
from cjepa_fast.run.records import CHECKPOINTS, INDEX, refuse_existing, require_sinks


@dataclass(frozen=True, kw_only=True)
class Job:
    """A valid configuration with its images, device and schedules.

    tokens: mean patches of a context and of a target block; None for a method without masks.
    roots: where the training images are, for people.
    probe: None if the images have no labels.
    resume: folder of the run to continue, or None.
    started: `time.perf_counter()` when the job was asked for.
    """

    config: Config
    world: World
    device: torch.device
    place: Place
    roots: str
    source: Mixture
    probe: Probe | None
    length: Length
    schedule: Schedules
    tokens: cost.Tokens | None
    resume: Path | None
    started: float

    def plan(self) -> cost.Plan:
        """Decide how a step saves memory, for the GPU with the least of it. Collective."""
        least = distributed.least(memory_gb(self.device), self.device)
        measured = self.device.type == "cuda"
        return cost.plan_memory(self.config, self.world, self.tokens, least, measure=measured)

    def report(self) -> str:
        """Return what `--check` prints: settings, images, cost."""
        c = self.config
        plan = cost.plan_memory(c, self.world, self.tokens, memory_gb(self.device), measure=True)
        report = cost.report(c, self.world, self.length, plan, self.tokens)
        return f"{config.to_yaml(c)}\ndata  {self.roots}: {self.source.description}\n{report}"


def prepare(command: Command, world: World) -> Job:
    """Check a command in full and open its images; raises UserError, one line, for whatever cannot run."""
    started = time.perf_counter()
    c, resume = command.config, command.resume
    config.validate_world(c, world.size)
    device = pick_device(c.runtime.device, world.local_rank)
    with torch.device("meta"):
        method = build_method(c)
    sampler = build_sampler(c) if method.masked else None
    _require_implementations(c, method, sampler, device)
    require_sinks(tensorboard=c.run.tensorboard, wandb_project=c.run.wandb)
    if resume is not None:
        checkpoint.require(resume / CHECKPOINTS)
    elif c.run.dir is not None:
        refuse_existing(c.run.dir)
    data = c.data
    if not data.root:
        demo = cached_folder(f"demo-{DEMO_VERSION}", write_demo_dataset)
        data = dataclasses.replace(data, root=(str(demo / "train"),), probe_root=str(demo / "test"))
    if resume is not None:
        source = reopen_sources(data.root, resume / INDEX)
    else:
        source = open_sources(data.root, mode=data.index, max_pixels=data.max_pixels)
    queries = None
    if data.probe_root is not None:
        queries = open_sources([data.probe_root], mode=data.index, max_pixels=data.max_pixels)
    if world.rank > 0:
        logging.disable(logging.INFO)  # only now, as any process may be the one that indexes
    length = count_steps(c.optim, source.visits)
    schedule = schedules(c.optim, length)
    tokens = sampler.expected_tokens(c.optim.batch_size // world.size) if sampler is not None else None
    place = Place(world.rank, world.size, str(device), c.runtime.data_threads)
    if source.labels is None and queries is not None:
        raise UserError(f"data.probe_root: given, but data.root has no labels to answer ({source.description})")
    probe = None
    if source.labels is not None:
        probe = Probe(
            source, queries, c.run, image_size=c.model.image_size, batch_size=max(2, c.optim.batch_size // world.size),
            place=place, on_error=c.data.on_error,
        )  # fmt: skip
    return Job(
        config=c, world=world, device=device, place=place, roots=" ".join(data.root), source=source, probe=probe,
        length=length, schedule=schedule, tokens=tokens, resume=resume,
        started=started,
    )  # fmt: skip


def _require_implementations(
    c: Config, method: Method, sampler: MultiBlockSampler | None, device: torch.device
) -> None:  # fmt: skip
    """Refuse implementations that cannot run here."""
    ops.require(c.runtime.kernels, device.type)
    if c.model.target_precision == "float8":
        ops.require_float8(device)
    if c.runtime.cuda_graph == "on":
        graphs.require(c.runtime.kernels, device)
    _require_attention(c, method, sampler, device)


def _require_attention(c: Config, method: Method, sampler: MultiBlockSampler | None, device: torch.device) -> None:
    """Refuse an implementation of attention that cannot run every form of a step."""
    shape, patches = config.encoder_shape(c.model.encoder), (c.model.image_size // c.model.patch_size) ** 2
    packed = sampler is not None and c.mask.mode == "packed"
    forms = [(shape.width, patches, packed or (sampler is not None and not method.needs_all_targets), False)]
    if sampler is not None:
        shared = c.model.predictor_context == "shared"
        blocks = c.mask.num_targets if shared else 1
        longest = max((kept or patches) + blocks * area for _, kept, area in sampler.shapes())
        forms.append((c.model.predictor_width, longest, packed, shared))
    compiled = c.runtime.compile not in (("off", "auto") if device.type == "cpu" else ("off",))
    for width, length, packs, structured in forms:
        ops.require_attention(
            c.runtime.attention, device.type, dtype=activation_dtype(c), head_dims=[width // shape.heads],
            length=length, packed=packs, structured=structured, compiled=compiled,
        )  # fmt: skip
