"""Policy files, in JSON or TOML, and the JSON Schema that describes both.

Source: RFC 8259; TOML 1.0; JSON Schema 2020-12. Keys and forms are those of `policy.Policy`.
"""

from __future__ import annotations

import json
import tomllib
from typing import Any, Final

from swsnp.errors import InputError
from swsnp.verify.policy import Policy, entries
from swsnp.verify.policy_forms import Wrong

__all__ = ["MAXIMUM_SIZE", "policy_schema", "read_policy"]

MAXIMUM_SIZE: Final = 1 << 20
"""Bytes of a policy file; a longer one is no policy."""
_SCHEMA_KEY: Final = "$schema"
_ENTRIES: Final = {each.name: each for each in entries()}


def read_policy(data: bytes, name: str) -> Policy:
    """Read a policy file.

    Args:
        data: UTF-8 text: JSON when it begins with a brace, TOML otherwise.
        name: of the file, for error texts.

    Raises:
        InputError: no UTF-8, neither JSON nor TOML, a key that is unknown or stands twice, or a value of
            another type, size or range than its key has; the text says key, got and wanted.
    """
    if len(data) > MAXIMUM_SIZE:
        raise InputError(f"{name}: got {len(data)} bytes, wanted at most {MAXIMUM_SIZE} (docs/policy.md)")
    values = _table(data, name)
    if not isinstance(values.pop(_SCHEMA_KEY, ""), str):
        raise InputError(f"{name}: {_SCHEMA_KEY}: wanted a text (docs/policy.md)")
    read = {}
    for key, value in values.items():
        if key not in _ENTRIES:
            raise InputError(f"{name}: key {key!r} is unknown, wanted one of docs/policy.md")
        try:
            read[key] = _ENTRIES[key].form.read(value)
        except Wrong as wrong:
            raise InputError(f"{name}: {key}{wrong.key}: {wrong} (docs/policy.md)") from None
    return Policy(**read)


def _table(data: bytes, name: str) -> dict[str, Any]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: byte {error.start}: {error.reason}, wanted UTF-8 text") from None
    try:
        return _json(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        form = "JSON" if text.lstrip().startswith("{") else "TOML"
        raise InputError(f"{name}: {error}, wanted a policy in {form}") from None


def _json(text: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [key for key, _ in pairs]
            raise ValueError(f"key {next(key for key in names if names.count(key) > 1)!r} stands twice")
        return found

    read: dict[str, Any] = json.loads(text, object_pairs_hook=once)  # the text begins with a brace
    return read


def policy_schema() -> dict[str, Any]:
    """The JSON Schema of a policy file; `policy.schema.json` beside this module is its text."""
    properties: dict[str, Any] = {_SCHEMA_KEY: {"type": "string"}}
    properties |= {each.name: each.form.schema() for each in entries()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "swsnp verification policy",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }
