"""Which settings can train: every rule once, with its remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator

from cjepa_fast.config.schema import ENCODERS, Config, did_you_mean, get, keys
from cjepa_fast.errors import UserError


def validate(config: Config) -> None:
    """Check every rule that needs no machine and no image; the mask sampler has its own, see `MultiBlockSampler`.

    Raises UserError, naming key, value and remedy, for the first value that cannot train.
    """
    for key in keys():
        value = get(config, key)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{key}: {value} is not finite; use a finite number")

    for key, ok, remedy in _rules(config):
        if not ok:
            value = get(config, key)
            raise UserError(f"{key}: {repr(value) if isinstance(value, str) else value} {remedy}")


def validate_world(config: Config, world_size: int) -> None:
    """Raise UserError unless the processes can share images and copies of the state evenly."""
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


Rule = tuple[str, bool, str]


def _rules(config: Config) -> Iterator[Rule]:
    """Yield (key, whether the rule holds, fault and remedy), lazily: a rule may rely on earlier ones."""
    yield from _model_rules(config)
    yield from _loss_rules(config)
    yield from _optim_rules(config)
    yield from _data_rules(config)
    yield from _runtime_rules(config)
    yield from _run_rules(config)


def _model_rules(config: Config) -> Iterator[Rule]:
    model = config.model
    known = did_you_mean(model.encoder, ENCODERS) or f"; known: {', '.join(ENCODERS)}"
    yield "model.encoder", model.encoder in ENCODERS, f"is not an encoder{known}"
    for key in ("model.image_size", "model.patch_size", "model.predictor_depth", "model.predictor_width"):
        yield _at_least(config, key, 1)
    multiples = _multiples(model.image_size, model.patch_size)
    fault = f"is not a multiple of model.patch_size {model.patch_size}; use {multiples}"
    yield "model.image_size", model.image_size % model.patch_size == 0, fault
    side = model.image_size // model.patch_size
    fault = f"makes {side} patches of model.patch_size {model.patch_size} a side; use 2 to 64 of them"
    yield "model.image_size", 2 <= side <= 64, fault
    heads = ENCODERS[model.encoder].heads
    unit = math.lcm(4, heads)
    multiples = _multiples(model.predictor_width, unit)
    fault = f"is not a multiple of 4 and of {model.encoder}'s {heads} heads; use {multiples}"
    yield "model.predictor_width", model.predictor_width % unit == 0, fault
    fault = f"needs model.precision bf16, not {model.precision}; use same"
    yield "model.target_precision", model.target_precision == "same" or model.precision == "bf16", fault
    plain = model.target_precision == "same" or config.method != "vicreg"
    yield "model.target_precision", plain, "needs a target encoder, which vicreg has not; use same"


def _loss_rules(config: Config) -> Iterator[Rule]:
    loss, mask = config.loss, config.mask
    pairs = config.method == "cjepa" and loss.vicreg_views == "target_blocks"
    fault = "has one target, no pair for loss.vicreg_views target_blocks; use context_target, or method ijepa"
    yield "mask.mode", mask.mode not in ("block", "random") or not pairs, fault
    fault = "gives no pair of views for loss.vicreg_views target_blocks; use at least 2"
    yield "mask.num_targets", mask.num_targets >= 2 or not pairs, fault
    yield _at_least(config, "loss.vicreg_weight", 0)
    fault = "leaves nothing of C-JEPA's terms; use method ijepa, or a weight above 0"
    yield "loss.vicreg_weight", loss.vicreg_weight > 0 or config.method != "cjepa", fault
    fault = "is out of range; use three numbers of at least 0"
    yield "loss.vicreg_coefficients", all(weight >= 0 for weight in loss.vicreg_coefficients), fault
    yield "loss.projector", all(width >= 1 for width in loss.projector), "is out of range; use widths of at least 1"


def _optim_rules(config: Config) -> Iterator[Rule]:
    optim = config.optim
    yield _at_least(config, "optim.batch_size", 1)
    fault = "is too small for VICReg's statistics over the batch; use at least 2"
    yield "optim.batch_size", optim.batch_size >= 2 or config.method == "ijepa", fault
    for key in ("optim.epochs", "optim.lr"):
        yield key, get(config, key) > 0, "is out of range; use a number above 0"
    yield "optim.steps", optim.steps is None or optim.steps >= 1, "is out of range; use at least 1"
    for key in ("start_lr", "final_lr", "warmup_epochs", "weight_decay", "final_weight_decay"):
        yield _at_least(config, f"optim.{key}", 0)
    fits = optim.steps is not None or optim.warmup_epochs < optim.epochs
    yield "optim.warmup_epochs", fits, f"fills all of optim.epochs {optim.epochs}; use a shorter warm-up"
    for key in ("optim.ema", "optim.final_ema"):
        yield key, 0 <= get(config, key) <= 1, "is out of range; use 0 to 1"


def _data_rules(config: Config) -> Iterator[Rule]:
    data = config.data
    low, high = data.crop_scale
    yield "data.crop_scale", 0 < low <= high <= 1, "is no range; use LOW HIGH with 0 < LOW <= HIGH <= 1"
    yield _at_least(config, "data.max_pixels", 1)
    fault = "is out of range; use 0 to 5, where hue turns by up to half the circle"
    yield "data.augment_strength", 0 <= data.augment_strength <= 5, fault
    fault = f"blurs over 6 pixels, farther than the {config.model.image_size} pixels of a crop; use color"
    yield "data.augment", data.augment != "byol" or config.model.image_size > 6, fault
    fault = "needs augmented views; use color or byol"
    yield "data.augment", data.augment != "none" or config.method != "vicreg", fault
    yield "data.std", all(s > 0 for s in data.std), "is out of range; use three numbers above 0"
    yield "seed", 0 <= config.seed < 2**63, "is out of range; use 0 to 2**63 - 1"


def _runtime_rules(config: Config) -> Iterator[Rule]:
    runtime, batch = config.runtime, config.optim.batch_size
    yield _at_least(config, "runtime.accumulate", 1)
    for key in ("data_threads", "cpu_threads"):
        value = get(config, f"runtime.{key}")
        yield f"runtime.{key}", value is None or 1 <= value <= 1024, "is out of range; use 1 to 1024"
    shards = runtime.shard_size
    yield "runtime.shard_size", shards is None or shards >= 1, "is out of range; use at least 1"
    plans = "auto, auto:GB (the memory of a GPU), keep, reshard, recompute or both"
    yield "runtime.memory", memory_plan(runtime.memory) is not None, f"is no plan; use {plans}"
    fault = f"does not divide optim.batch_size {batch}; use a divisor"
    yield "runtime.accumulate", batch % runtime.accumulate == 0, fault
    for clash, remedy in (
        (
            config.method != "vicreg" and config.mask.mode == "faithful",
            "needs the same token counts in every batch; use mask.mode fixed or packed",
        ),
        (runtime.accumulate > 1, "captures undivided batches; use runtime.accumulate 1"),
        (runtime.kernels == "eager", "needs the optimizer's Triton kernel; use runtime.kernels auto"),
        (runtime.attention == "xformers", "cannot capture xformers, which reads offsets; use runtime.attention auto"),
        (runtime.device == "cpu", "needs a GPU; use off"),
    ):
        yield "runtime.cuda_graph", runtime.cuda_graph == "off" or not clash, remedy


def memory_plan(text: str) -> tuple[str, float | None] | None:
    """Parse `runtime.memory` into a plan and the GPU's memory in 10^9 bytes, if given; None if `text` is neither."""
    plan, _, size = text.partition(":")
    if plan == "auto" and size:
        try:
            gb = float(size)
        except ValueError:
            return None
        return ("auto", gb) if 0 < gb < math.inf else None
    return (plan, None) if text in ("auto", "keep", "reshard", "recompute", "both") else None


def _run_rules(config: Config) -> Iterator[Rule]:
    for key, least in (("log_every", 1), ("checkpoint_every", 1), ("keep_checkpoints", 2), ("probe_every", 0)):
        yield _at_least(config, f"run.{key}", least)
    fault = "is out of range; use at least 20, the probe asks 20 neighbours"
    yield "run.probe_bank", config.run.probe_bank >= 20, fault
    yield _at_least(config, "run.probe_queries", 1)


def _at_least(config: Config, key: str, least: int) -> tuple[str, bool, str]:
    return key, get(config, key) >= least, f"is out of range; use at least {least}"


def _multiples(number: int, of: int) -> str:
    """Return the nearest multiples on both sides: `"224 or 240"`."""
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)
