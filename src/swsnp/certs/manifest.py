"""A certificate table taken apart into files, and put together again byte for byte.

The manifest is a JSON document beside the files. It holds what files alone would lose: the order and GUIDs of
entries, where each stands, and every byte that belongs to none.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias
from uuid import UUID

from swsnp.abi.ghcb import CertTableEntry, CertTableGuid
from swsnp.certs.classify import Form, form_of
from swsnp.certs.table import ENTRY_SIZE, canonical_guid, parse
from swsnp.certs.x509_reader import to_der, to_pem
from swsnp.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.certs.table import TableEntry

__all__ = ["MANIFEST", "FileForm", "is_manifest", "put_together", "take_apart"]

FileForm: TypeAlias = Literal["as-is", "der", "pem"]
MANIFEST: Final = "manifest.json"
_SCHEMA: Final = "swsnp certificate table 1"
_LARGEST: Final = 1 << 24
"""Bytes of the largest table that a manifest may ask for."""
_NAMES: Final = {
    CertTableGuid.VCEK: "vcek",
    CertTableGuid.VLEK: "vlek",
    CertTableGuid.ASK: "ask",
    CertTableGuid.ARK: "ark",
    CertTableGuid.CRL: "crl",
}
_AS_IS: Final = "as-is"
_FROM_DER: Final = "pem-of-der"
_FROM_PEM: Final = "der-of-pem"


def take_apart(blob: bytes, form: FileForm = "as-is") -> dict[str, bytes]:
    """The files that hold a table's entries, and the manifest among them.

    Args:
        blob: a table, in any layout that `table.parse` reads.
        form: how certificates and CRLs are written. One that could not be turned back into the same bytes
            stays as it is.

    Returns:
        Content by plain file name: `0-vcek.der`, …, and `manifest.json`.

    Raises:
        LayoutError: no well-formed table.
    """
    entries = parse(blob)
    files: dict[str, bytes] = {}
    listed = []
    for number, entry in enumerate(entries):
        content, encoding, suffix = _written(entry, form)
        name = f"{number}-{_NAMES.get(canonical_guid(entry.guid), str(entry.guid))}.{suffix}"
        files[name] = content
        listed.append(
            {
                "guid": str(entry.guid),
                "offset": entry.offset,
                "length": len(entry.data),
                "file": name,
                "encoding": encoding,
                "sha256": hashlib.sha256(entry.data).hexdigest(),
            }
        )
    manifest = {
        "schema": _SCHEMA,
        "size": len(blob),
        "entries": listed,
        "unclaimed": _unclaimed(blob, entries),
    }
    return {**files, MANIFEST: json.dumps(manifest, indent=2).encode() + b"\n"}


def _written(entry: TableEntry, form: FileForm) -> tuple[bytes, str, str]:
    """Content, encoding and suffix of an entry's file."""
    try:
        found = form_of(entry.data)
    except InputError:
        return entry.data, _AS_IS, "bin"
    if found in (Form.CERTIFICATE, Form.CRL):
        label = "CERTIFICATE" if found is Form.CERTIFICATE else "X509 CRL"
        pem = to_pem(entry.data, label=label)
        return (pem, _FROM_DER, "pem") if form == "pem" else (entry.data, _AS_IS, "der")
    if found is not Form.PEM:
        return entry.data, _AS_IS, "bin"
    for label in ("CERTIFICATE", "X509 CRL"):
        der = _only_der(entry.data, label)
        if form == "der" and der is not None:
            return der, _FROM_PEM, "der"
    return entry.data, _AS_IS, "pem"


def _only_der(pem: bytes, label: str) -> bytes | None:
    """The DER inside, if it alone makes this PEM text again."""
    try:
        blocks = to_der(pem, label=label.encode())
    except InputError:
        return None
    return blocks[0] if to_pem(blocks[0], label=label) == pem else None


def _unclaimed(blob: bytes, entries: tuple[TableEntry, ...]) -> list[dict[str, Any]]:
    """Bytes other than zero that no entry claims, in runs."""
    spans = sorted((each.offset, each.offset + len(each.data)) for each in entries if each.data)
    runs, at = [], ENTRY_SIZE * (len(entries) + 1)
    for start, end in (*spans, (len(blob), len(blob))):
        if any(blob[at:start]):
            runs.append({"offset": at, "hex": blob[at:start].hex()})
        at = end
    return runs


def is_manifest(data: bytes) -> bool:
    """Whether this looks like a manifest."""
    return data.lstrip()[:1] == b"{" and _SCHEMA.encode() in data


