"""`swsnp certs`: certificates for operators. One module per sub-verb, imported when it runs."""

from __future__ import annotations

from typing import Final

from swsnp.cli.sub_verbs import SubVerbs

__all__ = ["parser", "run"]

_VERBS: Final = SubVerbs(
    "certs",
    {
        "check": "say what is wrong with a certificate table, by numbered rules",
        "pack": "build a certificate table and replace a VMM's blob with it",
        "unpack": "take a certificate table apart into files",
        "fetch": "get a chip's certificates from the key service, as files or as a blob",
        "make": "make an emulated hierarchy and a blob of it",
        "show": "explain certificates, CRLs and certificate tables",
    },
)
parser, run = _VERBS.parser, _VERBS.run
