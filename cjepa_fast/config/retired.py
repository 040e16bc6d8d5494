"""Settings that no longer exist: hints for whoever still sets one, and the conversion of earlier runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cjepa_fast.config.schema import ENCODERS, Config
from cjepa_fast.errors import UserError

RETIRED: dict[str, str] = {
    "model.predictor_heads": "the predictor has as many heads as the encoder",
    **{f"loss.{term}_weight": "loss.vicreg_coefficients SIM STD COV took its place" for term in ("sim", "std", "cov")},
    **{f"loss.projector_{key}": "loss.projector WIDTH WIDTH ... took its place" for key in ("width", "layers")},
    "optim.betas": "fixed at 0.9 0.999",
    "optim.eps": "fixed at 1e-8",
    "optim.schedule_scale": "fixed at 1",
    "data.crop_ratio": "fixed at 3/4 to 4/3",
    "data.views": "the method and data.augment decide",
    **{
        f"data.{key}": "data.augment and data.augment_strength took its place"
        for key in ("color_jitter", "color_jitter_p", "grayscale_p", "blur_p", "blur_sigma", "solarize_p")
    },
    **{
        f"runtime.{key}": "always on, as it is exact"
        for key in ("predictor_targets_only", "predictor_shared_start", "target_union_only", "weight_copies")
    },
    "runtime.keep_memory": "always on",
    "runtime.fsdp_blocks": "fixed at 4",
    "runtime.prefetch": "fixed at 2",
    "runtime.hw_decoder_load": "fixed at 0.65",
    **{f"runtime.{key}": "runtime.memory took its place" for key in ("reshard", "checkpoint_activations")},
    "runtime.memory_gb": "runtime.memory took its place, as auto:GB",
}

Value = str | list[str | None] | None  # of a key as YAML spells it

_FIXED: dict[str, tuple[float, ...]] = {
    "optim.betas": (0.9, 0.999), "optim.eps": (1e-8,), "optim.schedule_scale": (1.0,),
    "data.crop_ratio": (3 / 4, 4 / 3),
}  # fmt: skip
_JITTER: dict[tuple[float, ...], str] = {(0.0, 0.0, 0.0, 0.0): "none", (0.4, 0.4, 0.2, 0.1): "color"}


def upgrade(current: Mapping[str, Any], retired: Mapping[str, Value]) -> dict[str, Any]:
    """Convert the settings of an earlier version's run.

    Args:
        current: typed values of the keys that still exist.
        retired: values of keys in `RETIRED`, as text.

    Returns the values of today's keys. Keys that only changed speed are dropped.

    Raises UserError, naming the key, where a value has no equivalent today.
    """
    found = dict(current)

    def numbers(key: str) -> tuple[float, ...]:
        value = retired[key]
        return tuple(float(text or "nan") for text in (value if isinstance(value, list) else [value]))

    def refuse(key: str) -> UserError:
        hint = f"{RETIRED[key]}; use the version that began the run"
        return UserError(f"{key}: {retired[key]} cannot be converted: {hint}")

    for key, constant in _FIXED.items():
        if key in retired and numbers(key) != constant:
            raise refuse(key)
    shape = ENCODERS[found.get("model.encoder", Config().model.encoder)]
    if retired.get("model.predictor_heads") not in (None, str(shape.heads)):
        raise refuse("model.predictor_heads")
    if "loss.cov_weight" in retired:
        weights = ("loss.sim_weight", "loss.std_weight", "loss.cov_weight")
        found["loss.vicreg_coefficients"] = tuple(numbers(key)[0] for key in weights)
    if "loss.projector_layers" in retired:
        width, layers = retired["loss.projector_width"], int(numbers("loss.projector_layers")[0])
        plain = width is None and layers == 2
        found["loss.projector"] = () if plain else (int(str(width or shape.width)),) * layers
    if "data.color_jitter" in retired:
        augment = _JITTER.get(numbers("data.color_jitter"))
        views, grey = retired["data.views"], numbers("data.grayscale_p")[0]
        other = any((*numbers("data.blur_p"), *numbers("data.solarize_p")))
        if augment is None or other or (views, grey) != (("1", 0.0) if augment == "none" else ("2", 0.2)):
            raise refuse("data.color_jitter")
        found |= {"data.augment": augment, "data.augment_strength": 1.0}
    if retired and "method" not in found:
        found["method"] = "cjepa" if found["loss.vicreg_weight"] else "ijepa"
        found["runtime.memory"] = Config().runtime.memory
    return found
