"""The main job, read from top to bottom:  torchrun -m cjepa_fast.train [--preset NAME] [--data.root PATH ...] ...

Without arguments it trains the demo. `--check` validates everything, prints what the run would cost and leaves;
`--help` lists every setting. Bad input ends with one line and exit code 2.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import logging
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from cjepa_fast import distributed, ops
from cjepa_fast.cache import cached_folder
from cjepa_fast.config import cli
from cjepa_fast.config import schema as config
from cjepa_fast.engine import cost, graphs, optim
from cjepa_fast.engine.step import LossWeights, Networks, train_step
from cjepa_fast.errors import UserError
from cjepa_fast.evaluation.knn import Probe
from cjepa_fast.feed import batches as data
from cjepa_fast.feed import index
from cjepa_fast.feed.demo import DEMO_VERSION, write_demo_dataset
from cjepa_fast.feed.views import Photometric
from cjepa_fast.losses.second_moment import Projector
from cjepa_fast.masks import MODES, Masks, MultiBlockSampler
from cjepa_fast.networks import vit
from cjepa_fast.run import checkpoint
from cjepa_fast.run.meter import Meter
from cjepa_fast.run.records import CHECKPOINTS, INDEX, RunDirectory, refuse_existing, require_sinks

COLLAPSED = 0.1  # a feature_std under this share of the untrained encoder's is called a collapse


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job with command-line arguments `argv`; returns the exit code (0, 2 for bad input, 3 for divergence)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with cleaning_up():
            world = config.read_world(os.environ)
            return train(cli.load(sys.argv[1:] if argv is None else argv), world)
    except UserError as error:
        if "world" not in locals() or world.rank == 0 or dist.is_initialized():  # one line, not one per process
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


@contextlib.contextmanager
def cleaning_up() -> Iterator[None]:
    """Undoes what `train` within does to its process: garbage collection held back, a process group.

    After an error the group is left to the end of the process, which aborts it: NCCL's would first wait for the other
    ranks, who wait for this one, and the error would not be told meanwhile.
    """
    try:
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
    finally:
        gc.enable()
        gc.unfreeze()


def train(command: cli.Command, world: config.World) -> int:
    """Trains, or checks, what `command` asks for as process `world`; returns the exit code."""
    c, resume = command.config, command.resume
    started = time.perf_counter()

    # What there is to train on. All of this is validated before a process group exists or a file is written.
    config.validate_world(c, world.size)
    device = pick_device(c.runtime.device, world.local_rank)
    ops.require(c.runtime.kernels, device.type)
    sampler = build_sampler(c)
    if c.model.target_precision == "float8":
        ops.require_float8(device)
    if c.runtime.cuda_graph == "on":
        graphs.require(c.runtime.kernels, device)
    shape, patches = config.encoder_shape(c.model.encoder), (c.model.image_size // c.model.patch_size) ** 2
    ops.require_attention(
        c.runtime.attention, device.type, dtype=activation_dtype(c), length=patches,
        head_dims=(shape.width // shape.heads, c.model.predictor_width // (c.model.predictor_heads or shape.heads)),
    )  # fmt: skip
    require_sinks(tensorboard=c.run.tensorboard, wandb_project=c.run.wandb)
    if resume is not None:
        checkpoint.require(resume / CHECKPOINTS)
    elif c.run.dir is not None:
        refuse_existing(c.run.dir)
    root, probe_root = c.data.root, c.data.probe_root
    if not root:
        demo = cached_folder(f"demo-{DEMO_VERSION}", write_demo_dataset)
        root, probe_root = (str(demo / "train"),), str(demo / "test")
    if resume is not None:
        source = index.reopen_sources(root, resume / INDEX)
    else:
        source = index.open_sources(root, mode=c.data.index, max_pixels=c.data.max_pixels)
    queries = None
    if probe_root is not None:
        queries = index.open_sources([probe_root], mode=c.data.index, max_pixels=c.data.max_pixels)
    if world.rank > 0:
        logging.disable(logging.INFO)  # not before: whichever process indexes tells of it
    length = config.count_steps(c, source.visits)
    steps, steps_per_epoch = length.total, length.per_epoch
    schedule = optim.schedules(
        steps, length.warmup, lr=c.optim.lr, start_lr=c.optim.start_lr,
        final_lr=c.optim.final_lr, weight_decay=c.optim.weight_decay, final_weight_decay=c.optim.final_weight_decay,
        weight_decay_schedule=c.optim.weight_decay_schedule, ema=c.optim.ema, final_ema=c.optim.final_ema,
        schedule_scale=c.optim.schedule_scale,
    )  # fmt: skip
    probe = None
    if source.labels is not None:
        probe = Probe(
            source, queries, bank_size=c.run.probe_bank, query_size=c.run.probe_queries, device=device, rank=world.rank,
            image_size=c.model.image_size, batch_size=max(2, c.optim.batch_size // world.size),
            threads=c.runtime.data_threads, on_error=c.data.on_error,
        )  # fmt: skip
    elif queries is not None:
        raise UserError(f"data.probe_root: given, but data.root has no labels to answer ({source.description})")
    tokens = sampler.expected_tokens(c.optim.batch_size // world.size)
    memory = memory_gb(c, device)
    if command.check:
        if world.rank > 0:
            return 0
        print(config.to_yaml(c) + f"\ndata  {' '.join(root)}: {source.description}")
        print(cost.report(c, source.visits, world, *tokens, memory))
        return 0

    # The networks. Every process draws the same initial weights; sharding then keeps its part.
    if c.runtime.cpu_threads is not None:
        torch.set_num_threads(c.runtime.cpu_threads)
    if device.type == "cpu" and c.runtime.keep_memory:
        keep_freed_memory()
    distributed.connect(world.rank, world.size, device)
    torch.manual_seed(c.seed)
    networks = build_networks(c).to(device)
    saving = cost.save_memory(c, world, distributed.least(memory, device), *tokens)
    if saving.checkpoint:  # what compiles and shards comes after: both then see the recomputation
        for block in (*networks.encoder.blocks, *networks.predictor.predictor_blocks):
            distributed.checkpoint_activations(block)
    compiled = compile_blocks(networks, c.runtime.compile, device, c.mask.mode)
    mesh = distributed.mesh(device.type, config.shard_size(c, world))
    shard_networks(networks, mesh, unit=c.runtime.fsdp_blocks, reshard=saving.reshard)
    optimizer, weights = build_optimizer(c, networks, sharded=world.size > 1), loss_weights(c)

    take_step = functools.partial(train_step, networks, optimizer, weights)
    if c.runtime.cuda_graph == "on":
        take_step = graphs.GraphedStep(take_step, optimizer, graphs.Recorder(device))

    # The run directory, and the state to continue from.
    directory = run_directory(c, resume, device)
    if world.rank == 0:
        left = source.visits - steps_per_epoch * c.optim.batch_size
        rest = f" ({left:,} of its {source.visits:,} images left over, others each time)" if left else ""
        print(f"data: {' '.join(root)}: {source.description}")
        print(f"{steps_per_epoch} steps an epoch{rest}, {steps} steps in all")
        print(f"{world.size} process(es) on {device_name(device)}, {c.model.precision}, {compiled}")
        print(f"{cost.layout(c, world)}; {saving.reason}")
        if probe is None:
            print("no labels, so no 20-NN probe: health shows in feature_std, rankme and cosine_gap", flush=True)
        else:
            print(probe.description, flush=True)
    first_step, untrained, initial_std = 0, None, None
    bad = data.BadImages(source, c.data.on_error)
    state = checkpoint.training_state(networks, optimizer)
    if resume is not None:
        first_step, extra = checkpoint.load(directory / CHECKPOINTS, state)
        optimizer.refresh_copies()
        untrained, initial_std, skipped = extra["untrained"], extra["initial_std"], extra["skipped"]
        if extra["data"] != source.fingerprint:
            raise UserError(f"data.root: {' '.join(root)}: the run began with other weights or images; restore them")
        bad.add(skipped)
        if first_step == steps:
            raise UserError(f"--resume {resume}: the run is complete, all of its {steps} steps are done")
    elif probe is not None:
        untrained = probe.accuracy(networks.target_encoder)
    records = None
    if world.rank == 0:
        records = RunDirectory(
            directory, config_yaml=None if resume is not None else config.to_yaml(c), resume_step=first_step,
            total_steps=steps, tensorboard=c.run.tensorboard, wandb_project=c.run.wandb,
        )  # fmt: skip
        if resume is None:
            index.save_sources(source, directory / INDEX)
        records.state("running", first_step, untrained=untrained, skipped_images=len(bad.ids))
        records.say(f"run directory: {directory}")
        if untrained is not None:
            records.say(f"20-NN top-1 of the untrained encoder: {untrained:.1%}")
    photometric = Photometric(
        color_jitter=c.data.color_jitter, color_jitter_p=c.data.color_jitter_p, grayscale_p=c.data.grayscale_p,
        blur_p=c.data.blur_p, blur_sigma=c.data.blur_sigma, solarize_p=c.data.solarize_p,
    )  # fmt: skip
    batches = data.Batches(
        source, batch_size=c.optim.batch_size, rank=world.rank, world_size=world.size, image_size=c.model.image_size,
        seed=c.seed, first_step=first_step, last_step=steps, crop_scale=c.data.crop_scale, crop_ratio=c.data.crop_ratio,
        hflip=c.data.hflip, photometric=photometric, views=c.data.views, device=str(device),
        threads=c.runtime.data_threads, prefetch=c.runtime.prefetch, hw_decoder_load=c.runtime.hw_decoder_load, bad=bad,
    )  # fmt: skip

    every = [c.run.log_every, c.run.checkpoint_every, *([c.run.probe_every] if probe and c.run.probe_every else [])]

    def ends_interval(done: int) -> bool:
        return done == steps or any(done % interval == 0 for interval in every)

    # The loop. Nothing in it waits for the device except at the log interval.
    interrupted, meter = InterruptFlag(), Meter(c.optim.batch_size, device)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection would stall the host in some step: it is left to the log points
    accuracy, status, done, skipped = None, "completed", first_step, bad.ids
    unions = needs_unions(c)
    for step, batch in enumerate(batches, start=first_step):
        # the last steps of an interval show the health figures every row of the target encoder
        whole = any(ends_interval(step + ahead) for ahead in range(1, meter.window + 1))
        masks = sampler.sample_parts(step, batch.ids, c.runtime.accumulate, union=unions and not whole)
        masks = [place_masks(part, c.runtime.compile, device) for part in masks]
        out = take_step(batch.images, masks, schedule.apply(optimizer, step))
        meter.add(out, batch.wait_ms)

        done = step + 1
        last = done == steps
        if not ends_interval(done):
            continue
        probe_now = probe is not None and (last or (c.run.probe_every > 0 and done % c.run.probe_every == 0))
        save_now = last or done % c.run.checkpoint_every == 0
        gc.collect(1)
        distributed.forget_forwards(networks.target_encoder)
        # a checkpoint ends an interval, so that a resumed run writes the same lines
        sampler.verify()
        figures, (stop, new_bad) = meter.read(out, masks, flags=(interrupted.is_set, bad.ids != skipped))
        if new_bad:
            bad.add(skipped := distributed.union_over_ranks(bad.ids))
        values: dict[str, Any] = {
            "step": done, "epoch": done / steps_per_epoch, "lr": schedule.lr[step],
            "weight_decay": schedule.weight_decay[step], "ema": schedule.ema[step], **figures,
            "skipped_images": len(skipped),
        }  # fmt: skip
        if not math.isfinite(figures["loss"]):
            status = "failed"
            break
        if probe is not None and probe_now:
            accuracy = values["knn_top1"] = probe.accuracy(networks.target_encoder)
        initial_std = initial_std or figures["feature_std"]
        if records is not None:
            records.log(values)
            if figures["feature_std"] < COLLAPSED * initial_std:
                records.say(
                    f"warning: step {done}: feature_std fell from {initial_std:.3f} to {figures['feature_std']:.3f}: "
                    "the embeddings collapse; lower optim.lr or raise loss.vicreg_weight"
                )
        if stop and not last:
            status = "preempted"
        if save_now or stop:
            checkpoint.save(
                directory / CHECKPOINTS, done, state, keep=c.run.keep_checkpoints,
                extra={
                    "untrained": untrained, "initial_std": initial_std, "data": source.fingerprint,
                    "skipped": sorted(skipped),
                },
            )  # fmt: skip
            if records is not None:
                records.state("running", done, untrained=untrained, knn_top1=accuracy, skipped_images=len(skipped))
        if status == "preempted":
            break
        meter.restart()
    batches.close()

    # What came of it.
    if records is not None:
        records.state(status, done, untrained=untrained, knn_top1=accuracy, skipped_images=len(skipped))
        if status == "failed":
            records.say(f"error: the loss is not finite at step {done}; lower optim.lr in a new run")
        elif status == "preempted":
            records.say(f"stopped on request after step {done}; continue with --resume {directory}")
        elif probe is not None:
            trained = f"target encoder {accuracy:.1%}, untrained encoder {untrained:.1%}, chance {probe.chance:.1%}"
            records.say(f"20-NN top-1: {trained}")
        records.say(f"run directory: {directory} ({time.perf_counter() - started:.0f} s)")
        records.close()
    return 3 if status == "failed" else 0


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this process: "cuda" must exist, "auto" takes it if it does."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device: cuda asked for, but torch sees no GPU; use auto, or a CUDA build of torch")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UserError(f"--nproc-per-node: process {local_rank + 1} has no GPU, torch sees {found}; start {found}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def memory_gb(c: config.Config, device: torch.device) -> float | None:
    """What a GPU offers in 10^9 bytes, as the configuration or the GPU has it; None on a CPU."""
    if c.runtime.memory_gb is not None or device.type == "cpu":
        return c.runtime.memory_gb
    return torch.cuda.get_device_properties(device).total_memory / 1e9


def device_name(device: torch.device) -> str:
    """For people: the GPU's name, or the number of CPU threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def activation_dtype(c: config.Config) -> torch.dtype:
    """The type of activations and matrix products."""
    return torch.bfloat16 if c.model.precision == "bf16" else torch.float32


