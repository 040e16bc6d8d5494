"""Read a configuration: a preset, then YAML files in order, then flags, all strict and typed alike."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from cjepa_fast.config.presets import PRESETS
from cjepa_fast.config.retired import RETIRED, Value, upgrade
from cjepa_fast.config.rules import validate
from cjepa_fast.config.schema import Config, did_you_mean, differences, key_types, keys, replace
from cjepa_fast.errors import UserError

if TYPE_CHECKING:
    import yaml


@dataclass(frozen=True, kw_only=True)
class Command:
    """The request of a command line: a valid configuration, to check only, to run, or to resume from a run's folder."""

    config: Config
    check: bool
    resume: Path | None


DEFAULT_PRESET = "demo"


@dataclass(frozen=True, kw_only=True)
class _Flags(Config):
    preset: str | None = None
    """Named recipe to start from; demo if none is named."""
    config: tuple[Path, ...] = ()
    """YAML file of settings; repeatable."""
    resume: Path | None = None
    """Folder of the run to continue; its config.yaml takes the preset's place."""
    check: bool = False
    """Check settings and data, print the cost, train nothing."""


_COMMANDS = ("preset", "config", "resume", "check")


def load(argv: Sequence[str]) -> Command:
    """Turn a command line (without the program's name) into a valid configuration.

    Later beats earlier: `--preset NAME` (default "demo"), each `--config FILE`, dotted flags. A file may name
    the preset itself. With `--resume RUN` the base is RUN/config.yaml, and a change of results is refused.

    Prints for `--help` only, which exits with 0. Raises UserError, one line, for everything that is wrong.
    """
    flags = _read_flags([argument for argument in argv if argument not in ("-h", "--help")])
    preset, paths, resume, check = (flags.pop(name, getattr(_Flags(), name)) for name in _COMMANDS)
    files = [(path, *_read_yaml(path)) for path in paths]
    named = [(str(path), name) for path, name, _, _ in files if name is not None]
    if preset is not None:
        named.append(("--preset", preset))
    for source, name in named:
        if resume is not None:
            raise UserError(
                f"{source}: preset {name!r} cannot be combined with --resume, which continues a run as it is"
            )
        if name not in PRESETS:
            raise UserError(
                f"{source}: unknown preset {name!r}" + (did_you_mean(name, PRESETS) or f"; known: {', '.join(PRESETS)}")
            )
        if name != named[0][1]:
            raise UserError(f"{source}: preset {name!r} conflicts with {named[0][1]!r} of {named[0][0]}; name one")

    before = config = _read_run(resume) if resume is not None else PRESETS[named[0][1] if named else DEFAULT_PRESET]
    for path, _, changes, retired in files:
        for key in retired:
            raise UserError(f"{path}: {key} is no longer a setting: {RETIRED[key]}; leave it out")
        config = replace(config, changes)
    config = replace(config, flags)
    if {"-h", "--help"} & set(argv):
        _print_help(config)

    if resume is not None:
        if config.run.dir != resume:
            where = f"--resume {resume}, which goes on in that folder"
            raise UserError(f"run.dir: {config.run.dir} conflicts with {where}; leave it out")
        if changed := differences(before, config):
            raise UserError(
                f"--resume {resume}: results would change, so leave out or start a new run: {'; '.join(changed)}"
            )
    elif not config.data.root and named and named[0][1] != DEFAULT_PRESET:
        raise UserError(f"data.root: not set, but preset {named[0][1]!r} needs images; add --data.root PATH")
    validate(config)
    return Command(config=config, check=check, resume=resume)


# YAML's own guesses are not used: YAML reads 1e-4 as a string, off as False and 12:30 as 750.
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _convert(texts: Any, annotation: Any) -> Any:
    """Return the value that a text, a list of texts or None spells; raises ValueError that says what was expected."""
    kind, arguments = get_origin(annotation), get_args(annotation)
    if kind is types.UnionType:  # X | None
        if texts is None or texts == "None":
            return None
        with contextlib.suppress(ValueError):
            return _convert(texts, arguments[0])
    elif kind is tuple and arguments[1:] == (...,):
        if texts is None or isinstance(texts, str):  # YAML: null is none of them, a text the only one
            texts = [] if texts is None else [texts]
        with contextlib.suppress(ValueError):
            return tuple(_convert(text, arguments[0]) for text in texts)
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
        return f"{_describe(arguments[0])} or several" if arguments[1:] == (...,) else f"{len(arguments)} numbers"
    if kind is Literal:
        return f"one of {', '.join(arguments)}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return names[annotation]


