"""What a run is made of: frozen dataclasses, strict loading, validation.

`model`, `mask`, `loss`, `optim`, `data` and `seed` decide the results; `runtime` must not change them; `run`
says where and what is recorded. Values come from a preset, then YAML files in order, then flags (`load`).
Importing this module needs the standard library alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import math
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from cjepa_fast.errors import UserError

if TYPE_CHECKING:
    import yaml

Range = tuple[float, float]
RGB = tuple[float, float, float]


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
    depth_rescale_init: bool = False
    """Divide the initial residual projections of block l by sqrt(2 l); I-JEPA means to, but undoes it."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the networks; weights, losses and optimiser state stay fp32."""


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Context and target blocks."""

    mode: Literal["fixed", "faithful"] = "fixed"
    """fixed follows the paper; faithful has the released sampler's quirks, such as an unused last row."""
    target_scale: Range = (0.15, 0.2)
    """Area of a target block, as a share of the image."""
    target_aspect: Range = (0.75, 1.5)
    """Height over width of a target block."""
    context_scale: Range = (0.85, 1.0)
    """Area of the context block before the targets are cut out of it."""
    num_targets: int = 4
    """Target blocks per image."""
    min_keep: int = 10
    """A context with no more than this many patches is drawn again."""


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

    root: Path | None = None
    """Folder of training images; None, with the demo preset only, writes a demo set to the cache."""
    probe_root: Path | None = None
    """Labelled images that query the 20-NN probe; None holds out a fixed part of root."""
    crop_scale: Range = (0.3, 1.0)
    """Area of the random crop, as a share of the image."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Width over height of the random crop."""
    hflip: bool = False
    """Flip half of the images left to right; the published recipes do not."""
    mean: RGB = (0.485, 0.456, 0.406)
    """Channel means subtracted from pixels in 0..1 (ImageNet)."""
    std: RGB = (0.229, 0.224, 0.225)
    """Channel standard deviations that divide them (ImageNet)."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Speed; nothing here changes what is computed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto compiles on a GPU."""
    kernels: Literal["auto", "triton", "eager"] = "auto"
    """Implementation of the fused operations; auto takes Triton on a GPU."""
    accumulate: int = 1
    """Parts into which each process cuts its batch to save memory; batch statistics stay global."""
    fsdp_blocks: int = 4
    """Transformer blocks per FSDP unit."""
    data_threads: int = 4
    """Threads that decode images, per process."""
    prefetch: int = 2
    """Batches prepared ahead of the step."""
    cpu_threads: int | None = None
    """Threads of torch on the CPU; None leaves torch's choice."""


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
class Command:
    """What the command line asks for: a valid configuration, and whether to check only or to resume a run."""

    config: Config
    check: bool
    resume: Path | None


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those of the launcher."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Optimiser steps of a run."""

    total: int
    per_epoch: int
    warmup: int


DEFAULT_PRESET = "demo"
RESULTS = ("model", "mask", "loss", "optim", "data", "seed")


@dataclass(frozen=True, kw_only=True)
class _Flags(Config):
    preset: str | None = None
    """Named configuration to start from (demo when none is named)."""
    config: tuple[Path, ...] = ()
    """YAML file of keys to change."""
    resume: Path | None = None
    """Run folder to continue; its config.yaml takes the preset's place."""
    check: bool = False
    """Check the configuration and the data, print the cost, train nothing."""