def build_networks(c: config.Config) -> Networks:
    """The four networks of a configuration, on the CPU, drawn from torch's global generator."""
    dtype = activation_dtype(c)
    encoder, target_encoder = (
        vit.build_encoder(
            c.model.encoder, c.model.image_size, c.model.patch_size, mean=c.data.mean, std=c.data.std,
            depth_rescale=c.model.depth_rescale_init, dtype=dtype, kernels=c.runtime.kernels,
            attention=c.runtime.attention,
        )
        for _ in range(2)
    )  # fmt: skip
    if c.model.target_precision == "float8":
        target_encoder.use_float8(c.runtime.kernels)
    predictor = vit.build_predictor(
        c.model.encoder, c.model.image_size, c.model.patch_size, c.model.predictor_depth, c.model.predictor_width,
        c.model.predictor_heads, depth_rescale=c.model.depth_rescale_init,
        shared_context=c.model.predictor_context == "shared", targets_only=c.runtime.predictor_targets_only,
        shared_start=c.runtime.predictor_shared_start, kernels=c.runtime.kernels, attention=c.runtime.attention,
    )  # fmt: skip
    projector = None
    if c.loss.vicreg_weight:
        projector = Projector(encoder.width, c.loss.projector_width or encoder.width, c.loss.projector_layers)
    return Networks(encoder, predictor, target_encoder, projector)


