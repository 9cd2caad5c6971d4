"""Layouts: the law that holds for all records, and what the declaration refuses."""

from __future__ import annotations

import importlib
import pkgutil
import random
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import swsnp.abi
from swsnp.abi.record import Record, Word, bits, blob, mbz, record, u8, u16, u32, u64, words
from swsnp.abi.snp_report import GuestPolicy, Product, TcbVersion, product_of_cpu
from swsnp.errors import LayoutError


def _all_records() -> list[type[Record]]:
    found: dict[str, type[Record]] = {}
    for info in pkgutil.iter_modules(swsnp.abi.__path__):
        module = importlib.import_module(f"swsnp.abi.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Record) and value is not Record:
                found[f"{value.__module__}.{value.__name__}"] = value
    return list(found.values())


RECORDS = _all_records()
each_record = pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)


def test_every_document_has_records() -> None:
    """The law below is worth what it covers: every structure of the thread is among the records."""
    names = {kind.__name__ for kind in RECORDS}
    assert {
        "MessageHeader",
        "AttestationReport",
        "Ghcb",
        "SecretsPage",
        "KvmRunPage",
        "ExitCoco",
        "ExitSnpReqCerts",
    } <= names
    assert len(RECORDS) >= 50


@each_record
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**64))
def test_any_bytes_of_the_right_size_survive(kind: type[Record], seed: int) -> None:
    """Law for all records: parse and re-encode give the same bytes, reserved ranges included."""
    raw = random.Random(seed).randbytes(kind.SIZE)
    assert bytes(kind.parse(raw)) == raw
    assert kind.parse(raw) == kind.parse(bytearray(raw)) == kind.parse(memoryview(raw))


@each_record
def test_any_other_size_is_refused_by_name(kind: type[Record]) -> None:
    """Law for all records: one byte less, one more or none at all raise LayoutError with name and sizes."""
    for size in (0, kind.SIZE - 1, kind.SIZE + 1):
        if size == kind.SIZE:
            continue
        with pytest.raises(LayoutError, match=rf"{kind.__name__}: got {size} bytes, wanted {kind.SIZE}"):
            kind.parse(bytes(size))


