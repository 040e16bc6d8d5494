"""The processes of a run, as torchrun starts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cjepa_fast.config.schema import Config
from cjepa_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those of the launcher."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes of this node; all of them where the launcher does not say."""


def shard_size(config: Config, world: World) -> int:
    """Return the number of consecutive ranks that share one copy of the state; by default those of a node."""
    if config.runtime.shard_size is not None:
        return config.runtime.shard_size
    # Groups of this size do not fit nodes of different sizes, which torchrun allows.
    return world.local_size if world.size % world.local_size == 0 else world.size


def read_world(environ: Mapping[str, str]) -> World:
    """Read this process's place from torchrun's variables; without them it is a lone process.

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