def build_sampler(c: config.Config) -> MultiBlockSampler:
    """Build the mask sampler of a configuration. Raises UserError, with the key, for masks that do not fit the grid."""
    try:
        return MultiBlockSampler(
            c.model.image_size // c.model.patch_size, **vars(c.mask), seed=c.seed, impl=c.runtime.masks
        )
    except UserError as error:  # begins with the sampler's argument, which is a key of `mask` unless listed here
        name, _, rest = str(error).partition(":")
        key = {"impl": "runtime.masks", "grid": "model.image_size", "seed": "seed"}.get(name, f"mask.{name}")
        raise UserError(f"{key}:{rest}") from None


def place_masks(masks: Masks, compiled: str, device: torch.device) -> Masks:
    """Return the masks on `device`; `compiled` is `runtime.compile`."""
    return masks.placed(device, keep_shapes=compiled == "static")


def needs_unions(c: config.Config) -> bool:
    """Whether the target encoder is to compute target rows alone, so that the masks must list them."""
    # views that hold the mean of all target rows can spare none
    return c.runtime.target_union_only and (not c.loss.vicreg_weight or c.loss.vicreg_views == "target_blocks")


def build_optimizer(c: config.Config, networks: Networks, *, sharded: bool) -> optim.AdamW:
    """AdamW with the target encoder's EMA, for networks that lie where they are trained.

    On one process it keeps the 16-bit copies of `runtime.weight_copies`; FSDP2 makes its own of what is `sharded`.
    """
    groups, copies, dtype = optim.parameter_groups(networks), {}, networks.encoder.dtype
    if c.runtime.weight_copies and not sharded and dtype != torch.float32:
        device = groups[0]["params"][0].device
        fused = optim.fuses(c.runtime.kernels, device)
        copies = vit.hold_copies(networks, dtype, rounded_grads=fused and c.runtime.accumulate == 1)
    return optim.AdamW(
        groups, lr=c.optim.lr, betas=c.optim.betas, eps=c.optim.eps, averages=networks.averages(), copies=copies,
        impl=c.runtime.kernels,
    )  # fmt: skip


