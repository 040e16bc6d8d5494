"""Write the reference of all settings:  python docs/settings.py > docs/configuration.md"""

from __future__ import annotations

import ast
import inspect
import itertools
import types
from typing import Any, Literal, get_args, get_origin

from cjepa_fast.config import schema
from cjepa_fast.config.presets import PRESETS
from cjepa_fast.config.schema import Config, key_types, keys

_HEAD = """# Settings

Made by `python docs/settings.py`; a test holds this file to the code.

A run starts from a preset (`--preset NAME`), then reads YAML files (`--config FILE`, repeatable), then flags such as
`--optim.lr 1e-4`. Later beats earlier. In YAML a key is written in its section (`optim: {lr: 1e-4}`). A boolean flag
stands alone (`--data.hflip`), is negated (`--data.no-hflip`) or takes a value (`--data.hflip false`).

Settings under `runtime` and `run` never change what is computed, and may change when a run resumes. All others decide
the results, and `--resume RUN` refuses to change them. The defaults are those of C-JEPA's ViT-B/16 on
ImageNet-1k.
"""


def document() -> str:
    """Return the reference as Markdown: one table for each section."""
    helps, types_of, parts = _helps(), key_types(), [_HEAD]
    sections: dict[str, list[str]] = {}
    for key in keys():
        meaning = helps[key].replace("|", "\\|")
        row = f"| `{key}` | {_values(types_of[key])} | {_shown(_default(key))} | {meaning} |"
        sections.setdefault(key.partition(".")[0] if "." in key else "", []).append(row)
    for name, rows in sections.items():
        title = f"`{name}`" if name else "The run"
        head = f"## {title}\n\n| setting | values | default | meaning |\n| --- | --- | --- | --- |\n"
        parts.append(head + "\n".join(rows) + "\n")
    parts.append("## Presets\n\n" + "\n".join(map(_preset, PRESETS)) + "\n")
    return "\n".join(parts)


def _helps() -> dict[str, str]:
    """Return the line of help under each field of the schema, by key."""
    found = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            section = "" if node.name == "Config" else node.name.removesuffix("Config").lower() + "."
            for field, line in itertools.pairwise(node.body):
                if isinstance(field, ast.AnnAssign) and isinstance(line, ast.Expr):
                    found[section + ast.unparse(field.target)] = ast.literal_eval(line.value)
    return found


def _default(key: str) -> Any:
    return schema.get(Config(), key)


def _values(annotation: Any) -> str:
    kind, arguments = get_origin(annotation), get_args(annotation)
    if kind is Literal:
        return ", ".join(map(str, arguments))
    if kind is types.UnionType:
        return f"{_values(arguments[0])} or None"
    if kind is tuple:
        return f"any number of {_values(arguments[0])}s" if arguments[1:] == (...,) else f"{len(arguments)} numbers"
    return {int: "whole number", float: "number", bool: "true, false", str: "text"}.get(annotation, "path")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in value) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _preset(name: str) -> str:
    c = PRESETS[name]
    changed = [key for key in keys() if schema.get(c, key) != _default(key)]
    return f"- `{name}`: " + (", ".join(f"`{key}` {_shown(schema.get(c, key))}" for key in changed) or "the defaults")


if __name__ == "__main__":
    print(document(), end="")
