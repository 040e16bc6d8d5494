"""The models and trainers that `bench.step` times.

A trainer is named `NAME` or `NAME:OPTION=VALUE,...`, for example `tuned:compile=off` or `ours:kernels=eager`:

    ours            this package; options are the keys under `runtime`
    eager           references/eager.py; attention=materialised|sdpa, syncs, fused, pairs=on|off
    tuned           references/tuned.py; compile=auto|off|a mode of torch.compile
    ijepa           a checkout of the original repository; checkout=PATH
    lightly, transformers       their encoders alone, where they are installed
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin
from unittest import mock

import torch
from torch import Tensor, nn

from bench import records
from bench.step.references import Batch, Drawn, Mark, Schedule, Trainer, eager, external, no_mark, tuned
from bench.training import Training, build_method, build_sampler
from cjepa_fast import config
from cjepa_fast.config import Config
from cjepa_fast.config.presets import PRESETS
from cjepa_fast.errors import UserError
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
    "H": ("ijepa_vit_huge14_in1k", {"method": "cjepa"}),
}


class CannotRun(Exception):
    """A reason why a trainer cannot be timed here, in one line."""


class Spec(NamedTuple):
    """A trainer's name and options."""

    name: str
    options: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Parse `NAME[:OPTION=VALUE,...]`. Raises ValueError that names the mistake."""
        name, _, rest = text.partition(":")
        if name not in NAMES:
            raise ValueError(f"unknown rival {name!r}; known: {', '.join(NAMES)}")
        pairs = [part.partition("=") for part in rest.split(",") if part]
        if bad := [pair[0] for pair in pairs if not pair[1]]:
            raise ValueError(f"{text}: {bad[0]!r} is no option; write OPTION=VALUE")
        return cls(name, {key: value for key, _, value in pairs})


def configure(model: str, mask_mode: str, precision: str) -> Config:
    """Return the published recipe of a model in `MODELS`."""
    preset, changes = MODELS[model]
    return config.replace(PRESETS[preset], {**changes, "mask.mode": mask_mode, "model.precision": precision})


def sample(c: Config, batch_size: int, count: int) -> list[Drawn]:
    """Draw `count` batches of random bytes with masks, all of the most common block size."""
    sampler = build_sampler(c)
    sizes = [sampler.block_sizes(step) for step in range(256)]
    step = sizes.index(collections.Counter(sizes).most_common(1)[0][0])
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, c.model.image_size, c.model.image_size, 3)
    runs = [range(index * batch_size, (index + 1) * batch_size) for index in range(count)]
    return [
        Drawn(
            torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), sampler.sample(step, ids), step, ids
        )
        for ids in runs
    ]


def mean_context(masks: Masks) -> float:
    """Return the mean number of context patches of an image."""
    if masks.offsets is None:
        return masks.context.shape[1]
    return int(masks.offsets[-1]) / (len(masks.offsets) - 1)


class Ours:
    """The main job's step."""

    def __init__(self, training: Training) -> None:
        self.training, self.networks, self.note = training, training.networks, training.compiled
        training.set_hyperparameters(SCHEDULE.lr, SCHEDULE.weight_decay)

    def batch(self, drawn: Drawn) -> Batch:
        return drawn.images.to(self.training.device), self.training.draw(drawn.step, drawn.ids)

    def gradients(self, batch: Batch, mark: Mark = no_mark) -> Tensor | float:
        with _hooks(self.networks, mark) if mark is not no_mark else contextlib.nullcontext():
            return self.training.gradients(*batch).loss

    def update(self) -> None:
        self.training.update(SCHEDULE.ema)

    def step(self, batch: Batch, mark: Mark = no_mark) -> Tensor | float:
        if mark is no_mark:
            images, masks = batch
            return self.training.step(images, masks, SCHEDULE.ema).loss
        loss = self.gradients(batch, mark)
        self.update()
        mark("optimizer+EMA")
        return loss


