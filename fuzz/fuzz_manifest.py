"""Manifests: a table with the entries listed, InputError or LayoutError; tables come back byte for byte."""

from __future__ import annotations

from functools import partial
from uuid import UUID

from fuzz.outcome import attempt
from swsnp.abi.ghcb import CertTableGuid
from swsnp.certs.manifest import MANIFEST, FileForm, is_manifest, put_together, take_apart
from swsnp.certs.table import TableEntry, pack, parse
from swsnp.errors import InputError, LayoutError

__all__ = ["one", "seeds"]

SMALL = pack([TableEntry(guid=UUID(int=7), data=b"data"), TableEntry(guid=CertTableGuid.CRL, data=b"")])
FORMS: tuple[FileForm, ...] = ("as-is", "der", "pem")


def seeds() -> list[bytes]:
    """Manifests and tables."""
    blobs = [SMALL, SMALL + b"\1tail", bytes(24)]
    return [*blobs, *(take_apart(blob)[MANIFEST] for blob in blobs)]


def one(data: bytes) -> object:
    """As a table: apart and together again. As a manifest: what it says, from files of four bytes."""
    entries, no_table = attempt(lambda: parse(data), LayoutError)
    if not no_table:
        for form in FORMS:
            files = take_apart(data, form)
            assert is_manifest(files[MANIFEST])
            assert put_together(files[MANIFEST], files.__getitem__) == data
    files = {"0-00000000-0000-0000-0000-000000000007.bin": b"data"}
    made, refusal = attempt(
        partial(put_together, data, lambda name: files.get(name, b"")), InputError, LayoutError
    )
    if not refusal:
        parse(made)
    return no_table or len(entries), refusal