def load(argv: Sequence[str]) -> Command:
    """Resolves a command line (without the program's name) into a valid configuration.

    Later beats earlier: `--preset NAME` (default "demo"), each `--config FILE`, dotted flags. A file may name
    the preset itself. With `--resume RUN` the base is RUN/config.yaml, and a change of results is refused.

    Prints for `--help` only, which exits with 0. Raises UserError, one line, for everything that is wrong.
    """
    from cjepa_fast.presets import PRESETS

    _check_flag_names(argv)
    base = PRESETS[DEFAULT_PRESET]
    first = _parse_flags([a for a in argv if a not in ("-h", "--help")], base)
    files = [(path, *_read_yaml(path)) for path in first.config]
    named = [(str(path), name) for path, name, _ in files if name is not None]
    if first.preset is not None:
        named.append(("--preset", first.preset))
    for source, name in named:
        if first.resume is not None:
            raise UserError(
                f"{source}: preset {name!r} cannot be combined with --resume, which continues a run as it is"
            )
        if name not in PRESETS:
            raise UserError(
                f"{source}: unknown preset {name!r}"
                + (_did_you_mean(name, PRESETS) or f"; known: {', '.join(PRESETS)}")
            )
        if name != named[0][1]:
            raise UserError(f"{source}: preset {name!r} conflicts with {named[0][1]!r} of {named[0][0]}; name one")

    if first.resume is not None:
        base = _read_run(first.resume)
    elif named:
        base = PRESETS[named[0][1]]
    before = base
    for _, _, changes in files:
        base = replace(base, changes)
    flags = _parse_flags(argv, base)
    config = Config(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(Config)})

    if flags.resume is not None:
        if config.run.dir != flags.resume:
            raise UserError(
                f"run.dir: {config.run.dir} conflicts with --resume {flags.resume},"
                " which goes on in that folder; leave it out"
            )
        if changed := differences(before, config):
            raise UserError(
                f"--resume {flags.resume}: results would change, so leave out or start a new run: {'; '.join(changed)}"
            )
    elif config.data.root is None and named and named[0][1] != DEFAULT_PRESET:
        raise UserError(f"data.root: not set, but preset {named[0][1]!r} needs images; add --data.root FOLDER")
    validate(config)
    return Command(config=config, check=flags.check, resume=flags.resume)


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

    A folder that moved is no difference: what it holds is compared where it is read.
    """
    found = []
    for key in keys():
        a, b = get(old, key), get(new, key)
        moved = isinstance(a, Path) and isinstance(b, Path)
        if key.split(".")[0] in RESULTS and a != b and not moved:
            found.append(f"{key}: {a} -> {b}")
    return found


def keys() -> tuple[str, ...]:
    """Every key, in order: `("model.encoder", ..., "seed", ..., "run.wandb")`."""
    return tuple(_annotations())


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
    from cjepa_fast.vit import ENCODERS

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
    """Raises UserError unless every process gets the same whole number of images per step."""
    batch, parts = config.optim.batch_size, config.runtime.accumulate
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
    for name in names:
        if not environ[name].isdecimal():
            raise UserError(f"{name}: expected a whole number, got {environ[name]!r}; start with torchrun")
        values.append(int(environ[name]))
    rank, size, local_rank = values
    if not local_rank <= rank < size:
        raise UserError(
            f"RANK {rank}, WORLD_SIZE {size} and LOCAL_RANK {local_rank} contradict each other; start with torchrun"
        )
    return World(rank=rank, size=size, local_rank=local_rank)


def count_steps(config: Config, num_images: int) -> Steps:
    """The length of a run on `num_images` training images; raises UserError if they do not fill one batch."""
    optim = config.optim
    per_epoch = num_images // optim.batch_size  # an incomplete last batch is left out
    if per_epoch == 0:
        raise UserError(
            f"optim.batch_size: {optim.batch_size} exceeds the {num_images} training images; use at most that"
        )
    total = optim.steps if optim.steps is not None else max(1, round(optim.epochs * per_epoch))
    return Steps(total=total, per_epoch=per_epoch, warmup=round(optim.warmup_epochs * per_epoch))


def _rules(config: Config, encoders: Mapping[str, Any]) -> Iterator[tuple[str, bool, str]]:
    """(key, holds, what is wrong and the remedy), lazily: a later rule may rely on the earlier ones."""
    model, mask, loss, optim, data = config.model, config.mask, config.loss, config.optim, config.data
    runtime, run = config.runtime, config.run

    yield (
        "model.encoder",
        model.encoder in encoders,
        "is not an encoder" + (_did_you_mean(model.encoder, encoders) or f"; known: {', '.join(encoders)}"),
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
    heads = encoder.heads if model.predictor_heads is None else model.predictor_heads
    yield "model.predictor_heads", heads >= 1, "is out of range; use at least 1"
    yield (
        "model.predictor_width",
        model.predictor_width % math.lcm(4, heads) == 0,
        f"is not a multiple of 4 and of the predictor's {heads} heads;"
        f" use {_multiples(model.predictor_width, math.lcm(4, heads))}",
    )

    patches = (model.image_size // model.patch_size) ** 2
    for key in ("mask.target_scale", "mask.context_scale", "data.crop_scale"):
        low, high = get(config, key)
        yield key, 0 < low <= high <= 1, "is no range; use LOW HIGH with 0 < LOW <= HIGH <= 1"
    for key in ("mask.target_aspect", "data.crop_ratio"):
        low, high = get(config, key)
        yield key, 0 < low <= high, "is no range; use LOW HIGH with 0 < LOW <= HIGH"
    yield (
        "mask.target_scale",
        int(patches * mask.target_scale[0]) >= 1,
        f"leaves no patch of the {patches} to predict; raise it, or use a smaller model.patch_size",
    )
    yield _at_least(config, "mask.num_targets", 1)
    yield (
        "mask.num_targets",
        mask.num_targets >= 2 or not loss.vicreg_weight or loss.vicreg_views != "target_blocks",
        "gives no pair of views for loss.vicreg_views target_blocks; use at least 2",
    )
    yield (
        "mask.min_keep",
        1 <= mask.min_keep < patches,
        f"is out of range; use 1 to {patches - 1}, below the image's {patches} patches",
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
    yield "data.std", all(s > 0 for s in data.std), "is out of range; use three numbers above 0"
    yield "seed", 0 <= config.seed < 2**63, "is out of range; use 0 to 2**63 - 1"

    for key in ("accumulate", "fsdp_blocks", "data_threads", "prefetch"):
        yield _at_least(config, f"runtime.{key}", 1)
    yield (
        "runtime.cpu_threads",
        runtime.cpu_threads is None or runtime.cpu_threads >= 1,
        "is out of range; use at least 1",
    )
    yield (
        "runtime.accumulate",
        optim.batch_size % runtime.accumulate == 0,
        f"does not divide optim.batch_size {optim.batch_size}; use a divisor",
    )
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
def _annotations() -> dict[str, Any]:
    """The annotation of every key: `{"model.encoder": str, ..., "run.wandb": str | None}`."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            hints = get_type_hints(kind)
            found |= {f"{name}.{f.name}": hints[f.name] for f in dataclasses.fields(kind)}
        else:
            found[name] = kind
    return found


