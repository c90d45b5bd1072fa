"""What one request may choose.

Offline, in `SamplingParams.extra_args`:

    {"spec_decode": {"enabled": False}}
    {"spec_decode": {"verifier": "lossless"}}
    {"spec_decode": {"num_speculative_tokens": 2}}

Over HTTP, in `vllm_xargs`, which carries no nested objects, the same with dotted keys:

    {"spec_decode.enabled": false, "spec_decode.num_speculative_tokens": 2}

The server says what is allowed (`verifiers_allowed`, `num_speculative_tokens`); anything
else is a `RequestError`, an HTTP 400 for that request alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import Field, ValidationError

from .errors import RequestError, did_you_mean, listed
from .options import PluginOptions

#: The one key of `extra_args` that is ours.
KEY = "spec_decode"


class RequestOptions(PluginOptions):
    """Choices of one request. Absent means what the server is configured for."""

    enabled: bool = Field(True, description="False: this request is decoded without drafts.")
    verifier: str | None = Field(None, description="One of the server's `verifiers_allowed`.")
    num_speculative_tokens: int | None = Field(
        None, ge=0, description="Most tokens drafted per step; at most the server's own number."
    )


#: Requests without options share this one.
DEFAULT = RequestOptions()  # pyright: ignore[reportCallIssue]


def read(
    extra_args: Mapping[str, Any] | None,
    *,
    verifiers_allowed: Collection[str],
    num_speculative_tokens: int,
) -> RequestOptions:
    """Validate a request's choices against what the server allows.

    Args:
        extra_args: `SamplingParams.extra_args`. Keys of others are left alone.
        verifiers_allowed: Names a request may choose.
        num_speculative_tokens: The server's number.

    Raises:
        RequestError: With what is allowed.
    """
    if not extra_args:
        return DEFAULT
    chosen = _gather(extra_args)
    if not chosen:
        return DEFAULT
    try:
        options = RequestOptions.model_validate(chosen)
    except ValidationError as error:
        raise RequestError(f'"{KEY}": {problems(error, RequestOptions)}') from None
    if options.verifier is not None and options.verifier not in verifiers_allowed:
        raise RequestError(
            f'"{KEY}": this server does not allow the verifier "{options.verifier}".'
            f"{did_you_mean(options.verifier, verifiers_allowed)} "
            f"Allowed: {listed(verifiers_allowed)}."
        )
    wanted = options.num_speculative_tokens
    if wanted is not None and wanted > num_speculative_tokens:
        raise RequestError(
            f'"{KEY}": num_speculative_tokens is {wanted}, and this server drafts at most '
            f"{num_speculative_tokens}."
        )
    return options


def _gather(extra_args: Mapping[str, Any]) -> dict[str, Any]:
    """The nested and the dotted spelling as one dictionary."""
    nested = extra_args.get(KEY, {})
    if not isinstance(nested, Mapping):
        raise RequestError(f'"{KEY}" must be an object like {{"enabled": false}}, got {nested!r}.')
    chosen = dict(nested)
    for key, value in extra_args.items():
        if key.startswith(f"{KEY}."):
            name = key.removeprefix(f"{KEY}.")
            if name in chosen:
                raise RequestError(f'"{name}" is given twice, in "{KEY}" and as "{key}".')
            # The HTTP schema has no booleans: they arrive as 0 and 1.
            chosen[name] = bool(value) if name == "enabled" and value in (0, 1) else value
        elif key != KEY and (meant := _meant(key)):
            raise RequestError(f'Unknown key "{key}". Did you mean "{meant}"?')
    return chosen


def _meant(key: str) -> str | None:
    """What a key that is nearly ours should have been; None for keys of others."""
    prefix, dot, name = key.partition(".")
    near = difflib.get_close_matches(prefix, [KEY], n=1, cutoff=0.9)
    return f"{KEY}{dot}{name}" if near else None


def problems(error: ValidationError, options: type[PluginOptions]) -> str:
    """A pydantic error as one sentence per problem, with near names and what is allowed."""
    known = sorted(options.model_fields)
    sentences = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            sentences.append(
                f'unknown option "{where}".{did_you_mean(where, known)} Allowed: {listed(known)}.'
            )
        elif item["type"] == "missing":
            field = options.model_fields.get(where)
            meaning = f" It is: {field.description}" if field and field.description else ""
            sentences.append(f'"{where}" is missing.{meaning}')
        else:
            message = item["msg"][0].lower() + item["msg"][1:]
            sentences.append(f'"{where}": {message}, got {item["input"]!r}.')
    return " ".join(sentences)
