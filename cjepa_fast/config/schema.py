"""The settings of a run: frozen dataclasses, one line of help each.

`method`, `model`, `mask`, `loss`, `optim`, `data` and `seed` decide the results. `runtime` only changes speed and
memory. `run` says where the run is recorded. This module needs the standard library alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping
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
    "vit_demo": VitShape(96, 3, 4),  # ours: trains the demo in about a minute on two CPU cores
    "vit_pico": VitShape(128, 4, 4),  # ours: CIFAR-10 on two CPU cores
    "vit_tiny": VitShape(192, 12, 3),  # tiny to base: DeiT (Touvron et al., 2021), ViT (Dosovitskiy et al., 2021)
    "vit_small": VitShape(384, 12, 6),
    "vit_base": VitShape(768, 12, 12),
    "vit_large": VitShape(1024, 24, 16),
    "vit_huge": VitShape(1280, 32, 16),
    "vit_giant": VitShape(1408, 40, 16, 48 / 11),  # Zhai et al., 2022 (arXiv 2106.04560), table 2
}


def encoder_shape(name: str) -> VitShape:
    """Return the entry of `ENCODERS`; raises UserError that lists the known names."""
    if name not in ENCODERS:
        raise UserError(f"unknown encoder {name!r}; known: {', '.join(ENCODERS)}")
    return ENCODERS[name]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder and the predictor."""

    encoder: str = "vit_base"
    """vit_tiny, vit_small, vit_base, vit_large, vit_huge or vit_giant; for CPUs vit_demo or vit_pico."""
    image_size: int = 224
    """Side of the square training crop, in pixels."""
    patch_size: int = 16
    """Side of a square patch, in pixels; divides the image size."""
    predictor_depth: int = 6
    """Blocks of the predictor."""
    predictor_width: int = 384
    """Width of the predictor; its heads are as many as the encoder's."""
    predictor_context: Literal["per_target", "shared"] = "per_target"
    """per_target: the published predictor; shared: one pass of the context for all target blocks, another model."""
    depth_rescale_init: bool = False
    """Divide the initial residual projections of block l by sqrt(2 l); the released I-JEPA code undoes this."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the networks; weights, losses and optimizer state stay fp32."""
    target_precision: Literal["same", "float8"] = "same"
    """float8: linear layers of the target encoder in float8 (GPU of capability 8.9 or more; not yet run on a GPU)."""


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Context and target blocks."""

    mode: Literal["fixed", "faithful", "packed", "rasterized", "block", "random"] = "fixed"
    """fixed: the papers' masks; faithful: the released code's; packed: uncut contexts; the rest: I-JEPA's Table 6."""
    target_scale: Range = (0.15, 0.2)
    """Area of a target block, as a share of the image; random mode takes one number twice."""
    target_aspect: Range = (0.75, 1.5)
    """Height over width of a target block."""
    context_scale: Range = (0.85, 1.0)
    """Area of the context block, as a share of the image, before the targets are removed."""
    num_targets: int = 4
    """Target blocks per image; rasterized mode has 3, block and random mode 1."""
    min_keep: int = 10
    """Fewest patches of a target block and of a context."""
    context_keep: int | None = None
    """Context patches per image in fixed mode; None: as many as 127 of 128 images have."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The terms of the loss."""

    prediction: Literal["smooth_l1", "l2"] = "smooth_l1"
    """Distance of predictions to layer-normed targets: smooth_l1 (released code) or l2 (the papers' text)."""
    vicreg_weight: float = 0.001
    """Weight of the VICReg terms against the prediction loss in cjepa."""
    vicreg_coefficients: tuple[float, float, float] = (25.0, 25.0, 1.0)
    """VICReg's weights of invariance, variance and covariance."""
    vicreg_views: Literal["target_blocks", "context_target"] = "target_blocks"
    """Views that cjepa compares: C-JEPA's Algorithm 1 (target_blocks) or its pseudo-code C.2 (context_target)."""
    projector: tuple[int, ...] = ()
    """Output width of each projector layer; none: two layers of the encoder's width."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedules."""

    batch_size: int = 2048
    """Images per step over all processes."""
    epochs: float = 600.0
    """Passes over the images; fractions are allowed."""
    steps: int | None = None
    """Steps of the run; overrides epochs."""
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
    """Path between the two: linear (the papers) or cosine (released code)."""
    ema: float = 0.996
    """Momentum of the target encoder at step 0."""
    final_ema: float = 1.0
    """Momentum of the target encoder at the end; the path is linear."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images and their augmentation."""

    root: tuple[str, ...] = ()
    """Training images, each PATH or PATH=WEIGHT, see docs/data.md; without any the demo preset writes its own."""
    probe_root: str | None = None
    """Labelled images that query the 20-NN probe; None holds out a fixed part of root."""
    index: Literal["quick", "thorough"] = "quick"
    """Indexing at first use reads headers (quick) or every byte (thorough)."""
    max_pixels: int = 178_956_970
    """Larger images are left out, as decompression bombs; the default is Pillow's limit."""
    on_error: Literal["error", "skip"] = "error"
    """An image that turns bad after indexing: error stops the run, skip shows another in its place, for up to 0.1 %."""
    crop_scale: Range = (0.3, 1.0)
    """Area of the random crop, as a share of the image."""
    hflip: bool = False
    """Flip half of the images left to right; the published recipes do not."""
    augment: Literal["none", "color", "byol"] = "none"
    """Colours of each view. color: jitter and grey, as SimCLR on CIFAR-10; byol: blur and solarise too, as BYOL."""
    augment_strength: float = 1.0
    """Factor of the jitter 0.4 0.4 0.2 0.1 of brightness, contrast, saturation (as shares) and hue (in turns)."""
    mean: RGB = (0.485, 0.456, 0.406)
    """Channel means subtracted from pixels in 0..1 (ImageNet)."""
    std: RGB = (0.229, 0.224, 0.225)
    """Channel standard deviations that divide them (ImageNet)."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Speed and memory; nothing here changes what is computed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    compile: Literal["auto", "static", "dynamic", "off"] = "auto"
    """torch.compile: one program per shape (static) or for all (dynamic); auto: off on a CPU, else by the mask mode."""
    kernels: Literal["auto", "triton", "eager"] = "auto"
    """Implementation of the fused operations; auto: Triton on a GPU, else PyTorch."""
    attention: Literal["auto", "triton", "sdpa", "xformers", "eager"] = "auto"
    """Implementation of attention; auto: the fastest measured on this GPU, else sdpa or Triton."""
    cuda_graph: Literal["off", "on"] = "off"
    """on: replay each step as one CUDA graph per block size (one GPU, small models; not yet run on a GPU)."""
    masks: Literal["auto", "native", "numpy", "cuda"] = "auto"
    """Sampler of the masks; auto: C++ (native), or NumPy where C++ cannot be built; cuda: on the GPU."""
    accumulate: int = 1
    """Micro-batches per process and step, to save memory; batch statistics stay those of the whole batch."""
    shard_size: int | None = None
    """Processes that share one copy of weights and optimizer state; None: those of a node."""
    memory: str = "auto"
    """auto: the fastest plan that fits the GPU (auto:80 for one of 80 GB); keep, reshard (ZeRO-3), recompute, both."""
    data_threads: int = 4
    """Threads per process that decode images."""
    cpu_threads: int | None = None
    """Threads of torch on the CPU; None: torch's choice."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives and what it records."""

    dir: Path | None = None
    """Folder of the run, created new; None: runs/ENCODER-TIME."""
    log_every: int = 20
    """Steps between two lines of metrics."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept, at least 2."""
    probe_every: int = 0
    """Steps between two probes; 0: at the start and the end only."""
    probe_bank: int = 5000
    """Labelled training images that the 20-NN probe searches."""
    probe_queries: int = 2000
    """Images that the probe classifies."""
    tensorboard: bool = False
    """Write TensorBoard events beside metrics.jsonl."""
    wandb: str | None = None
    """Weights & Biases project to report to."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run. The defaults are the paper's C-JEPA recipe for ViT-B/16 on ImageNet-1k."""

    method: Literal["cjepa", "ijepa", "vicreg"] = "cjepa"
    """Objective: C-JEPA, I-JEPA (C-JEPA without VICReg's terms), or VICReg on two augmented crops."""
    model: ModelConfig = ModelConfig()
    mask: MaskConfig = MaskConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    seed: int = 0
    """Seed of initialisation, data order, crops and masks."""
    runtime: RuntimeConfig = RuntimeConfig()
    run: RunConfig = RunConfig()


SPEED_ONLY = ("runtime", "run")  # sections that do not decide the results


def to_yaml(config: Config) -> str:
    """Return every key with its value as YAML; `load(["--config", file])` gives the same configuration back."""
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
    """Return the keys that decide results and differ, as `"optim.lr: 0.001 -> 0.002"`.

    Moved images do not count: the run compares the fingerprint of the images when it resumes.
    """
    found = []
    for key in keys():
        a, b = get(old, key), get(new, key)
        moved = key in ("data.root", "data.probe_root") and a and b
        if key.split(".")[0] not in SPEED_ONLY and a != b and not moved and key != "data.on_error":
            found.append(f"{key}: {a} -> {b}")
    return found


def keys() -> tuple[str, ...]:
    """Return every key, in order: `("model.encoder", ..., "seed", ..., "run.wandb")`."""
    return tuple(key_types())


def get(config: Config, key: str) -> Any:
    """Return the value under a dotted key such as `"optim.lr"`."""
    return functools.reduce(getattr, key.split("."), config)


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return `config` with the dotted keys in `changes` set; nothing is validated."""
    for key, value in changes.items():
        section, _, leaf = key.rpartition(".")
        if section:
            leaf, value = section, dataclasses.replace(getattr(config, section), **{leaf: value})
        config = dataclasses.replace(config, **{leaf: value})
    return config


@functools.cache
def key_types() -> dict[str, Any]:
    """Return the annotation of every key: `{"model.encoder": str, ..., "run.wandb": str | None}`."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            hints = get_type_hints(kind)
            found |= {f"{name}.{f.name}": hints[f.name] for f in dataclasses.fields(kind)}
        else:
            found[name] = kind
    return found


def did_you_mean(name: str, known: Iterable[str], form: str = "'{}'") -> str:
    """Return `"; did you mean 'optim.lr'?"` for the nearest name in `known`, or "" if none is near.

    The last part of a key suffices: `lr` finds `optim.lr`.
    """
    known = list(known)
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(known)}
    leaf = name.rpartition(".")[2]
    near = [by_leaf[leaf]] if leaf in by_leaf else difflib.get_close_matches(name, known, 1)
    near = near or [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, 1)]
    return f"; did you mean {form.format(near[0])}?" if near else ""