@pytest.mark.parametrize("free_threaded", [False, True])
@each_record
def test_what_was_read_is_frozen(
    kind: type[Record], free_threaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law for all records: read or made, it is the same class, and nothing in it can be changed.

    Both ways to fill a record do it, whichever this interpreter takes.
    """
    monkeypatch.setattr("swsnp.abi.record._FREE_THREADED", free_threaded)
    for each in RECORDS:  # records inside records, too
        monkeypatch.setattr(each, "_reader", None)
    read = kind.parse(bytes(kind.SIZE))
    assert type(read) is kind
    assert (read, hash(read), repr(read)) == (kind(), hash(kind()), repr(kind()))
    for name, _, _ in kind.layout():
        with pytest.raises(FrozenInstanceError):
            setattr(read, name, 1)


@each_record
def test_fields_cover_the_whole(kind: type[Record]) -> None:
    """Offsets rise without gap or overlap from 0 to the size; the source is named."""
    end = 0
    for name, offset, size in kind.layout():
        assert offset == end, name
        end += size
    assert end == kind.SIZE
    assert kind.SOURCE
    assert bytes(kind()) == bytes(kind.SIZE)


def test_gap_overlap_and_total_fail_when_declared() -> None:
    """A declaration that does not add up cannot be imported."""
    with pytest.raises(LayoutError, match="Gap.second: at 0x8, wanted 0x4"):

        @record(size=16, source="test")
        class Gap(Record):
            first: int = u32(0)
            second: int = u64(8)

    with pytest.raises(LayoutError, match="Overlap.second: at 0x2, wanted 0x4"):

        @record(size=6, source="test")
        class Overlap(Record):
            first: int = u32(0)
            second: int = u32(2)

    with pytest.raises(LayoutError, match="Short: fields end at 0x1, wanted 0x2"):

        @record(size=2, source="test")
        class Short(Record):
            first: int = u8(0)


@record(size=26, source="test")
class Sample(Record):
    """Every kind of field."""

    small: int = u8(0)
    word: int = u16(1)
    tail: bytes = blob(3, 5)
    gap: bytes = mbz(8, 2)
    array: tuple[int, ...] = words(10, 2)


def test_wrong_values_are_named() -> None:
    """A byte string of another length or a number too large never is padded or cut."""
    with pytest.raises(LayoutError, match="Sample.tail: got 4 bytes, wanted 5"):
        Sample(tail=b"1234")
    with pytest.raises(LayoutError, match="Sample.word: got 0x10000, wanted 2 bytes"):
        bytes(Sample(word=1 << 16))
    with pytest.raises(LayoutError, match="Sample.small: got -0x1"):
        bytes(Sample(small=-1))


def test_but_and_array() -> None:
    """`but` copies with changes; arrays read as tuples."""
    sample = Sample(array=(1, 2**64 - 1)).but(small=7)
    assert Sample.parse(bytes(sample)).array == (1, 2**64 - 1)
    assert sample.small == 7
    assert Sample.offset_of("array") == 10


class _Bits(Word):
    low = bits(3, 0)
    high = bits(63, 60)


def test_words_keep_unknown_bits_and_refuse_too_large_values() -> None:
    """A word is an integer with named ranges; bits without a name survive."""
    word = _Bits(0x8000_0000_0000_0F05)
    assert (word.low, word.high, word.unnamed()) == (5, 8, 0xF00)
    assert word.but(low=1) == 0x8000_0000_0000_0F01
    assert repr(_Bits(5)) == "_Bits(0x5)"
    with pytest.raises(LayoutError, match=r"_Bits.low: got 0x10, wanted bits 3:0"):
        _Bits.of(low=16)
    with pytest.raises(LayoutError, match="no range named other"):
        _Bits.of(other=1)


def test_tcb_layouts_differ_by_product() -> None:
    """AMD 56860, TCB_VERSION: bytes of a genuine Turin and a genuine Milan report."""
    turin = TcbVersion.from_bytes(bytes.fromhex("0101010400000051"), "little")
    assert turin.decode(Product.TURIN) == {"fmc": 1, "boot_loader": 1, "tee": 1, "snp": 4, "microcode": 0x51}
    milan = TcbVersion.from_bytes(bytes.fromhex("04000000000018db"), "little")
    assert milan.decode(Product.MILAN) == {"boot_loader": 4, "tee": 0, "snp": 0x18, "microcode": 0xDB}
    assert TcbVersion.encode(Product.MILAN, boot_loader=4, snp=0x18, microcode=0xDB) == milan
    assert milan.reserved(Product.MILAN) == bytes(4)
    with pytest.raises(LayoutError, match="TCB_VERSION.fmc"):
        TcbVersion.encode(Product.MILAN, fmc=1)
    with pytest.raises(LayoutError, match="TCB_VERSION.snp: got 256"):
        TcbVersion.encode(Product.TURIN, snp=256)


def test_tcb_compares_per_component() -> None:
    """A TCB with one lower and one higher component is neither at most nor at least the other."""
    lower = TcbVersion.encode(Product.GENOA, snp=5, microcode=9).decode(Product.GENOA)
    other = TcbVersion.encode(Product.GENOA, snp=6, microcode=8).decode(Product.GENOA)
    assert not lower.at_most(other)
    assert not other.at_most(lower)
    assert lower.at_most(lower)


@pytest.mark.parametrize(
    ("family", "model", "product"),
    [
        (0x19, 0x01, Product.MILAN),
        (0x19, 0x11, Product.GENOA),
        (0x19, 0xA0, Product.GENOA),
        (0x1A, 0x02, Product.TURIN),
        (0x1A, 0x11, Product.TURIN),
        (0x1A, 0x50, None),
        (0x19, 0x20, None),
        (0x17, 0x31, None),
    ],
)
def test_product_of_cpu(family: int, model: int, product: Product | None) -> None:
    """Combined family and model to the product line; unknown ones are unknown, never the nearest."""
    assert product_of_cpu(family, model) is product


def test_policy_words() -> None:
    """Guest policy 30000h: SMT allowed and the bit that must be one."""
    assert GuestPolicy.of(smt=1, reserved_one=1) == 0x30000
    assert GuestPolicy(0xB0000).debug == 1
