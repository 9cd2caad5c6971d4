"""Tables taken apart and put together again: byte for byte, whoever wrote them."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swsnp.abi.ghcb import CertTableGuid
from swsnp.certs.manifest import MANIFEST, FileForm, is_manifest, put_together, take_apart
from swsnp.certs.table import TableEntry, pack
from swsnp.certs.x509_reader import to_pem
from swsnp.errors import InputError, LayoutError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.certs.conftest import Authority

OTHER = UUID("9f4116cd-c503-4f5a-8f6f-fb68882f4ce2")
FORMS: tuple[FileForm, ...] = ("as-is", "der", "pem")


def again(files: dict[str, bytes]) -> bytes:
    return put_together(files[MANIFEST], files.__getitem__)


def foreign(milan: Authority) -> bytes:
    """What a table may do: order, gaps, a tail, strange GUIDs, PEM with text, an empty entry."""
    heads = (
        (OTHER, 0x100, 5),
        (UUID(bytes=CertTableGuid.ARK.bytes_le), 0x2000, len(milan.hierarchy.ark)),
        (CertTableGuid.VCEK, 0x200, len(milan.vcek)),
        (CertTableGuid.CRL, 0x1000, 0),
        (CertTableGuid.ASK, 0x1100, len(b"text\n" + to_pem(milan.hierarchy.ask))),
        (CertTableGuid.VLEK, 0x2800, len(to_pem(milan.vlek))),
    )
    blob = bytearray(0x4000)
    for number, (guid, offset, length) in enumerate(heads):
        blob[24 * number : 24 * number + 24] = guid.bytes + struct.pack("<II", offset, length)
    data = (
        b"other",
        milan.hierarchy.ark,
        milan.vcek,
        b"",
        b"text\n" + to_pem(milan.hierarchy.ask),
        to_pem(milan.vlek),
    )
    for (_, offset, _), content in zip(heads, data, strict=True):
        blob[offset : offset + len(content)] = content
    blob[0xF0:0xF4] = b"gap!"
    blob[0x3FF0:] = b"tail" * 4
    return bytes(blob)


@pytest.mark.parametrize("form", FORMS)
def test_foreign_tables_come_out_as_they_were(form: FileForm, milan: Authority) -> None:
    """Layout, unknown entries and bytes of no entry included, in each form of files."""
    blob = foreign(milan)
    files = take_apart(blob, form)
    assert again(files) == blob
    suffixes = {
        "as-is": ("bin", "der", "der", "bin", "pem", "pem"),
        "der": ("bin", "der", "der", "bin", "pem", "der"),
        "pem": ("bin", "pem", "pem", "bin", "pem", "pem"),
    }[form]
    names = (str(OTHER), "ark", "vcek", "crl", "ask", "vlek")
    wanted = [f"{n}-{name}.{suffix}" for n, (name, suffix) in enumerate(zip(names, suffixes, strict=True))]
    assert [name for name in files if name != MANIFEST] == wanted
    # text around PEM would be lost in DER, so that file stays PEM
    assert files["4-ask.pem"].startswith(b"text\n") is True
    if form != "as-is":
        assert files[f"5-vlek.{suffixes[5]}"] == (milan.vlek if form == "der" else to_pem(milan.vlek))


@pytest.mark.parametrize("form", FORMS)
def test_crls_too(form: FileForm, milan: Authority) -> None:
    """A CRL has its own PEM label."""
    pem = to_pem(milan.crl, label="X509 CRL")
    for data in (milan.crl, pem):
        blob = pack([TableEntry(guid=CertTableGuid.CRL, data=data)])
        files = take_apart(blob, form)
        assert again(files) == blob
        (content,) = (value for name, value in files.items() if name != MANIFEST)
        assert content == {"as-is": data, "der": milan.crl, "pem": pem}[form]


def test_entries_that_are_no_certificates_stay_as_they_are() -> None:
    """A table inside a table, for one."""
    blob = pack([TableEntry(guid=CertTableGuid.ASK, data=bytes(24))])
    for form in FORMS:
        files = take_apart(blob, form)
        assert files["0-ask.bin"] == bytes(24)
        assert again(files) == blob


def test_a_manifest_is_told_by_content(milan: Authority) -> None:
    """Only a JSON object with the schema's name is one."""
    assert is_manifest(take_apart(bytes(24))[MANIFEST])
    for data in (b"", b"{}", b"swsnp certificate table 1", milan.vcek):
        assert not is_manifest(data)


def test_no_table_no_files() -> None:
    """What `table.parse` refuses is not taken apart."""
    with pytest.raises(LayoutError, match="no terminator"):
        take_apart(b"x" * 24)


