"""`vllm-spec list`: what is installed, what it promises, what it can be told. Imports no vLLM."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vllm_spec_plugins.errors import PluginError
from vllm_spec_plugins.options import PluginOptions
from vllm_spec_plugins.registry import Kind, Registry, installed

_COLOURS = {"lossless": "green", "bounded": "yellow", "heuristic": "red"}


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a plugin, as shown to people."""

    name: str
    type: str
    default: Any
    required: bool
    description: str


@dataclass(frozen=True, slots=True)
class Description:
    """One plugin, as shown to people.

    Attributes:
        summary: First line of the class's docstring.
        guarantee: Of a verifier, otherwise None.
        problem: Why it cannot be used; then summary and options are empty.
    """

    name: str
    package: str
    version: str
    value: str
    summary: str = ""
    guarantee: str | None = None
    meaning: str | None = None
    options: list[Option] = field(default_factory=list)
    problem: str | None = None


def run(as_json: bool) -> None:
    """Print every plugin of this environment."""
    described = {kind: describe(kind, installed()) for kind in Kind}
    if as_json:
        plain = {
            f"{kind.name.lower()}s": [asdict(d) for d in found] for kind, found in described.items()
        }
        print(json.dumps(plain, indent=2, default=str))
        return
    console = Console()
    for kind, found in described.items():
        console.print(_table(kind, [d for d in found if d.problem is None]))
    for found in described.values():
        for plugin in found:
            if plugin.problem is not None:
                console.print(
                    f"[yellow]warning:[/yellow] {plugin.problem}", highlight=False, soft_wrap=True
                )
    console.print(
        "Use: [bold]vllm-spec serve MODEL --speculative-config "
        '\'{"method": PROPOSER, "num_speculative_tokens": 5, "verifier": VERIFIER}\'[/bold]',
        highlight=False,
        soft_wrap=True,
    )


def describe(kind: Kind, registry: Registry) -> list[Description]:
    """Every plugin of one kind, the broken ones included."""
    return [_describe(kind, registry, entry.name) for entry in registry.entries(kind)]


def _describe(kind: Kind, registry: Registry, name: str) -> Description:
    entry = registry.get(kind, name)
    origin = (name, entry.distribution, entry.version, entry.value)
    try:
        plugin = registry.load(kind, name)
    except PluginError as error:
        return Description(*origin, problem=str(error))
    summary = (inspect.getdoc(plugin) or "").partition("\n")[0]
    guarantee = getattr(plugin, "guarantee", None) if kind is Kind.VERIFIER else None
    return Description(
        *origin,
        summary=summary,
        guarantee=guarantee.value if guarantee else None,
        meaning=guarantee.meaning if guarantee else None,
        options=options_of(plugin.Options),
    )


def options_of(options: type[PluginOptions]) -> list[Option]:
    """The options of one class, in the order they are declared."""
    return [
        Option(
            name,
            type_text(info),
            None if info.is_required() else info.get_default(call_default_factory=True),  # pyright: ignore[reportCallIssue]
            info.is_required(),
            info.description or "",
        )
        for name, info in options.model_fields.items()
    ]


def type_text(info: FieldInfo) -> str:
    """`integer, 1 to 64` rather than `Annotated[int, Ge(ge=1), Le(le=64)]`."""
    text = _type_text(info.annotation)
    low = high = None
    for item in info.metadata:
        if isinstance(item, annotated_types.Ge):
            low = f"{item.ge}"
        elif isinstance(item, annotated_types.Gt):
            low = f"above {item.gt}"
        elif isinstance(item, annotated_types.Le):
            high = f"{item.le}"
        elif isinstance(item, annotated_types.Lt):
            high = f"below {item.lt}"
    if low and high:
        return f"{text}, {low} to {high}"
    if low:
        return f"{text}, {low}" if low.startswith("above") else f"{text}, at least {low}"
    if high:
        return f"{text}, {high}" if high.startswith("below") else f"{text}, at most {high}"
    return text


_JSON_NAMES = {int: "integer", float: "number", bool: "true or false", str: "string"}


def _type_text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(json.dumps(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _type_text(a) for a in arguments)
    if origin in (list, tuple, set, frozenset):
        inside = [_type_text(a) for a in arguments if a is not ...]
        return f"list of {' or '.join(dict.fromkeys(inside)) or 'anything'}"
    if annotation in _JSON_NAMES:
        return _JSON_NAMES[annotation]
    return getattr(annotation, "__name__", str(annotation))


def _table(kind: Kind, plugins: Iterable[Description]) -> Group:
    title = Text(f"{kind.noun.capitalize()}s", style="bold")
    parts: list[Any] = [title]
    for plugin in plugins:
        line = Text("  ").append(plugin.name, style="bold cyan")
        if plugin.guarantee:
            line.append(f"  {plugin.guarantee}", style=_COLOURS[plugin.guarantee])
            line.append(f": {plugin.meaning}", style="dim")
        line.append(f"  ({plugin.package} {plugin.version})", style="dim")
        parts.append(line)
        if plugin.summary:
            parts.append(Padding(Text(plugin.summary), (0, 0, 0, 4)))
        if plugin.options:
            parts.append(Padding(_options_table(plugin.options), (0, 0, 0, 4)))
    if len(parts) == 1:
        parts.append(Text("  none installed", style="dim"))
    parts.append(Text())
    return Group(*parts)


def _options_table(options: Iterable[Option]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for ratio in (None, None, None, 1):
        table.add_column(ratio=ratio, overflow="fold")
    for option in options:
        default = "required" if option.required else f"= {json.dumps(option.default, default=str)}"
        table.add_row(
            Text(option.name, style="green"),
            Text(default, style="bold red" if option.required else ""),
            Text(option.type, style="dim"),
            option.description,
        )
    return table
