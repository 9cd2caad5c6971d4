"""Certificates made to measure: the parts of good ones, changed, under a good signature."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from Crypto.Hash import SHA384
from Crypto.Signature import pss

from swsnp.amd_ca import assemble
from swsnp.certs.x509_reader import read

if TYPE_CHECKING:
    from tests.unit.verify.conftest import Bench

    from swsnp.certs.x509_reader import Extension


def parts_of(der: bytes, **changes: Any) -> assemble.Tbs:
    """What a certificate was made of."""
    made = read(der)
    tbs = assemble.Tbs(
        serial=made.serial,
        algorithm=assemble.PSS_EXPLICIT,
        issuer=made.issuer,
        subject=made.subject,
        not_before=made.not_before,
        not_after=made.not_after,
        spki=made.spki,
        extensions=tuple(map(part_of, made.extensions)),
    )
    return replace(tbs, **changes)


def part_of(extension: Extension, *, critical: bool = False) -> bytes:
    """An extension as it stands in a certificate; `critical` makes it so whatever it was."""
    return assemble._extension(extension.oid, extension.value, critical=critical or extension.critical)


def sign(
    bench: Bench, issuer: str, tbs: assemble.Tbs, *, outer: bytes | None = None, salt: int = 48
) -> bytes:
    """A certificate made to measure, with a good signature of the named CA."""
    key = getattr(bench.hierarchy, f"_{issuer}").key
    body = assemble.tbs_certificate(tbs)
    signature = pss.new(key, salt_bytes=salt).sign(SHA384.new(body))
    return assemble.signed(body, tbs.algorithm if outer is None else outer, signature)
