"""What a run is made of: frozen dataclasses and their validation; how they are read is in `cjepa_fast.config.cli`.

`model`, `mask`, `loss`, `optim`, `data` and `seed` decide the results; `runtime` must not change them; `run`
says where and what is recorded. Importing this module needs the standard library alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_type_hints

from cjepa_fast.errors import UserError

Range = tuple[float, float]
RGB = tuple[float, float, float]


class VitShape(NamedTuple):
    """Width D, number of blocks, attention heads and hidden-to-width ratio of the MLP."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0


ENCODERS: dict[str, VitShape] = {
    "vit_demo": VitShape(96, 3, 4),  # ours: a minute or two on two CPU cores
    "vit_pico": VitShape(128, 4, 4),  # ours: CIFAR-10 on two CPU cores
    "vit_tiny": VitShape(192, 12, 3),  # tiny to base: DeiT (Touvron et al., 2021), ViT (Dosovitskiy et al., 2021)
    "vit_small": VitShape(384, 12, 6),
    "vit_base": VitShape(768, 12, 12),
    "vit_large": VitShape(1024, 24, 16),
    "vit_huge": VitShape(1280, 32, 16),
    "vit_giant": VitShape(1408, 40, 16, 48 / 11),  # Zhai et al., 2022 (arXiv 2106.04560), table 2
}


