"""Write docs/settings.md from service/settings.py: `make settings`."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from pydantic import SecretStr  # noqa: E402

from service.settings import MOST_NUMBER, MOST_WHOLE_NUMBER, PREFIX, Settings  # noqa: E402

SOURCE = PROJECT / "service" / "settings.py"
PAGE = PROJECT / "docs" / "settings.md"
HEAD = f"""# Settings

Made from [service/settings.py](../service/settings.py) by `make settings`: change it there. Each setting is an
environment variable. A mistyped name or a wrong value ends the start with status 2 and one line that says why. A secret
may stand in a file: set the variable with `_FILE` at its end to the file's path.
[Operations](operations.md#settings) lists the settings that matter first.

If a table gives no other limit, a whole number is at most {MOST_WHOLE_NUMBER:,} and any other number at most
{MOST_NUMBER:,.0f}.
"""
MIB = 1024 * 1024


@dataclass(slots=True)
class Group:
    """Settings that stand together in the source, and the comment above them."""

    about: str = ""
    rows: list[tuple[str, str]] = field(default_factory=list)  # a field's name, its comment


def groups(source: str) -> Iterator[Group]:
    """Read the class Settings: blank lines part the groups, comments belong to what follows or stands before them."""
    lines = source.splitlines()
    (settings,) = [
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Settings"
    ]
    fields = [node for node in settings.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    group = Group()
    end = fields[0].lineno - 1
    while lines[end - 1].strip().startswith("#"):
        end -= 1
    for node in fields:
        between = [line.strip() for line in lines[end : node.lineno - 1]]
        if "" in between and group.rows:
            yield group
            group = Group()
        above = " ".join(line.lstrip("# ") for line in between if line.startswith("#"))
        # The source's last line of the field: what follows its code is a comment on it alone.
        code = lines[node.end_lineno - 1][: node.end_col_offset] if node.end_lineno else ""
        beside = lines[(node.end_lineno or node.lineno) - 1][len(code) :].strip().lstrip("# ")
        if above and not group.rows:
            group.about, above = above, ""
        assert isinstance(node.target, ast.Name)
        group.rows.append((node.target.id, " ".join(filter(None, (above, beside)))))
        end = node.end_lineno or node.lineno
    yield group


def default_of(name: str) -> str:
    value = Settings.model_fields[name].default
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    match value:
        case None | "":
            return "none"
        case bool():
            return f"`{str(value).lower()}`"
        case int() if value >= MIB and value % MIB == 0:
            return f"{value // MIB} MiB (`{value}`)"
        case int() | float():
            return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"
        case Path():
            return f"`{value.relative_to(PROJECT) if value.is_absolute() else value}`"
    return f"`{value}`"


def values_of(name: str) -> str:
    """What the setting takes: choices, or a kind and its bounds."""
    known = Settings.model_fields[name]
    kind: Any = known.annotation
    if get_origin(kind) is tuple:
        return "text"
    if get_origin(kind) is not Literal:
        (kind,) = [each for each in get_args(kind) or (kind,) if each is not type(None)]  # of one that may be None
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    words = {
        bool: "`true`, `false`",
        int: "whole number",
        float: "number",
        str: "text",
        Path: "path",
        SecretStr: "secret text",
    }
    bounds = [
        f"{word} {figure(getattr(bound, attribute))}"
        for bound in known.metadata
        for attribute, word in (("ge", "at least"), ("gt", "over"), ("le", "at most"), ("lt", "under"))
        if hasattr(bound, attribute)
    ]
    return ", ".join([words.get(kind, "text"), *bounds])


def figure(bound: float) -> str:
    return f"{bound:g}" if bound < 100_000 else f"{bound:,.0f}"


def page(found: Sequence[Group]) -> str:
    parts = [HEAD]
    for group in found:
        parts.append(f"\n{_marked(group.about)}\n" if group.about else "")
        parts.append("\n| setting | default | values | meaning |\n|---|---|---|---|\n")
        parts += [
            f"| `{PREFIX}{name.upper()}` | {default_of(name)} | {values_of(name)} | {_marked(about)} |\n"
            for name, about in group.rows
        ]
    return "".join(parts)


def _marked(comment: str) -> str:
    """Escape what Markdown would take for a table or a link."""
    return re.sub(r"([|<>\[\]])", r"\\\1", comment)


if __name__ == "__main__":
    PAGE.write_text(page(list(groups(SOURCE.read_text()))))
