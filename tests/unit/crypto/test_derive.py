"""HKDF-SHA384, scalars of P-384, and randomness that a seed repeats."""

from __future__ import annotations

import threading

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from swsnp.crypto.derive import P384_ORDER, SeededEntropy, hkdf_sha384, p384_scalar
from swsnp.errors import LayoutError


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ikm=st.binary(max_size=80), salt=st.binary(max_size=200), info=st.binary(max_size=80),
       length=st.integers(1, 400))  # fmt: skip
def test_hkdf_equals_a_foreign_implementation(ikm: bytes, salt: bytes, info: bytes, length: int) -> None:
    """RFC 5869: extract and expand, any lengths."""
    foreign = HKDF(algorithm=hashes.SHA384(), length=length, salt=salt, info=info).derive(ikm)
    assert hkdf_sha384(ikm, salt=salt, info=info, length=length) == foreign


@pytest.mark.parametrize("length", [-1, 255 * 48 + 1])
def test_hkdf_refuses_a_length_it_cannot_give(length: int) -> None:
    """RFC 5869: L is at most 255 times the hash."""
    with pytest.raises(LayoutError, match="length"):
        hkdf_sha384(b"", salt=b"", info=b"", length=length)


def test_hkdf_limits() -> None:
    """RFC 5869: L = 0 and L = 255 hashes are allowed."""
    assert hkdf_sha384(b"k", salt=b"", info=b"", length=0) == b""
    assert len(hkdf_sha384(b"k", salt=b"", info=b"", length=255 * 48)) == 12240


@pytest.mark.parametrize(
    ("material", "scalar"),
    [
        (0, 1),
        (1, 2),
        (P384_ORDER - 2, P384_ORDER - 1),
        (P384_ORDER - 1, 1),
        (P384_ORDER, 2),
    ],
)
def test_scalar_is_mod_n_minus_one_plus_one(material: int, scalar: int) -> None:
    """Derived scalars: 56 bytes little-endian, mod (n-1), plus 1."""
    assert p384_scalar(material.to_bytes(56, "little")) == scalar


def test_scalar_of_all_ones_is_in_range() -> None:
    """Derived scalars lie in 1..n-1 for the largest input too."""
    assert 1 <= p384_scalar(b"\xff" * 56) < P384_ORDER


@pytest.mark.parametrize("size", [0, 48, 55, 57])
def test_scalar_wants_56_bytes(size: int) -> None:
    """Derived scalars: 56 bytes, so that the bias of the reduction is below 2^-64."""
    with pytest.raises(LayoutError, match="56"):
        p384_scalar(bytes(size))


def test_entropy_is_the_documented_stream() -> None:
    """Reproducible randomness: HKDF-SHA384, salt "swsnp/rng/v1", info purpose + counter."""
    entropy = SeededEntropy(b"seed")
    for number in range(3):
        wanted = hkdf_sha384(
            b"seed", salt=b"swsnp/rng/v1", info=number.to_bytes(8, "little"), length=32 + number * 64
        )
        assert entropy(32 + number * 64) == wanted


def test_entropy_repeats_itself_and_differs_by_seed_call_and_purpose() -> None:
    """Reproducible randomness: equal seeds, equal streams; anything else is independent."""
    first, second = SeededEntropy(b"seed"), SeededEntropy(b"seed")
    drawn = [first(32) for _ in range(4)]
    assert drawn == [second(32) for _ in range(4)]
    others = [
        SeededEntropy(b"other")(32),
        SeededEntropy(b"seed").child("a")(32),
        SeededEntropy(b"seed").child("b")(32),
        SeededEntropy(b"seed").child("a").child("b")(32),
        SeededEntropy(b"seed").child("ab")(32),
        SeededEntropy(b"seed").child("b").child("a")(32),
    ]
    assert len({*drawn, *others}) == len(drawn) + len(others)


def test_child_does_not_depend_on_what_the_parent_drew() -> None:
    """Reproducible randomness: a party's stream stays the same when another party draws more."""
    parent = SeededEntropy(b"seed")
    fresh = parent.child("guest")(16)
    parent(16)
    assert parent.child("guest")(16) == fresh


@pytest.mark.parametrize("size", [-1, 12241])
def test_entropy_refuses_sizes_it_cannot_give(size: int) -> None:
    """RFC 5869: one call gives at most 255 hashes."""
    with pytest.raises(LayoutError, match="size"):
        SeededEntropy(b"")(size)


def test_entropy_never_gives_two_threads_the_same_bytes() -> None:
    """Reproducible randomness: the counter is taken under a lock."""
    entropy = SeededEntropy(b"seed")
    drawn: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: drawn.extend([entropy(8) for _ in range(300)])) for _ in range(4)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(set(drawn)) == 1200


def test_entropy_withholds_its_seed() -> None:
    """Secrets are never in a repr."""
    assert "secret-seed" not in repr(SeededEntropy(b"secret-seed"))