def loss_weights(c: config.Config) -> LossWeights:
    """Weights of the loss with `loss.vicreg_weight` multiplied out."""
    loss = c.loss
    return LossWeights(
        loss.prediction, *(loss.vicreg_weight * part for part in (loss.sim_weight, loss.std_weight, loss.cov_weight)),
        views=loss.vicreg_views, impl=c.runtime.kernels,
    )  # fmt: skip


def compile_blocks(networks: Networks, wanted: str, device: torch.device, mask_mode: str) -> str:
    """Applies torch.compile to every transformer block as `runtime.compile` wants it; returns what was chosen and why.

    Block by block, because equal blocks share one compilation and FSDP2's hooks lie between them. Static: each shape
    gets a program, five for a size of the masks' blocks. Dynamic: a block has one program for all shapes, or a few.
    """
    if wanted == "off" or (wanted == "auto" and device.type == "cpu"):
        return "not compiled" + (" (auto: on a CPU compiling outlasts small runs)" if wanted == "auto" else "")
    reason = ""
    if wanted == "auto":
        wanted = "dynamic" if MODES[mask_mode].lengths_vary else "static"
        reason = f" (auto: {mask_mode} masks)"
    # beyond these, dynamo would leave further shapes uncompiled; packed masks of 28 x 28 patches make 237 of them
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    for blocks in (networks.encoder.blocks, networks.predictor.predictor_blocks, networks.target_encoder.blocks):
        for block in blocks:
            block.compile(dynamic=wanted == "dynamic")
    return f"compiled for {'all shapes at once' if wanted == 'dynamic' else 'each shape'}{reason}"


