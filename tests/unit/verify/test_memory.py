"""What a verifier remembers, and what follows from templates. Source: docs/adr/0010, docs/adr/0014."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from tests.unit.verify.judging import check, failed

from swsnp.abi.snp_report import Product
from swsnp.certs import kds_extensions
from swsnp.certs.x509_reader import read
from swsnp.crypto.ecdsa import SigningKey
from swsnp.verify import chain
from swsnp.verify.memory import Memory
from swsnp.verify.shared_checks import known_shared

if TYPE_CHECKING:
    from tests.unit.verify.conftest import Bench


@pytest.mark.parametrize("size", [0, 1, 3])
def test_the_latest_answers_are_kept(size: int) -> None:
    """As many as were asked for, none of those before; an answer may be false."""
    memory: Memory[int, bool] = Memory(size)
    for number in range(5):
        memory.keep(number, number % 2 == 1)
        memory.keep(number, number % 2 == 1)
    assert len(memory) == size
    wanted = {number: number % 2 == 1 for number in range(5 - size, 5)}
    assert {number: memory.get(number) for number in wanted} == wanted
    assert all(memory.get(number) is None for number in range(5 - size))


def test_many_threads_keep_no_more() -> None:
    """The bound holds for threads too."""
    memory: Memory[int, int] = Memory(7)

    def run(number: int) -> None:
        memory.keep(number, number)
        assert memory.get(number) in (None, number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(2000)))
    assert len(memory) == 7


def test_templates_are_judged_for_their_product(milan: Bench) -> None:
    """C2. What is remembered of a chain's templates is found again by the report's product, too."""
    leaf, ask, ark = (read(each).template for each in milan.certificates)
    for _ in range(2):
        assert known_shared(leaf, ask, ark, Product.MILAN) == ()
        assert [each.check for each in known_shared(leaf, ask, ark, Product.GENOA)] == ["C2"]
        assert [each.field for each in known_shared(leaf, ark, ark, Product.MILAN)][1:2] == ["CA"]


def test_siblings_are_judged_once(milan: Bench) -> None:
    """ADR 0013: of another chip's leaf, only what is its own is looked at; a spoiled one is refused still."""
    assert check(milan).authenticated
    key = SigningKey.from_scalar(77)
    other = milan.hierarchy.vcek(*key.public_point, bytes(64), milan.tcb)
    spoiled = other[:-1] + bytes((other[-1] ^ 1,))
    for leaf, checks in ((other, ["R1", "R3"]), (spoiled, ["C6", "R1", "R3"])):
        assert failed(check(milan, certificates=[leaf, *milan.certificates[1:]])) == checks
    assert known_shared.cache_info().misses == 1
    assert kds_extensions._known_profile.cache_info().misses == 1


def test_large_templates_are_not_kept(milan: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a host sends is bounded before it is remembered; the verdict is the same."""
    size = sum(map(len, milan.certificates))
    for limit, kept in ((size, 1), (size - 1, 0)):
        known_shared.cache_clear()
        monkeypatch.setattr(chain, "_LARGEST_KEPT", limit)
        assert check(milan).authenticated
        assert known_shared.cache_info().currsize == kept
    for limit, kept in ((len(milan.vcek), 1), (len(milan.vcek) - 1, 0)):
        kds_extensions._known_profile.cache_clear()
        monkeypatch.setattr(kds_extensions, "_LARGEST_KEPT", limit)
        assert check(milan).authenticated
        assert kds_extensions._known_profile.cache_info().currsize == kept