def test_a_changed_file_is_refused(milan: Authority) -> None:
    """The manifest promises the same bytes: a file that was exchanged needs a new table."""
    files = take_apart(foreign(milan), "pem")
    for name, other, text in (
        ("2-vcek.pem", to_pem(milan.vlek), "2-vcek.pem: got .* wanted .* for entry 2; to build a new table"),
        ("0-9f4116cd-c503-4f5a-8f6f-fb68882f4ce2.bin", b"OTHER", "got 5 bytes with SHA-256"),
        ("2-vcek.pem", to_pem(milan.vcek) * 2, "got 2 PEM blocks, wanted one"),
    ):
        spoiled = {**files, name: other}
        with pytest.raises(InputError, match=text) as caught:
            put_together(files[MANIFEST], spoiled.__getitem__)
        assert caught.value


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update(schema="other"), "manifest schema: got 'other', wanted"),
        (lambda m: m.update(size="9"), "manifest size: got str, wanted int"),
        (lambda m: m.update(size=True), "manifest size: got bool, wanted int"),
        (lambda m: m.update(size=23), "manifest size: got 23, wanted room for 1 entries"),
        (lambda m: m.update(size=1 << 25), "manifest size: got 33554432"),
        (lambda m: m.update(entries={}), "manifest entries: got dict, wanted list"),
        (lambda m: m.update(entries=[1]), "manifest entry: got int, wanted an object"),
        (lambda m: m["entries"][0].update(guid="x"), "manifest guid: got 'x', wanted a GUID"),
        (lambda m: m["entries"][0].update(offset=-1), "CertTableEntry.offset: got -0x1"),
        (lambda m: m["entries"][0].update(offset=1 << 30), "entry 0: 4 bytes at 1073741824"),
        (lambda m: m["entries"][0].update(length=1 << 30), "got 4 bytes .* wanted 1073741824 with"),
        (lambda m: m["entries"][0].update(offset=51), "manifest entry 0: 4 bytes at 51, wanted inside 54"),
        (lambda m: m["entries"][0].update(offset=47), "no terminator"),
        (
            lambda m: m["entries"][0].update(file="../x"),
            "manifest file: got '../x', wanted a plain file name",
        ),
        (lambda m: m["entries"][0].update(file=".x"), "wanted a plain file name"),
        (lambda m: m["entries"][0].update(file="a/b"), "wanted a plain file name"),
        (lambda m: m["entries"][0].update(file=""), "wanted a plain file name"),
        (lambda m: m["entries"][0].update(file="x\0"), "wanted a plain file name"),
        (lambda m: m["entries"][0].update(encoding="gzip"), "manifest encoding: got 'gzip'"),
        (lambda m: m["entries"][0].update(encoding="der-of-pem"), "got 4 bytes that begin with"),
        (lambda m: m["entries"][0].update(sha256="00"), "got 4 bytes with SHA-256 .* wanted 4 with 00"),
        (lambda m: m["entries"][0].update(length=3), "wanted 3 with"),
        (lambda m: m.update(unclaimed=[{"offset": 52, "hex": "zz"}]), "manifest hex: got 'zz'"),
        (lambda m: m.update(unclaimed=[{"offset": 53, "hex": "0102"}]), "unclaimed: 2 bytes at 53"),
        (lambda m: m.update(unclaimed=[{"offset": -1, "hex": "01"}]), "unclaimed: 1 bytes at -1"),
        (lambda m: m.update(unclaimed=[7]), "manifest unclaimed: got int, wanted an object"),
        (lambda m: m.update(unclaimed=[{"offset": 24, "hex": "01"}]), "no terminator|zero GUID|zeros"),
        (
            lambda m: (m["entries"][0].update(guid=str(UUID(int=0))), m.update(unclaimed=[])),
            "zero GUID with offset",
        ),
    ],
)
def test_broken_manifests(change: Callable[[dict[str, Any]], object], text: str) -> None:
    """Each field has its type and bounds, and no file outside the folder is ever read."""
    files = take_apart(pack([TableEntry(guid=OTHER, data=b"data")]) + b"\1\2")
    document = json.loads(files[MANIFEST])
    change(document)
    name = "0-9f4116cd-c503-4f5a-8f6f-fb68882f4ce2.bin"
    with pytest.raises((InputError, LayoutError), match=text):
        put_together(json.dumps(document).encode(), {name: files[name]}.__getitem__)


def test_the_largest_table() -> None:
    """16 MiB, far above what a guest can receive, and not a byte more."""
    document = json.loads(take_apart(bytes(24))[MANIFEST])
    for size, good in ((1 << 24, True), ((1 << 24) + 1, False)):
        document["size"] = size
        manifest = json.dumps(document).encode()
        if good:
            assert len(put_together(manifest, {"": b""}.__getitem__)) == size
        else:
            with pytest.raises(InputError, match="manifest size: got 16777217"):
                put_together(manifest, {"": b""}.__getitem__)


def test_an_entry_that_ends_the_table() -> None:
    """A zero GUID with zeros would hide the entries after it."""
    files = take_apart(pack([TableEntry(guid=OTHER, data=b"")]))
    document = json.loads(files[MANIFEST])
    document["entries"][0].update(guid=str(UUID(int=0)), offset=0)
    with pytest.raises(InputError, match="some that end the table"):
        put_together(json.dumps(document).encode(), files.__getitem__)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"7", b"[" * 100000])
def test_no_document(data: bytes) -> None:
    """JSON, and an object."""
    with pytest.raises(InputError, match="manifest"):
        put_together(data, lambda name: name.encode())


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.data())
def test_round_trip(data: st.DataObject) -> None:
    """Any well-formed table, with any bytes between and after its entries."""
    parts = data.draw(st.lists(st.binary(max_size=30), max_size=5))
    gaps = data.draw(st.lists(st.binary(max_size=5), min_size=len(parts), max_size=len(parts)))
    order = data.draw(st.permutations(range(len(parts))))
    at, body, offsets = 24 * (len(parts) + 1), b"", {}
    for number in order:
        offsets[number] = at + len(body) + len(gaps[number])
        body += gaps[number] + parts[number]
    heads = b"".join(
        UUID(int=n + 1).bytes + struct.pack("<II", offsets[n], len(parts[n])) for n in range(len(parts))
    )
    blob = heads + bytes(24) + body + data.draw(st.binary(max_size=9))
    for form in FORMS:
        assert again(take_apart(blob, form)) == blob
