"""How a configuration is read: a preset, then YAML files in order, then flags, all strict and typed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import re
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from cjepa_fast.config import Config, did_you_mean, differences, key_types, keys, replace, validate
from cjepa_fast.errors import UserError

if TYPE_CHECKING:
    import yaml


@dataclass(frozen=True, kw_only=True)
class Command:
    """What the command line asks for: a valid configuration, and whether to check only or to resume a run."""

    config: Config
    check: bool
    resume: Path | None


DEFAULT_PRESET = "demo"


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
    from cjepa_fast.config.presets import PRESETS

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
                f"{source}: unknown preset {name!r}" + (did_you_mean(name, PRESETS) or f"; known: {', '.join(PRESETS)}")
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
    elif not config.data.root and named and named[0][1] != DEFAULT_PRESET:
        raise UserError(f"data.root: not set, but preset {named[0][1]!r} needs images; add --data.root PATH")
    validate(config)
    return Command(config=config, check=flags.check, resume=flags.resume)


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

    annotations = {"preset": str} | key_types()
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
        if name not in here and name in known:
            section, _, leaf = name.partition(".")
            raise _error(path, key, f"{name!r} is written as a section; put '{leaf}: ...' under '{section}:'")
        if name not in here:
            raise _error(path, key, f"unknown key {name!r}{did_you_mean(name, (*sorted(here), *known))}")
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
    found = key_types() | {name: get_type_hints(_Flags)[name] for name in _Flags.__annotations__}
    return {name.replace("_", "-"): annotation for name, annotation in found.items()}


def _parse_flags(argv: Sequence[str], base: Config) -> _Flags:
    """`base` with the flags on top; where tyro would draw a box, raises UserError with one line."""
    import tyro

    from cjepa_fast.config.presets import PRESETS

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                _Flags,
                prog="python -m cjepa_fast.train",
                description=f"Pretrain a vision transformer with C-JEPA. Presets: {', '.join(PRESETS)}.",
                args=_join_lists(argv),
                default=_Flags(**{f.name: getattr(base, f.name) for f in dataclasses.fields(Config)}),
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    _check_flag_values(argv)
    # what this module reads as right and tyro as wrong is still told in one line, in tyro's words
    raise UserError(re.sub(r"[\s\u2500-\u257f]+", " ", complaint.getvalue()).strip())


def _join_lists(argv: Sequence[str]) -> list[str]:
    """`--config a --config b` as `--config a b`; of other repeated flags the last one counts."""
    rest: list[str] = []
    lists: dict[str, list[str]] = {}
    into = rest
    for argument in argv:
        flag, equals, value = argument[2:].partition("=")
        flag = flag.replace("_", "-")
        if argument.startswith("--") and get_args(_flag_annotations().get(flag))[1:] == (...,):
            into = lists[flag] = lists.get(flag, []) if flag == "config" else []
            into += [value] if equals else []
        else:
            into = rest if argument.startswith("-") else into
            into.append(argument)
    for flag, values in lists.items():
        if not values:
            raise UserError(f"--{flag}: expected {_describe(_flag_annotations()[flag])}, got nothing")
    return [*rest, *(argument for flag, values in lists.items() for argument in (f"--{flag}", *values))]


def _check_flag_names(argv: Sequence[str]) -> None:
    known = [*_flag_annotations(), "help"]
    negations = {_negated(flag) for flag, annotation in _flag_annotations().items() if annotation is bool}
    for flag, _ in _flag_groups(argv):
        if flag not in known and flag not in negations:
            raise UserError(f"unknown flag --{flag}{did_you_mean(flag, known, '--{}')}")


def _check_flag_values(argv: Sequence[str]) -> None:
    for flag, values in _flag_groups(argv):
        annotation = _flag_annotations().get(flag, bool)
        if annotation is bool:
            if values:
                remedy = f"write --{flag} or --{_negated(flag)}" if flag in _flag_annotations() else "leave it out"
                raise UserError(f"--{flag}: takes no value, got {values[0]!r}; {remedy}")
            continue
        try:
            _convert(values[0] if len(values) == 1 and get_origin(annotation) is not tuple else values, annotation)
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