def put_together(manifest: bytes, read_file: Callable[[str], bytes]) -> bytes:
    """The table that a manifest describes.

    1. The manifest has its schema, and every field its type.
    2. File names are plain: nothing outside the manifest's folder is read.
    3. Each file, in its encoding, is what it was: same length, same SHA-256.
    4. Numbers fit their fields, and everything stands inside the table.
    5. The result is a table, and has the entries that the manifest lists.

    Args:
        manifest: the document.
        read_file: gives the content of a file beside it.

    Raises:
        InputError: a rule is broken, or a file cannot be read.
        LayoutError: a number does not fit, or the result would be no well-formed table.
    """
    document = _document(manifest)
    size = _field(document, "size", int)
    entries = [_listed(each) for each in _field(document, "entries", list)]
    if not ENTRY_SIZE * (len(entries) + 1) <= size <= _LARGEST:
        raise InputError(
            f"manifest size: got {size}, wanted room for {len(entries)} entries, at most {_LARGEST}"
        )
    blob = bytearray(size)
    for number, (head, entry) in enumerate(entries):
        _put(blob, number * ENTRY_SIZE, bytes(head), f"entry {number}")
        _put(blob, head.offset, _content(entry, number, read_file), f"entry {number}")
    for each in _field(document, "unclaimed", list):
        run = _mapping(each, "unclaimed")
        _put(blob, _field(run, "offset", int), _hex(_field(run, "hex", str)), "unclaimed")
    done = bytes(blob)
    wanted = [(bytes(head.guid), head.offset, head.length) for head, _ in entries]
    if [(each.guid.bytes, each.offset, len(each.data)) for each in parse(done)] != wanted:
        raise InputError("manifest entries: got some that end the table, wanted GUIDs other than zero")
    return done


def _document(manifest: bytes) -> dict[str, Any]:
    try:
        document = _mapping(json.loads(manifest), "document")
    except (ValueError, RecursionError) as error:
        raise InputError(f"manifest: not JSON: {error}") from None
    if document.get("schema") != _SCHEMA:
        raise InputError(f"manifest schema: got {document.get('schema')!r}, wanted {_SCHEMA!r}")
    return document


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"manifest {where}: got {type(value).__name__}, wanted an object")
    return value


def _field(holder: dict[str, Any], name: str, kind: type) -> Any:
    value = holder.get(name)
    if type(value) is not kind:
        raise InputError(f"manifest {name}: got {type(value).__name__}, wanted {kind.__name__}")
    return value


def _listed(value: Any) -> tuple[CertTableEntry, dict[str, Any]]:
    entry = _mapping(value, "entry")
    offset, length = _field(entry, "offset", int), _field(entry, "length", int)
    try:
        guid = UUID(_field(entry, "guid", str))
    except ValueError:
        raise InputError(f"manifest guid: got {entry['guid']!r}, wanted a GUID") from None
    return CertTableEntry(guid=guid.bytes, offset=offset, length=length), entry


def _content(entry: dict[str, Any], number: int, read_file: Callable[[str], bytes]) -> bytes:
    name, encoding = _field(entry, "file", str), _field(entry, "encoding", str)
    if not name or "/" in name or "\0" in name or name.startswith("."):
        raise InputError(f"manifest file: got {name!r}, wanted a plain file name")
    data = read_file(name)
    if encoding == _FROM_DER:
        data = _der_of(data, name)
    elif encoding == _FROM_PEM:
        label = "CERTIFICATE" if form_of(data, name) is Form.CERTIFICATE else "X509 CRL"
        data = to_pem(data, label=label)
    elif encoding != _AS_IS:
        raise InputError(f"manifest encoding: got {encoding!r}, wanted {_AS_IS}, {_FROM_DER} or {_FROM_PEM}")
    got, wanted = hashlib.sha256(data).hexdigest(), _field(entry, "sha256", str)
    if (len(data), got) != (entry["length"], wanted):
        raise InputError(
            f"{name}: got {len(data)} bytes with SHA-256 {got}, wanted {entry['length']} with {wanted} for "
            f"entry {number}; to build a new table, name the files without the manifest"
        )
    return data


def _der_of(pem: bytes, name: str) -> bytes:
    label = b"X509 CRL" if b"-----BEGIN X509 CRL-----" in pem else b"CERTIFICATE"
    blocks = to_der(pem, label=label)
    if len(blocks) != 1:
        raise InputError(f"{name}: got {len(blocks)} PEM blocks, wanted one")
    return blocks[0]


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise InputError(f"manifest hex: got {text[:32]!r}, wanted hexadecimal digits") from None


def _put(blob: bytearray, at: int, data: bytes, where: str) -> None:
    if at < 0 or at + len(data) > len(blob):
        raise InputError(f"manifest {where}: {len(data)} bytes at {at}, wanted inside {len(blob)}")
    blob[at : at + len(data)] = data
