"""The settings of a run: `schema` declares them, `rules` checks them, `cli` reads them, `presets` names recipes."""

from cjepa_fast.config.rules import memory_plan, validate, validate_world
from cjepa_fast.config.schema import (
    ENCODERS,
    Config,
    DataConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    RuntimeConfig,
    VitShape,
    did_you_mean,
    differences,
    encoder_shape,
    get,
    key_types,
    keys,
    replace,
    to_yaml,
)
from cjepa_fast.config.world import World, read_world, shard_size