def encoder_shape(name: str) -> VitShape:
    """The entry of `ENCODERS`; raises UserError that lists the known names."""
    if name not in ENCODERS:
        raise UserError(f"unknown encoder {name!r}; known: {', '.join(ENCODERS)}")
    return ENCODERS[name]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder and the predictor."""

    encoder: str = "vit_base"
    """vit_tiny, vit_small, vit_base, vit_large, vit_huge, vit_giant; small ones: vit_demo, vit_pico."""
    image_size: int = 224
    """Side of the square training crop, in pixels."""
    patch_size: int = 16
    """Side of a square patch, in pixels; divides the image size."""
    predictor_depth: int = 6
    """Number of predictor blocks."""
    predictor_width: int = 384
    """Width of the predictor."""
    predictor_heads: int | None = None
    """Attention heads of the predictor; None takes the encoder's number."""
    predictor_context: Literal["per_target", "shared"] = "per_target"
    """per_target as published; shared passes the context once, blind to the targets: faster, another model."""
    depth_rescale_init: bool = False
    """Divide the initial residual projections of block l by sqrt(2 l); I-JEPA means to, but undoes it."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the networks; weights, losses and optimiser state stay fp32."""
    target_precision: Literal["same", "float8"] = "same"
    """float8: the target encoder's linear layers, on GPUs from capability 8.9 on; not yet run on a GPU."""


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Context and target blocks."""

    mode: Literal["fixed", "faithful", "packed", "rasterized", "block", "random"] = "fixed"
    """fixed as the paper, faithful as the released code, packed uncut; rasterized, block, random: I-JEPA's Table 6."""
    target_scale: Range = (0.15, 0.2)
    """Area of a target block, as a share of the image; random mode takes one number twice."""
    target_aspect: Range = (0.75, 1.5)
    """Height over width of a target block."""
    context_scale: Range = (0.85, 1.0)
    """Area of the context block before the targets are cut out of it."""
    num_targets: int = 4
    """Target blocks per image. Rasterized mode has 3, block and random mode 1."""
    min_keep: int = 10
    """Fewest patches of a target block and of a context."""
    context_keep: int | None = None
    """Context patches of every image in fixed mode; None takes what leaves 127 of 128 images their blocks."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Prediction loss plus vicreg_weight x VICReg."""

    prediction: Literal["smooth_l1", "l2"] = "smooth_l1"
    """Distance to the layer-normed targets: smooth_l1 as in the released code, l2 as in the paper."""
    vicreg_weight: float = 0.001
    """Weight of the VICReg sum against the prediction loss; 0 is plain I-JEPA."""
    sim_weight: float = 25.0
    """VICReg invariance weight."""
    std_weight: float = 25.0
    """VICReg variance weight."""
    cov_weight: float = 1.0
    """VICReg covariance weight."""
    vicreg_views: Literal["target_blocks", "context_target"] = "target_blocks"
    """Views compared: the paper's Algorithm 1 (target_blocks) or its pseudo-code C.2 (context_target)."""
    projector_width: int | None = None
    """Width of the projector in front of VICReg; None takes the encoder's width."""
    projector_layers: int = 2
    """Linear layers of the projector, batch norm and ReLU between them; the paper publishes no shape."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedules."""

    batch_size: int = 2048
    """Images per step over all processes."""
    epochs: float = 600.0
    """Passes over the images; a fraction is allowed."""
    steps: int | None = None
    """Total steps; overrides epochs when given."""
    lr: float = 1e-3
    """Peak learning rate, not scaled by the batch size."""
    start_lr: float = 1e-4
    """Learning rate at step 0."""
    final_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 15.0
    """Epochs of linear warm-up from start_lr to lr."""
    weight_decay: float = 0.04
    """Weight decay at step 0; biases and norms have none."""
    final_weight_decay: float = 0.4
    """Weight decay at the end."""
    weight_decay_schedule: Literal["cosine", "linear"] = "linear"
    """Path between the two: linear as the paper says, cosine as the released code does."""
    ema: float = 0.996
    """Target-encoder momentum at step 0."""
    final_ema: float = 1.0
    """Target-encoder momentum at the end, reached linearly."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moment decays."""
    eps: float = 1e-8
    """AdamW epsilon."""
    schedule_scale: float = 1.0
    """Stretch of every schedule beyond the run's end (the released code's ipe_scale)."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images and their augmentation."""

    root: tuple[str, ...] = ()
    """Training images, each PATH or PATH=WEIGHT, see docs/data.md; without any the demo preset writes its own."""
    probe_root: str | None = None
    """Labelled images that query the 20-NN probe; None holds out a fixed part of root."""
    index: Literal["quick", "thorough"] = "quick"
    """What is read to index images at first use: headers (quick) or every byte (thorough)."""
    max_pixels: int = 178_956_970
    """Larger images are left out, as decompression bombs; the default is Pillow's limit."""
    on_error: Literal["error", "skip"] = "error"
    """An image that turns bad after indexing: error stops the run, skip shows another in its place, for up to 0.1 %."""
    crop_scale: Range = (0.3, 1.0)
    """Area of the random crop, as a share of the image."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Width over height of the random crop."""
    hflip: bool = False
    """Flip half of the images left to right; the published recipes do not."""
    views: int = 1
    """2: the target encoder sees the same crop in other colours, as drawn by the settings below."""
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Most change of brightness, contrast, saturation (as a share) and hue (in turns); BYOL 0.4 0.4 0.2 0.1."""
    color_jitter_p: float = 0.8
    """Share of the images that color_jitter changes."""
    grayscale_p: float = 0.0
    """Share of the images turned grey."""
    blur_p: tuple[float, ...] = (0.0,)
    """Share of the images that are blurred: one number, or one per view."""
    blur_sigma: Range = (0.1, 2.0)
    """Standard deviation of the blur, in pixels of the training crop."""
    solarize_p: tuple[float, ...] = (0.0,)
    """Share of the images whose values from 128 on are inverted: one number, or one per view."""
    mean: RGB = (0.485, 0.456, 0.406)
    """Channel means subtracted from pixels in 0..1 (ImageNet)."""
    std: RGB = (0.229, 0.224, 0.225)
    """Channel standard deviations that divide them (ImageNet)."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Speed; nothing here changes what is computed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    compile: Literal["auto", "static", "dynamic", "off"] = "auto"
    """torch.compile, a program per shape (static) or one for all; auto: off on a CPU, dynamic where contexts vary."""
    kernels: Literal["auto", "triton", "eager"] = "auto"
    """Implementation of the fused operations; auto takes Triton on a GPU."""
    attention: Literal[
        "auto", "triton", "eager", "sdpa", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "xformers", "varlen"
    ] = "auto"
    """Implementation of attention; most leave packed rows to auto, which takes what was measured to be fastest."""
    cuda_graph: Literal["off", "on"] = "off"
    """on replays each step as one CUDA graph per block size: for small models on one GPU; not yet run on a GPU."""
    masks: Literal["auto", "native", "numpy", "cuda"] = "auto"
    """Sampler of the masks: auto takes C++ (native) or, without it, NumPy; cuda samples on the GPU."""
    predictor_targets_only: bool = True
    """The last predictor block computes target rows only: what nothing is made of is left out, exactly."""
    predictor_shared_start: bool = True
    """The first predictor block projects each context row and position once, not once a target block: exact."""
    target_union_only: bool = True
    """The last target block computes rows that are some target only, except where health figures read all: exact."""
    weight_copies: bool = True
    """With bf16 on one process, the optimizer writes 16-bit copies of the weights, which no step need then cast."""
    accumulate: int = 1
    """Parts into which each process cuts its batch to save memory; batch statistics stay global."""
    fsdp_blocks: int = 4
    """Transformer blocks per FSDP unit."""
    shard_size: int | None = None
    """Processes that share one copy of weights and optimiser state; None: those of a node."""
    reshard: Literal["auto", "never", "always"] = "auto"
    """Free gathered weights between forward and backward (ZeRO-3) or keep them (ZeRO-2); auto keeps what fits."""
    checkpoint_activations: Literal["auto", "on", "off"] = "auto"
    """Recompute activations in backward, a third more work; auto does where nothing else makes the step fit."""
    memory_gb: float | None = None
    """Memory of one GPU, in 10^9 bytes, that auto plans for; None asks the GPU."""
    data_threads: int = 4
    """Threads that decode images, per process."""
    prefetch: int = 2
    """Batches prepared ahead of the step."""
    hw_decoder_load: float = 0.65
    """Share of the JPEGs given to the GPU's hardware decoder, where it has one."""
    cpu_threads: int | None = None
    """Threads of torch on the CPU; None leaves torch's choice."""
    keep_memory: bool = True
    """On a CPU, keep freed memory for the next step instead of giving it back to the system: saves page faults."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives and what it records."""

    dir: Path | None = None
    """Folder of the run, created new; None names one after the time."""
    log_every: int = 20
    """Steps between two lines of metrics."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept, at least 2."""
    probe_every: int = 0
    """Steps between two probes; 0 probes at the start and the end only."""
    probe_bank: int = 5000
    """Training images that answer the 20-NN probe."""
    probe_queries: int = 2000
    """Images that query it."""
    tensorboard: bool = False
    """Write TensorBoard events beside metrics.jsonl."""
    wandb: str | None = None
    """Weights & Biases project to report to."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run. The defaults are the paper's C-JEPA recipe for ViT-B/16 on ImageNet-1k."""

    model: ModelConfig = ModelConfig()
    mask: MaskConfig = MaskConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    seed: int = 0
    """Seed of initialisation, data order, crops and masks."""
    runtime: RuntimeConfig = RuntimeConfig()
    run: RunConfig = RunConfig()


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those of the launcher."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes of this node; all of them where the launcher does not say."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Optimiser steps of a run."""

    total: int
    per_epoch: int
    warmup: int


MAX_STEPS = 10_000_000  # the schedules hold 24 bytes a step

RESULTS = ("model", "mask", "loss", "optim", "data", "seed")


def to_yaml(config: Config) -> str:
    """Every key with its resolved value; `load(["--config", file])` gives the same configuration back."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_representer(tuple, lambda d, v: d.represent_sequence("tag:yaml.org,2002:seq", v, flow_style=True))
    Dumper.add_multi_representer(Path, lambda d, v: d.represent_str(str(v)))
    return yaml.dump(
        dataclasses.asdict(config),
        Dumper=Dumper,
        sort_keys=False,
        default_flow_style=False,
    )