@contextlib.contextmanager
def _hooks(networks: Any, mark: Mark) -> Iterator[None]:
    """Mark the ends of the phases by hooks on the networks; work between networks counts as the loss."""
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
    """Build the trainer of `spec`; all trainers of a configuration have the same initial weights.

    Args:
        as_train: draw the weights on the CPU, as a real run does, not on `device`.

    Raises CannotRun.
    """
    options = dict(spec.options)
    if spec.name == "ours":
        c = _with_runtime(c, options)
    torch.manual_seed(c.seed)
    if spec.name in YARDSTICKS:
        return _yardstick(spec.name, c, device)
    with contextlib.nullcontext() if as_train else device:
        networks = build_method(c).to(device)
    if spec.name == "ours":
        try:
            return Ours(Training(c, device, networks))
        except UserError as error:
            raise CannotRun(f"ours: {error}") from error
    state = networks.state_dict()
    del networks
    make = {"tuned": _tuned, "ijepa": _checkout, "eager": _eager}[spec.name]
    trainer = make(c, device, state, options)
    if options:
        raise CannotRun(f"{spec.name}: it has no option {next(iter(options))!r}")
    return trainer


def _with_runtime(c: Config, options: dict[str, str]) -> Config:
    """Return `c` with the keys under `runtime` that the options name."""
    for key, text in options.items():
        if (kind := config.key_types().get(f"runtime.{key}")) is None:
            raise CannotRun(f"ours: there is no runtime.{key}")
        if get_origin(kind) is Literal and text not in get_args(kind):
            raise CannotRun(f"ours: runtime.{key}: {text!r} is not one of {', '.join(get_args(kind))}")
    values = {f"runtime.{key}": int(text) if text.isdecimal() else text for key, text in options.items()}
    try:
        c = config.replace(c, values)
        config.validate(c)
    except UserError as error:
        raise CannotRun(f"ours: {error}") from error
    return c


def _tuned(c: Config, device: torch.device, state: dict[str, Tensor], options: dict[str, str]) -> Trainer:
    mode = options.pop("compile", "auto")
    if mode == "auto":
        mode = "off" if device.type == "cpu" else "default"
    networks = _loaded(lambda: tuned.Networks(c), state, device)
    return tuned.Trainer(networks, c, device, SCHEDULE, compile=None if mode == "off" else mode)


def _checkout(c: Config, device: torch.device, state: dict[str, Tensor], options: dict[str, str]) -> Trainer:
    if c.mask.mode == "packed":
        raise CannotRun("its networks take contexts of one length")
    if not (path := options.pop("checkout", "")):
        raise CannotRun("not given: pass --ijepa-checkout PATH")
    try:
        networks = _loaded(lambda: external.CheckoutNetworks(c, path), state, device)
    except (RuntimeError, ImportError, AttributeError, TypeError) as error:
        raise CannotRun(records.first_line(error)) from error
    return _published("ijepa", networks, c, device, options)


def _eager(c: Config, device: torch.device, state: dict[str, Tensor], options: dict[str, str]) -> Trainer:
    sdpa = _choice("eager", options, "attention", "materialised", "sdpa") == "sdpa"
    return _published("eager", _loaded(lambda: eager.Networks(c, sdpa=sdpa), state, device), c, device, options)


def _published(
    name: str, networks: eager.Networks, c: Config, device: torch.device, options: dict[str, str]
) -> Trainer:  # fmt: skip
    syncs, pairs = (_choice(name, options, key, "on", "off") == "on" for key in ("syncs", "pairs"))
    fused = _choice(name, options, "fused", "off", "on") == "on"
    return eager.Trainer(networks, c, device, SCHEDULE, syncs=syncs, fused=fused, pairs=pairs)


def _choice(name: str, options: dict[str, str], key: str, *allowed: str) -> str:
    """Take an option out of `options`; the first allowed value is the default."""
    value = options.pop(key, allowed[0])
    if value not in allowed:
        raise CannotRun(f"{name}: {key}={value} is not known; use {' or '.join(allowed)}")
    return value


def _loaded(make: Callable[[], nn.Module], state: dict[str, Tensor], device: torch.device) -> Any:
    with device:
        networks = make().to(device)
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
