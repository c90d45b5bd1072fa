"""Fills `<!-- options of ... -->` in a page with the options of the installed plugins."""

from __future__ import annotations

import json
import re
from typing import Any

from vllm_spec_plugins.cli.listing import Description, describe
from vllm_spec_plugins.registry import Kind, installed

_MARKER = re.compile(r"<!-- options of (proposers|verifiers|length controllers) -->")
_KINDS = {
    "proposers": Kind.PROPOSER,
    "verifiers": Kind.VERIFIER,
    "length controllers": Kind.LENGTH_CONTROLLER,
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return _MARKER.sub(lambda found: _section(_KINDS[found.group(1)]), markdown)


def _section(kind: Kind) -> str:
    plugins = [p for p in describe(kind, installed()) if p.package == "vllm-spec-plugins"]
    return "\n".join(_plugin(plugin) for plugin in plugins)


def _plugin(plugin: Description) -> str:
    lines = [f"### `{plugin.name}`", "", plugin.summary, ""]
    if plugin.guarantee:
        lines += [f"Guarantee: **{plugin.guarantee}**, {plugin.meaning}.", ""]
    if plugin.options:
        lines += ["| option | default | type | |", "|---|---|---|---|"]
    for option in plugin.options:
        default = "required" if option.required else f"`{json.dumps(option.default, default=str)}`"
        cells = (f"`{option.name}`", default, option.type, option.description)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])
