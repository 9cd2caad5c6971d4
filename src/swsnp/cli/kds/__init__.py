"""`swsnp kds`: the key service, mirrored or imitated. One module per sub-verb, imported when it runs."""

from __future__ import annotations

from typing import Final

from swsnp.cli.sub_verbs import SubVerbs

__all__ = ["parser", "run"]

_VERBS: Final = SubVerbs(
    "kds",
    {
        "serve": "imitate AMD's key service for chips of swsnp, on request badly",
        "mirror": "fetch a fleet's certificates, chains and revocation lists ahead",
    },
)
parser, run = _VERBS.parser, _VERBS.run
