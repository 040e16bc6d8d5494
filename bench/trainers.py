"""What `bench.step` can time: models, the batches that all of them get, and how each trainer is built from its name.

A trainer is named `NAME` or `NAME:OPTION=VALUE,...`, for example `tuned:compile=off` or `ours:kernels=eager`:

    ours            this package; options are the keys under `runtime`
    eager           bench/references/eager.py; attention=materialised|sdpa, syncs, fused, pairs=on|off
    tuned           bench/references/tuned.py; compile=auto|off|a mode of torch.compile
    ijepa           a checkout of the original repository; checkout=PATH
    lightly, transformers       their encoders alone, where they are installed

Every one takes keep_memory=on|off, for its process on a CPU (see `cjepa_fast.train.keep_freed_memory`); on by default.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from bench.references import Batch, Mark, Schedule, Trainer, eager, external, no_mark, tuned
from cjepa_fast import train
from cjepa_fast.config import Config
from cjepa_fast.config import schema as config
from cjepa_fast.config.presets import PRESETS
from cjepa_fast.engine.step import Networks, forward_backward
from cjepa_fast.masks import Masks

RIVALS = ("eager", "tuned", "ijepa")
YARDSTICKS = ("lightly", "transformers")  # do less than a step
NAMES = ("ours", *RIVALS, *YARDSTICKS)
SCHEDULE = Schedule()

_TINY = {  # for a laptop, and to see that the pieces fit
    "model.encoder": "vit_pico", "model.image_size": 64, "model.patch_size": 8, "model.predictor_depth": 2,
    "model.predictor_width": 64, "mask.min_keep": 4,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("cjepa_vit_small16_in1k", _TINY),
    "S": ("cjepa_vit_small16_in1k", {}),
    "B": ("cjepa_vit_base16_in1k", {}),
    "L": ("cjepa_vit_large16_in1k", {}),
    # the released shape under C-JEPA's loss, like the others
    "H": ("ijepa_vit_huge14_in1k", {"loss.vicreg_weight": 0.001}),
}


class CannotRun(Exception):
    """Why a trainer cannot be timed here, in one line."""


class Spec(NamedTuple):
    """A trainer's name and options."""

    name: str
    options: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Raises ValueError that says what is wrong."""
        name, _, rest = text.partition(":")
        if name not in NAMES:
            raise ValueError(f"unknown rival {name!r}; known: {', '.join(NAMES)}")
        pairs = [part.partition("=") for part in rest.split(",") if part]
        if bad := [pair[0] for pair in pairs if not pair[1]]:
            raise ValueError(f"{text}: {bad[0]!r} is no option; write OPTION=VALUE")
        return cls(name, {key: value for key, _, value in pairs})


def configure(model: str, mask_mode: str, precision: str) -> Config:
    """The published recipe of a model in `MODELS`."""
    preset, changes = MODELS[model]
    return config.replace(PRESETS[preset], {**changes, "mask.mode": mask_mode, "model.precision": precision})


def sample(c: Config, batch_size: int, count: int) -> list[tuple[Tensor, Masks]]:
    """`count` batches of random bytes [B, H, W, 3] with masks, all of the commonest block size, on the CPU."""
    sampler = train.build_sampler(c)
    sizes = [sampler.block_sizes(step) for step in range(256)]
    step = sizes.index(collections.Counter(sizes).most_common(1)[0][0])
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, c.model.image_size, c.model.image_size, 3)
    return [
        (
            torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            sampler.sample(step, range(index * batch_size, (index + 1) * batch_size), union=True),
        )
        for index in range(count)
    ]


def mean_context(masks: Masks) -> float:
    """Mean number of context patches of an image."""
    if masks.offsets is None:
        return masks.context.shape[1]
    return int(masks.offsets[-1]) / (len(masks.offsets) - 1)


class Ours:
    """This package's step, built as `cjepa_fast.train` builds it."""

    def __init__(self, networks: Networks, c: Config, device: torch.device) -> None:
        self.networks, self.device, self.unions = networks, device, train.needs_unions(c)
        self.compile = c.runtime.compile
        self.note = train.compile_blocks(networks, c.runtime.compile, device, c.mask.mode)
        self.optimizer, self.weights = train.build_optimizer(c, networks, sharded=False), train.loss_weights(c)

    def batch(self, images: Tensor, masks: Masks) -> Batch:
        if not self.unions:
            masks = masks._replace(union=None, union_offsets=None, target_slot=None)
        return images.to(self.device), [train.place_masks(masks, self.compile, self.device)]

    def gradients(self, batch: Batch, mark: Mark = no_mark) -> Tensor | float:
        images, masks = batch
        with _hooks(self.networks, mark) if mark is not no_mark else contextlib.nullcontext():
            return forward_backward(self.networks, images, masks, self.weights).terms.loss

    def update(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = SCHEDULE.lr
            group["weight_decay"] = SCHEDULE.weight_decay if group["decayed"] else 0.0
        self.optimizer.step(momentum=SCHEDULE.ema)
        self.optimizer.zero_grad()

    def step(self, batch: Batch, mark: Mark = no_mark) -> Tensor | float:
        loss = self.gradients(batch, mark)
        self.update()
        mark("optimizer+EMA")
        return loss


@contextlib.contextmanager
def _hooks(networks: Networks, mark: Mark) -> Iterator[None]:
    """Marks the ends of phases of a step that knows nothing of them; what lies between networks is the loss."""
    phases = {"target": networks.target_encoder, "context": networks.encoder, "predictor": networks.predictor}
    handles = []
    for phase, network in phases.items():
        handles.append(network.register_forward_pre_hook(lambda *_: mark("loss")))
        handles.append(network.register_forward_hook(lambda *_, phase=phase: mark(phase)))
    backward = torch.Tensor.backward

    def marked(self: Tensor, *arguments: Any, **options: Any) -> None:
        mark("loss")
        backward(self, *arguments, **options)
        mark("backward")

    try:
        with mock.patch.object(torch.Tensor, "backward", marked):
            yield
    finally:
        for handle in handles:
            handle.remove()


def build(spec: Spec, c: Config, device: torch.device, *, as_train: bool = False) -> Trainer:
    """The trainer of `spec`, with the same initial weights as every other.

    Args:
        as_train: initial weights are drawn on the CPU, as a real run draws them, not where they will live.

    Raises CannotRun.
    """
    options = dict(spec.options)
    if spec.name == "ours":
        c = config.replace(c, {f"runtime.{key}": _runtime_value(key, value) for key, value in options.items()})
    torch.manual_seed(c.seed)
    if spec.name in YARDSTICKS:
        return _yardstick(spec.name, c, device)
    with contextlib.nullcontext() if as_train else device:
        networks = train.build_networks(c).to(device)
    if spec.name == "ours":
        return Ours(networks, c, device)
    state = networks.state_dict()
    del networks

    def take(name: str, default: str, *allowed: str) -> str:
        value = options.pop(name, default)
        if allowed and value not in allowed:
            raise CannotRun(f"{spec.name}: {name}={value} is not known; use {' or '.join(allowed)}")
        return value

    def on(name: str, default: str) -> bool:
        return take(name, default, "on", "off") == "on"

    if spec.name == "tuned":
        mode = take("compile", "auto")
        trainer: Trainer = tuned.Trainer(
            _loaded(tuned.Networks, state, device, c), c, device, SCHEDULE,
            compile=None if mode == "off" or (mode == "auto" and device.type == "cpu") else
            "default" if mode == "auto" else mode,
        )  # fmt: skip
    else:
        if spec.name == "ijepa":
            if c.mask.mode == "packed":
                raise CannotRun("its networks take contexts of one length")
            path = take("checkout", "")
            if not path:
                raise CannotRun("not given: pass --ijepa-checkout PATH")
            try:
                networks = _loaded(external.CheckoutNetworks, state, device, c, path)
            except (RuntimeError, ImportError, AttributeError, TypeError) as error:
                raise CannotRun(f"{type(error).__name__}: {error}".splitlines()[0]) from error
        else:
            sdpa = take("attention", "materialised", "materialised", "sdpa") == "sdpa"
            networks = _loaded(lambda c: eager.Networks(c, sdpa=sdpa), state, device, c)
        trainer = eager.Trainer(
            networks, c, device, SCHEDULE, syncs=on("syncs", "on"), fused=on("fused", "off"), pairs=on("pairs", "on")
        )
    if options:
        raise CannotRun(f"{spec.name}: it has no option {next(iter(options))!r}")
    return trainer


def _loaded(make: Callable[..., nn.Module], state: dict[str, Tensor], device: torch.device, *arguments: Any) -> Any:
    with device:
        networks = make(*arguments).to(device)
    networks.load_state_dict(state)
    return networks


def _yardstick(name: str, c: Config, device: torch.device) -> Trainer:
    try:
        make = external.lightly_encoder if name == "lightly" else external.transformers_encoder
        encoder = make(c)
    except ImportError as error:
        raise CannotRun(f"{error.name or name} is not installed") from error
    if c.mask.mode == "packed":
        raise CannotRun("its encoder takes contexts of one length")
    return external.EncoderOnly(encoder, c, device, SCHEDULE, masked=name == "lightly")


def _runtime_value(key: str, text: str) -> Any:
    """The value of a key under `runtime`, from an option."""
    kind = config.key_types().get(f"runtime.{key}")
    if kind is None:
        raise CannotRun(f"ours: there is no runtime.{key}")
    if kind is bool:
        if text not in ("on", "off"):
            raise CannotRun(f"ours: {key}={text} is not known; use on or off")
        return text == "on"
    return int(text) if text.isdecimal() else text


def prepare_process(spec: Spec, device: torch.device) -> Spec:
    """Applies the options of `spec` that concern a whole process, and returns it without them."""
    options = dict(spec.options)
    if options.pop("keep_memory", "on") == "on" and device.type == "cpu":
        train.keep_freed_memory()
    return spec._replace(options=options)