def _read_run(run: Path) -> Config:
    """Return the configuration of a run to resume; every key must be there, so that a torn file cannot pass."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"--resume {run}: no config.yaml there; give the folder of a run")
    _, changes, retired = _read_yaml(path)
    try:
        changes = upgrade(changes, retired)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    missing = [key for key in keys() if key not in changes]
    if missing:
        raise UserError(f"{path}: lacks '{missing[0]}'; the file is incomplete or of another version, add the key")
    return replace(Config(), changes | {"run.dir": run})


def _read_yaml(path: Path) -> tuple[str | None, dict[str, Any], dict[str, Value]]:
    """Return the preset that a file names, if any, the dotted keys it sets, typed, and retired keys as text."""
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

    annotations = {"preset": str} | key_types()
    sections = {key.partition(".")[0] for key in annotations if "." in key}
    changes: dict[str, Any] = {}
    retired: dict[str, Value] = {}
    for name, node in _entries(root, path, "", annotations) if root else ():
        leaves = _entries(node, path, f"{name}.", annotations) if name in sections else [(name, node)]
        for key, value in leaves:
            if key in RETIRED:
                retired[key] = _texts(value, path, key, "a value")
            else:
                changes[key] = _value(value, path, key, annotations[key])
    return changes.pop("preset", None), changes, retired


def _entries(node: yaml.Node, path: Path, prefix: str, known: Iterable[str]) -> Iterator[tuple[str, yaml.Node]]:
    """Yield (dotted key, node) of a mapping; each key must be known and occur once."""
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
        if name not in here and name in known:
            section, _, leaf = name.partition(".")
            raise _error(path, key, f"{name!r} is written as a section; put '{leaf}: ...' under '{section}:'")
        if name not in here and name not in RETIRED:
            raise _error(path, key, f"unknown key {name!r}{did_you_mean(name, (*sorted(here), *known))}")
        if name in lines:
            raise _error(path, key, f"{name!r} is set again, first on line {lines[name]}; keep one")
        lines[name] = key.start_mark.line + 1
        yield name, value


def _value(node: yaml.Node, path: Path, key: str, annotation: Any) -> Any:
    value = _texts(node, path, key, _describe(annotation))
    try:
        return _convert(value, annotation)
    except ValueError as expected:
        shown = "null" if value is None else repr(value)
        raise _error(path, node, f"{key}: expected {expected}, got {shown}") from None


def _texts(node: yaml.Node, path: Path, key: str, expected: str) -> Value:
    """Return the text of a scalar, the texts of a flat sequence, or None for null."""
    import yaml

    _check_tag(node, path, key)
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for item in items:
        _check_tag(item, path, key)
        if not isinstance(item, yaml.ScalarNode):
            raise _error(path, item, f"{key}: expected {expected}, got something nested")
    texts = [None if item.tag.endswith(":null") else item.value for item in items]
    return texts if items is node.value else texts[0]


_TAGS = ("map", "seq", "null", "bool", "int", "float", "str", "timestamp", "value", "merge")


def _check_tag(node: yaml.Node, path: Path, key: str) -> None:
    """Refuse tags such as !!python/object; `yaml.compose` would not run them either."""
    if node.tag.removeprefix("tag:yaml.org,2002:") not in _TAGS:
        raise _error(path, node, f"{key}: tag {node.tag!r} is not allowed; write a plain value")


def _error(path: Path, node: yaml.Node, message: str) -> UserError:
    return UserError(f"{path}:{node.start_mark.line + 1}: {message}")


@functools.cache
def _flag_annotations() -> dict[str, Any]:
    """Return the annotation behind every flag, without dashes: `{"model.encoder": str, ..., "check": bool}`."""
    found = key_types() | {name: get_type_hints(_Flags)[name] for name in _COMMANDS}
    return {name.replace("_", "-"): annotation for name, annotation in found.items()}


def _read_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Return the typed value of every flag by key; the last of a repeated flag counts, but every `--config`."""
    annotations = _flag_annotations()
    found: dict[str, Any] = {}
    for flag, values in _flag_groups(argv):
        key, annotation = flag.replace("-", "_"), annotations.get(flag)
        positive = flag.replace("no-", "", 1)
        if annotation is None and annotations.get(positive) is bool:
            if values:
                raise UserError(f"--{flag}: only switches off, without a value; write --{positive} VALUE")
            found[positive.replace("-", "_")] = False
            continue
        if annotation is None:
            if hint := RETIRED.get(key) or RETIRED.get(positive.replace("-", "_")):
                raise UserError(f"--{flag} is no longer a setting: {hint}; leave it out")
            raise UserError(f"unknown flag --{flag}{did_you_mean(flag, [*annotations, 'help'], '--{}')}")
        if annotation is bool and not values:
            values = ["true"]
        try:
            if not values:
                raise ValueError(_describe(annotation))
            lone = len(values) == 1 and get_origin(annotation) is not tuple
            value = _convert(values[0] if lone else values, annotation)
        except ValueError as expected:
            shown = repr(" ".join(values)) if values else "nothing"
            raise UserError(f"--{flag}: expected {expected}, got {shown}") from None
        found[key] = (*found.get("config", ()), *value) if key == "config" else value
    return found


def _flag_groups(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return each flag, without dashes and with hyphens for underscores, and the values behind it."""
    groups: list[tuple[str, list[str]]] = []
    for argument in argv:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            groups.append((name.replace("_", "-"), [value] if equals else []))
        elif groups:
            groups[-1][1].append(argument)
        else:
            raise UserError(f"unexpected argument {argument!r}; flags look like --optim.lr 0.001")
    return groups


def _print_help(config: Config) -> None:
    """Print every flag with its help and its value in `config` (drawn by tyro), and exit with 0."""
    import tyro

    tyro.cli(
        _Flags,
        prog="python -m cjepa_fast.train",
        description=f"Pretrain a vision transformer with C-JEPA. Presets: {', '.join(PRESETS)}.",
        args=["--help"],
        default=_Flags(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Config)}),
    )