def _did_you_mean(name: str, known: Iterable[str], form: str = "'{}'") -> str:
    """`"; did you mean 'optim.lr'?"` for the likeliest of `known`, or nothing if none is near.

    The last part alone may decide: `lr` finds `optim.lr`.
    """
    known = list(known)
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(known)}
    leaf = name.rpartition(".")[2]
    near = [by_leaf[leaf]] if leaf in by_leaf else difflib.get_close_matches(name, known, 1)
    near = near or [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, 1)]
    return f"; did you mean {form.format(near[0])}?" if near else ""


# Text becomes values by annotation. YAML's own guesses are not used: it reads 1e-4 as a string, off as False
# and 12:30 as 750.
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _convert(texts: Any, annotation: Any) -> Any:
    """The value that a text, a list of texts or None spells; raises ValueError with what was expected."""
    kind, arguments = get_origin(annotation), get_args(annotation)
    if kind is types.UnionType:  # X | None
        if texts is None or texts == "None":
            return None
        with contextlib.suppress(ValueError):
            return _convert(texts, arguments[0])
    elif kind is tuple:
        if isinstance(texts, list) and len(texts) == len(arguments):
            with contextlib.suppress(ValueError):
                return tuple(_convert(text, argument) for text, argument in zip(texts, arguments, strict=True))
    elif isinstance(texts, str):
        if kind is Literal and texts in arguments:
            return texts
        if annotation is bool and texts.lower() in _BOOLEANS:
            return _BOOLEANS[texts.lower()]
        if annotation in (str, Path):
            return annotation(texts)
        if annotation in (int, float):
            with contextlib.suppress(ValueError):
                return annotation(texts)
    raise ValueError(_describe(annotation))


def _describe(annotation: Any) -> str:
    kind, arguments = get_origin(annotation), get_args(annotation)
    if kind is types.UnionType:
        return f"{_describe(arguments[0])} or None"
    if kind is tuple:
        return f"{len(arguments)} numbers"
    if kind is Literal:
        return f"one of {', '.join(arguments)}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return names[annotation]