def differences(old: Config, new: Config) -> list[str]:
    """The keys that decide results and differ, as `"optim.lr: 0.001 -> 0.002"`.

    Images that moved are no difference: what a root holds is compared where it is read.
    """
    found = []
    for key in keys():
        a, b = get(old, key), get(new, key)
        moved = key in ("data.root", "data.probe_root") and a and b
        if key.split(".")[0] in RESULTS and a != b and not moved and key != "data.on_error":
            found.append(f"{key}: {a} -> {b}")
    return found


def keys() -> tuple[str, ...]:
    """Every key, in order: `("model.encoder", ..., "seed", ..., "run.wandb")`."""
    return tuple(key_types())


def get(config: Config, key: str) -> Any:
    """The value under a dotted key such as `"optim.lr"`."""
    return functools.reduce(getattr, key.split("."), config)


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with the dotted keys in `changes` set; not validated."""
    for key, value in changes.items():
        section, _, leaf = key.rpartition(".")
        if section:
            leaf, value = section, dataclasses.replace(getattr(config, section), **{leaf: value})
        config = dataclasses.replace(config, **{leaf: value})
    return config


def validate(config: Config) -> None:
    """Raises UserError, naming key, value and remedy, for the first value that cannot train."""
    for key in keys():
        value = get(config, key)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{key}: {value} is not finite; use a finite number")

    for key, ok, remedy in _rules(config, ENCODERS):
        if not ok:
            value = get(config, key)
            raise UserError(f"{key}: {repr(value) if isinstance(value, str) else value} {remedy}")


def validate_world(config: Config, world_size: int) -> None:
    """Raises UserError unless images and copies of the state can be shared evenly by the processes."""
    batch, parts, shards = config.optim.batch_size, config.runtime.accumulate, config.runtime.shard_size
    if batch % world_size:
        raise UserError(
            f"optim.batch_size: {batch} images cannot be shared evenly by {world_size} processes;"
            f" use {_multiples(batch, world_size * parts)}"
        )
    if (batch // world_size) % parts:
        raise UserError(
            f"runtime.accumulate: {parts} parts do not divide the {batch // world_size} images of a process"
            f" (optim.batch_size {batch} over {world_size}); use a divisor of {batch // world_size}"
        )
    if config.runtime.cuda_graph == "on" and world_size > 1:
        raise UserError(f"runtime.cuda_graph: on captures the step of one process, there are {world_size}; use off")
    if shards is not None and world_size % shards:
        divisors = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise UserError(
            f"runtime.shard_size: {shards} does not divide the {world_size} processes; use one of {divisors}, or None"
        )


def shard_size(config: Config, world: World) -> int:
    """Processes that share one copy of the state; consecutive ranks, so that None keeps gathering within a node."""
    if config.runtime.shard_size is not None:
        return config.runtime.shard_size
    # torchrun allows nodes of different sizes, over which no group of this size fits
    return world.local_size if world.size % world.local_size == 0 else world.size


def read_world(environ: Mapping[str, str]) -> World:
    """This process's place from torchrun's variables; a lone process where there are none.

    Raises UserError if they are incomplete or contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [name for name in names if name in environ]
    if not given:
        return World()
    for name in (*names, "MASTER_ADDR", "MASTER_PORT"):
        if name not in environ:
            raise UserError(
                f"{name} is not set although {given[0]} is; start with torchrun, or unset {', '.join(given)}"
            )
    values = []
    for name, value in [(name, environ[name]) for name in names] + [
        ("LOCAL_WORLD_SIZE", environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"]))
    ]:
        if not value.isdecimal():
            raise UserError(f"{name}: expected a whole number, got {value!r}; start with torchrun")
        values.append(int(value))
    rank, size, local_rank, local_size = values
    if not local_rank <= rank < size or not local_rank < local_size <= size:
        raise UserError(
            f"RANK {rank}, WORLD_SIZE {size}, LOCAL_RANK {local_rank} and LOCAL_WORLD_SIZE {local_size}"
            " contradict each other; start with torchrun"
        )
    return World(rank=rank, size=size, local_rank=local_rank, local_size=local_size)


def count_steps(config: Config, num_images: int) -> Steps:
    """The length of a run on `num_images` training images.

    Raises UserError if they do not fill one batch, or for more than `MAX_STEPS`.
    """
    optim = config.optim
    per_epoch = num_images // optim.batch_size  # an incomplete last batch is left out
    if per_epoch == 0:
        raise UserError(
            f"optim.batch_size: {optim.batch_size} exceeds the {num_images} training images; use at most that"
        )
    total = optim.steps if optim.steps is not None else optim.epochs * per_epoch
    if total > MAX_STEPS:
        key = "optim.epochs" if optim.steps is None else "optim.steps"
        raise UserError(f"{key}: makes a run of {total:,.3g} steps; use at most {MAX_STEPS:,}")
    warmup = round(min(optim.warmup_epochs * per_epoch, MAX_STEPS))
    return Steps(total=max(1, round(total)), per_epoch=per_epoch, warmup=warmup)


def _rules(config: Config, encoders: Mapping[str, Any]) -> Iterator[tuple[str, bool, str]]:
    """(key, holds, what is wrong and the remedy), lazily: a later rule may rely on the earlier ones."""
    model, mask, loss, optim, data = config.model, config.mask, config.loss, config.optim, config.data
    runtime, run = config.runtime, config.run

    yield (
        "model.encoder",
        model.encoder in encoders,
        "is not an encoder" + (did_you_mean(model.encoder, encoders) or f"; known: {', '.join(encoders)}"),
    )
    encoder = encoders[model.encoder]
    for key in ("model.image_size", "model.patch_size", "model.predictor_depth", "model.predictor_width"):
        yield _at_least(config, key, 1)
    yield (
        "model.image_size",
        model.image_size % model.patch_size == 0,
        f"is not a multiple of model.patch_size {model.patch_size};"
        f" use {_multiples(model.image_size, model.patch_size)}",
    )
    side = model.image_size // model.patch_size
    yield (
        "model.image_size",
        2 <= side <= 64,
        f"makes {side} patches of model.patch_size {model.patch_size} a side; use 2 to 64 of them",
    )
    heads = encoder.heads if model.predictor_heads is None else model.predictor_heads
    yield "model.predictor_heads", heads >= 1, "is out of range; use at least 1"
    yield (
        "model.predictor_width",
        model.predictor_width % math.lcm(4, heads) == 0,
        f"is not a multiple of 4 and of the predictor's {heads} heads;"
        f" use {_multiples(model.predictor_width, math.lcm(4, heads))}",
    )
    yield (
        "model.target_precision",
        model.target_precision == "same" or model.precision == "bf16",
        f"needs model.precision bf16, not {model.precision}; use same",
    )

    low, high = data.crop_scale
    yield "data.crop_scale", 0 < low <= high <= 1, "is no range; use LOW HIGH with 0 < LOW <= HIGH <= 1"
    low, high = data.crop_ratio
    yield "data.crop_ratio", 0 < low <= high, "is no range; use LOW HIGH with 0 < LOW <= HIGH"

    # `cjepa_fast.masks` states the rules of masks; the rules here involve another section too.
    yield (
        "mask.mode",
        mask.mode not in ("block", "random") or not loss.vicreg_weight or loss.vicreg_views != "target_blocks",
        "has one target, no pair for loss.vicreg_views target_blocks; use context_target, or loss.vicreg_weight 0",
    )
    yield (
        "mask.num_targets",
        mask.num_targets >= 2 or not loss.vicreg_weight or loss.vicreg_views != "target_blocks",
        "gives no pair of views for loss.vicreg_views target_blocks; use at least 2",
    )

    for key in ("loss.vicreg_weight", "loss.sim_weight", "loss.std_weight", "loss.cov_weight"):
        yield _at_least(config, key, 0)
    yield (
        "loss.projector_width",
        loss.projector_width is None or loss.projector_width >= 1,
        "is out of range; use at least 1",
    )
    yield _at_least(config, "loss.projector_layers", 1)

    yield _at_least(config, "optim.batch_size", 1)
    yield (
        "optim.batch_size",
        optim.batch_size >= 2 or not loss.vicreg_weight,
        "is too small for VICReg's statistics over the batch; use at least 2",
    )
    for key in ("optim.epochs", "optim.lr", "optim.eps"):
        yield key, get(config, key) > 0, "is out of range; use a number above 0"
    yield "optim.steps", optim.steps is None or optim.steps >= 1, "is out of range; use at least 1"
    for key in ("start_lr", "final_lr", "warmup_epochs", "weight_decay", "final_weight_decay"):
        yield _at_least(config, f"optim.{key}", 0)
    yield (
        "optim.warmup_epochs",
        optim.steps is not None or optim.warmup_epochs < optim.epochs,
        f"fills all of optim.epochs {optim.epochs}; use a shorter warm-up",
    )
    for key in ("optim.ema", "optim.final_ema"):
        yield key, 0 <= get(config, key) <= 1, "is out of range; use 0 to 1"
    yield (
        "optim.betas",
        all(0 <= beta < 1 for beta in optim.betas),
        "is out of range; use two numbers of 0 <= beta < 1",
    )
    yield _at_least(config, "optim.schedule_scale", 1)
    yield _at_least(config, "data.max_pixels", 1)
    yield "data.views", data.views in (1, 2), "is out of range; use 1 or 2"
    yield (
        "data.color_jitter",
        all(x >= 0 for x in data.color_jitter) and data.color_jitter[3] <= 0.5,
        "is out of range; use BRIGHTNESS CONTRAST SATURATION HUE of at least 0, HUE at most 0.5",
    )
    for key in ("data.color_jitter_p", "data.grayscale_p", "runtime.hw_decoder_load"):
        yield key, 0 <= get(config, key) <= 1, "is out of range; use 0 to 1"
    for key in ("data.blur_p", "data.solarize_p"):
        shares = get(config, key)
        yield key, all(0 <= p <= 1 for p in shares), "is out of range; use numbers from 0 to 1"
        yield key, len(shares) in (1, data.views), f"has {len(shares)} numbers; use one, or one for each of data.views"
    low, high = data.blur_sigma
    yield "data.blur_sigma", 0 < low <= high, "is no range; use LOW HIGH with 0 < LOW <= HIGH"
    yield (
        "data.blur_sigma",
        not any(data.blur_p) or math.ceil(3 * high) < model.image_size,
        f"reaches farther (3 times as far) than the {model.image_size} pixels of a crop;"
        f" use at most {(model.image_size - 1) // 3}",
    )
    yield "data.std", all(s > 0 for s in data.std), "is out of range; use three numbers above 0"
    yield "seed", 0 <= config.seed < 2**63, "is out of range; use 0 to 2**63 - 1"

    for key in ("accumulate", "fsdp_blocks", "prefetch"):
        yield _at_least(config, f"runtime.{key}", 1)
    for key in ("data_threads", "cpu_threads"):
        value = get(config, f"runtime.{key}")
        yield f"runtime.{key}", value is None or 1 <= value <= 1024, "is out of range; use 1 to 1024"
    shards = runtime.shard_size
    yield "runtime.shard_size", shards is None or shards >= 1, "is out of range; use at least 1"
    yield (
        "runtime.memory_gb",
        runtime.memory_gb is None or runtime.memory_gb > 0,
        "is out of range; use a number above 0",
    )
    yield (
        "runtime.accumulate",
        optim.batch_size % runtime.accumulate == 0,
        f"does not divide optim.batch_size {optim.batch_size}; use a divisor",
    )
    for clash, remedy in (
        (mask.mode == "faithful", "needs the same token counts in every batch; use mask.mode fixed or packed"),
        (runtime.accumulate > 1, "captures undivided batches; use runtime.accumulate 1"),
        (runtime.kernels == "eager", "needs the optimizer's Triton kernel; use runtime.kernels auto"),
        (runtime.attention == "xformers", "cannot capture xformers, which reads offsets; use runtime.attention auto"),
        (runtime.device == "cpu", "needs a GPU; use off"),
    ):
        yield "runtime.cuda_graph", runtime.cuda_graph == "off" or not clash, remedy
    for key, least in (
        ("log_every", 1),
        ("checkpoint_every", 1),
        ("keep_checkpoints", 2),
        ("probe_every", 0),
    ):
        yield _at_least(config, f"run.{key}", least)
    yield (
        "run.probe_bank",
        run.probe_bank >= 20,
        "is out of range; use at least 20, the probe asks 20 neighbours",
    )
    yield _at_least(config, "run.probe_queries", 1)


def _at_least(config: Config, key: str, least: int) -> tuple[str, bool, str]:
    return key, get(config, key) >= least, f"is out of range; use at least {least}"


def _multiples(number: int, of: int) -> str:
    """The nearest multiples on both sides: `"224 or 240"`."""
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)


@functools.cache
def key_types() -> dict[str, Any]:
    """The annotation of every key: `{"model.encoder": str, ..., "run.wandb": str | None}`."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            hints = get_type_hints(kind)
            found |= {f"{name}.{f.name}": hints[f.name] for f in dataclasses.fields(kind)}
        else:
            found[name] = kind
    return found


def did_you_mean(name: str, known: Iterable[str], form: str = "'{}'") -> str:
    """`"; did you mean 'optim.lr'?"` for the likeliest of `known`, or nothing if none is near.

    The last part alone may decide: `lr` finds `optim.lr`.
    """
    known = list(known)
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(known)}
    leaf = name.rpartition(".")[2]
    near = [by_leaf[leaf]] if leaf in by_leaf else difflib.get_close_matches(name, known, 1)
    near = near or [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, 1)]
    return f"; did you mean {form.format(near[0])}?" if near else ""