def shard_networks(networks: Networks, mesh: DeviceMesh | None, *, unit: int, reshard: bool) -> None:
    """Shards every network as `distributed.shard` does, which describes `unit` and `reshard`.

    The target encoder always frees what it gathered. The projector, small and used once, never does, and is gathered in
    fp32.
    """
    for network, blocks, freed in (
        (networks.encoder, networks.encoder.blocks, reshard),
        (networks.predictor, networks.predictor.predictor_blocks, reshard),
        (networks.target_encoder, networks.target_encoder.blocks, True),
    ):
        distributed.shard(network, list(blocks), mesh, unit=unit, reshard=freed, dtype=networks.encoder.dtype)
    if networks.projector is not None:
        distributed.shard(networks.projector, [], mesh, unit=1, reshard=False, dtype=torch.float32)


def keep_freed_memory() -> bool:
    """Has glibc keep what is freed; returns whether there is a glibc.

    Else it gives large activations back to the system, whose pages come back zeroed, a fault each: up to a seventh of a
    ViT-S step on a CPU.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((-1, 2**31 - 1), (-3, 2**31 - 1), (-2, 2**28)):  # trim and mmap thresholds, top pad
        mallopt(parameter, value)
    return True


def run_directory(c: config.Config, resume: Path | None, device: torch.device) -> Path:
    """The folder of the run: given, resumed, or runs/ENCODER-TIME as rank 0's clock has it."""
    if resume is not None or c.run.dir is not None:
        return resume or c.run.dir or Path()
    stamp = torch.tensor(int(time.time()), device=device)
    if dist.is_initialized():
        dist.broadcast(stamp, 0)
    return Path("runs") / time.strftime(f"{c.model.encoder}-%Y%m%d-%H%M%S", time.localtime(int(stamp)))


class InterruptFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1 (what Slurm can send ahead of a time limit), acted on at the next log line so
    that all ranks agree. A second one ends at once, unless it follows within `REPEAT_S`: where a scheduler signals
    every process and torchrun passes its own signal on, each comes twice.
    """

    REPEAT_S = 5.0

    def __init__(self) -> None:
        self.is_set, self._since = False, 0.0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.is_set:
            self.is_set, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > self.REPEAT_S:
            os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