def _read_run(run: Path) -> Config:
    """The configuration of a run to resume; every key must be there, so that a torn file cannot pass."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"--resume {run}: no config.yaml there; give the folder of a run")
    _, changes = _read_yaml(path)
    missing = [key for key in keys() if key not in changes]
    if missing:
        raise UserError(f"{path}: lacks '{missing[0]}'; the file is incomplete or of another version, add the key")
    return replace(Config(), changes | {"run.dir": run})


def _read_yaml(path: Path) -> tuple[str | None, dict[str, Any]]:
    """The preset a file names, if any, and the dotted keys it sets, converted to their types."""
    import yaml

    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give an existing YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; give a YAML file") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{path}:{mark.line + 1 if mark else 1}: malformed YAML, {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: malformed YAML, {' '.join(str(error).split())}") from None

    annotations = {"preset": str} | _annotations()
    sections = {key.partition(".")[0] for key in annotations if "." in key}
    changes: dict[str, Any] = {}
    for name, node in _entries(root, path, "", annotations) if root else ():
        leaves = _entries(node, path, f"{name}.", annotations) if name in sections else [(name, node)]
        for key, value in leaves:
            changes[key] = _value(value, path, key, annotations[key])
    return changes.pop("preset", None), changes


def _entries(node: yaml.Node, path: Path, prefix: str, known: Iterable[str]) -> Iterator[tuple[str, yaml.Node]]:
    """(dotted key, node) of a mapping, each key known and there once."""
    import yaml

    _check_tag(node, path, prefix.rstrip(".") or "file")
    if not isinstance(node, yaml.MappingNode):
        example = next(key for key in known if key.startswith(prefix) and "." in key)
        what = f"{prefix[:-1]!r} is a section" if prefix else "a configuration is a mapping"
        raise _error(path, node, f"{what}; put keys such as {example!r} into it")
    here = {prefix + key.removeprefix(prefix).partition(".")[0] for key in known if key.startswith(prefix)}
    lines: dict[str, int] = {}
    for key, value in node.value:
        name = prefix + (key.value if isinstance(key, yaml.ScalarNode) else "[...]")
        if name not in here:
            raise _error(path, key, f"unknown key {name!r}{_did_you_mean(name, (*sorted(here), *known))}")
        if name in lines:
            raise _error(path, key, f"{name!r} is set again, first on line {lines[name]}; keep one")
        lines[name] = key.start_mark.line + 1
        yield name, value


def _value(node: yaml.Node, path: Path, key: str, annotation: Any) -> Any:
    import yaml

    _check_tag(node, path, key)
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for item in items:
        _check_tag(item, path, key)
        if not isinstance(item, yaml.ScalarNode):
            raise _error(path, item, f"{key}: expected {_describe(annotation)}, got something nested")
    texts = [None if item.tag.endswith(":null") else item.value for item in items]
    value = texts if items is node.value else texts[0]
    try:
        return _convert(value, annotation)
    except ValueError as expected:
        raise _error(
            path, node, f"{key}: expected {expected}, got {'null' if value is None else repr(value)}"
        ) from None


_TAGS = ("map", "seq", "null", "bool", "int", "float", "str", "timestamp", "value", "merge")


def _check_tag(node: yaml.Node, path: Path, key: str) -> None:
    """Refuses tags such as !!python/object; `yaml.compose` only reads them, nothing here would run them."""
    if node.tag.removeprefix("tag:yaml.org,2002:") not in _TAGS:
        raise _error(path, node, f"{key}: tag {node.tag!r} is not allowed; write a plain value")


def _error(path: Path, node: yaml.Node, message: str) -> UserError:
    return UserError(f"{path}:{node.start_mark.line + 1}: {message}")


@functools.cache
def _flag_annotations() -> dict[str, Any]:
    """The annotation behind every flag, dashes left out: `{"model.encoder": str, ..., "check": bool}`."""
    found = _annotations() | {name: get_type_hints(_Flags)[name] for name in _Flags.__annotations__}
    return {name.replace("_", "-"): annotation for name, annotation in (found | {"config": Path}).items()}


def _parse_flags(argv: Sequence[str], base: Config) -> _Flags:
    """`base` with the flags on top; where tyro would draw a box, raises UserError with one line."""
    import tyro

    from cjepa_fast.presets import PRESETS

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                _Flags,
                prog="python -m cjepa_fast.train",
                description=f"Pretrain a vision transformer with C-JEPA. Presets: {', '.join(PRESETS)}.",
                args=argv,
                default=_Flags(**{f.name: getattr(base, f.name) for f in dataclasses.fields(Config)}),
                config=(tyro.conf.UseAppendAction,),
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    _check_flag_values(argv)
    # what this module reads as right and tyro as wrong is still told in one line, in tyro's words
    raise UserError(re.sub(r"[\s\u2500-\u257f]+", " ", complaint.getvalue()).strip())


def _check_flag_names(argv: Sequence[str]) -> None:
    known = [*_flag_annotations(), "help"]
    negations = {_negated(flag) for flag, annotation in _flag_annotations().items() if annotation is bool}
    for flag, _ in _flag_groups(argv):
        if flag not in known and flag not in negations:
            raise UserError(f"unknown flag --{flag}{_did_you_mean(flag, known, '--{}')}")


def _check_flag_values(argv: Sequence[str]) -> None:
    for flag, values in _flag_groups(argv):
        annotation = _flag_annotations().get(flag, bool)
        if annotation is bool:
            if values:
                remedy = f"write --{flag} or --{_negated(flag)}" if flag in _flag_annotations() else "leave it out"
                raise UserError(f"--{flag}: takes no value, got {values[0]!r}; {remedy}")
            continue
        try:
            _convert(values if get_origin(annotation) is tuple else " ".join(values) or [], annotation)
        except ValueError as expected:
            found = repr(" ".join(values)) if values else "nothing"
            raise UserError(f"--{flag}: expected {expected}, got {found}") from None


def _flag_groups(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag, dashes left out and underscores as hyphens, with the values behind it."""
    groups: list[tuple[str, list[str]]] = []
    for argument in argv:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            groups.append((name.replace("_", "-"), [value] if equals else []))
        elif groups:
            groups[-1][1].append(argument)
        elif argument != "-h":
            raise UserError(f"unexpected argument {argument!r}; flags look like --optim.lr 0.001")
    return groups


def _negated(flag: str) -> str:
    section, dot, leaf = flag.rpartition(".")
    return f"{section}{dot}no-{leaf}"
