"""The imitated service without sockets. Source: AMD 57230, KDS interface."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.snp_report import Product, TcbVersion
from swsnp.amd_ca.kds_double import KdsDouble, Misbehaviour, Trouble
from swsnp.amd_ca.manufacture import Hierarchy
from swsnp.certs.crl import OID_CRL_NUMBER, read_crl
from swsnp.certs.kds_url import ChainRequest, CrlRequest, VlekRequest, target_of
from swsnp.certs.x509_reader import read
from swsnp.errors import UsageError
from swsnp.machine import Machine

if TYPE_CHECKING:
    from tests.unit.kds.conftest import Bench

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CRL = target_of(CrlRequest(product=Product.MILAN))


@pytest.mark.parametrize("product", Product)
def test_a_leaf_for_any_tcb_that_the_chip_could_have(bench: Bench, product: Product) -> None:
    """Every TCB with no component above the committed one is answered; above it, 404."""
    wanted = bench.vcek_request(product)
    for name, level in wanted.tcb.decode(product).items():
        for other, status in ((0, 200), (level, 200), (level + 1, 404)):
            levels = {**wanted.tcb.decode(product), name: other}
            request = replace(wanted, tcb=TcbVersion.encode(product, **levels))
            assert bench.double.answer(target_of(request)).status == status, (name, other)


def test_a_chip_of_another_product_line(bench: Bench) -> None:
    """A HWID is known under its own product line only."""
    milan = target_of(bench.vcek_request())
    assert bench.double.answer(milan).status == 200
    assert bench.double.answer(milan.replace("Milan", "Genoa")).status == 404


def test_two_downloads_differ_in_dates_alone() -> None:
    """Leaves are made on request, backdated a day: same key and extensions, other dates and signature."""
    now = NOW
    machine = Machine(now=lambda: now)
    double = KdsDouble([machine], now=lambda: now)
    tcb = machine.chip.reported_tcb
    target = f"/vcek/v1/Milan/{machine.hwid.hex()}?blSPL=4&teeSPL=0&snpSPL=24&ucodeSPL={tcb >> 56}"
    first = read(double.answer(target).body)
    now += timedelta(days=30)
    second = read(double.answer(target).body)
    assert (first.spki, first.extensions) == (second.spki, second.extensions)
    assert (first.not_before, second.not_before) == (NOW - timedelta(days=1), now - timedelta(days=1))
    assert first.signature != second.signature


def test_one_list_until_something_is_revoked(bench: Bench) -> None:
    """The genuine service has one list for a year; a later one has a greater number and the serial."""
    first = bench.double.answer(CRL).body
    assert bench.double.answer(CRL.replace("vcek", "vlek")).body == first
    bench.double.revoke(Product.MILAN, 0x10001)
    second = read_crl(bench.double.answer(CRL).body)
    assert read_crl(first).revoked == ()
    assert second.revoked == (0x10001,)
    numbers = [
        next(each.value for each in crl.extensions if each.oid == OID_CRL_NUMBER)
        for crl in (read_crl(first), second)
    ]
    assert numbers[0] < numbers[1]


def test_lists_of_a_seeded_machine_are_of_today() -> None:
    """A seeded machine lives on one day; a list of that day would be stale for whoever asks a year later."""
    later = NOW + timedelta(days=5000)
    double = KdsDouble([Machine(seed=b"list")], now=lambda: later)
    assert read_crl(double.answer(CRL).body).this_update == later


def test_a_vlek_is_for_its_provider(bench: Bench) -> None:
    """401 without a body that could be taken for a certificate."""
    reply = bench.double.answer(target_of(VlekRequest(product=Product.MILAN, tcb=bench.vcek_request().tcb)))
    assert reply.status == 401
    assert reply.body.startswith(b"a VLEK is given to its provider only")


def test_products_without_a_chip() -> None:
    """A service for one chip knows one product line."""
    double = KdsDouble([Machine()])
    assert double.products == (Product.MILAN,)
    assert double.answer(target_of(ChainRequest(product=Product.TURIN))).status == 404
    with pytest.raises(UsageError, match="no chip of Turin"):
        double.root(Product.TURIN)


def test_several_chips_under_one_root() -> None:
    """Machines with `same_root_as` are chips of one service; without it there are two roots."""
    first = Machine()
    second = Machine(same_root_as=first)
    double = KdsDouble([first, second])
    for machine in (first, second):
        leaf = read(double.answer(_target(machine)).body)
        assert leaf.extension("1.3.6.1.4.1.3704.1.4").value == machine.hwid  # type: ignore[union-attr]  # it is there
    with pytest.raises(UsageError, match="two roots for Milan"):
        KdsDouble([first, Machine()])
    with pytest.raises(UsageError, match="twice"):
        KdsDouble([first, first])
    with pytest.raises(UsageError, match="got no chip"):
        KdsDouble([])


def _target(machine: Machine) -> str:
    levels = machine.chip.reported_tcb.decode(machine.product)
    query = "blSPL={boot_loader}&teeSPL={tee}&snpSPL={snp}&ucodeSPL={microcode}".format(**levels)
    return f"/vcek/v1/Milan/{machine.hwid.hex()}?{query}"


def test_troubles_come_in_order_and_pass(bench: Bench) -> None:
    """The first that meets a request goes first, each as often as told."""
    bench.double.misbehave(
        Misbehaviour(trouble=Trouble.OUTAGE, times=2, only="/crl"),
        Misbehaviour(trouble=Trouble.THROTTLED, times=1),
    )
    chain = target_of(ChainRequest(product=Product.MILAN))
    targets = [CRL, chain, CRL, CRL, chain]
    assert [bench.double.answer(each).status for each in targets] == [503, 429, 503, 200, 200]
    assert bench.double.misbehaviours == ()
    assert [each.target for each in bench.double.asked] == targets


@pytest.mark.parametrize("trouble", [Trouble.STALE_CRL, Trouble.WRONG_CHIP, Trouble.WRONG_TCB])
def test_trouble_meets_only_what_it_is_about(bench: Bench, trouble: Trouble) -> None:
    """A chain is no leaf and no list; what meets nothing is not used up."""
    bench.double.misbehave(Misbehaviour(trouble=trouble, times=1))
    assert bench.double.answer(target_of(ChainRequest(product=Product.MILAN))).status == 200
    assert len(bench.double.misbehaviours) == 1


@pytest.mark.parametrize("trouble", [Trouble.WRONG_CHIP, Trouble.WRONG_TCB, Trouble.STALE_CRL])
def test_what_is_unknown_stays_unknown(bench: Bench, trouble: Trouble) -> None:
    """A wrong answer takes the place of a right one, not of a 404."""
    bench.double.misbehave(Misbehaviour(trouble=trouble))
    assert (
        bench.double.answer(_target(bench.machines[Product.MILAN]).replace("snpSPL=24", "snpSPL=255")).status
        == 404
    )


def test_wrong_leaves_have_the_right_key(bench: Bench) -> None:
    """Such an answer can only be told by its extensions: everything else fits."""
    target = target_of(bench.vcek_request())
    honest = read(bench.double.answer(target).body)
    for trouble in (Trouble.WRONG_CHIP, Trouble.WRONG_TCB):
        bench.double.misbehave(Misbehaviour(trouble=trouble, times=1))
        wrong = read(bench.double.answer(target).body)
        assert (wrong.spki, wrong.issuer) == (honest.spki, honest.issuer)
        assert wrong.extensions != honest.extensions


def test_truncation_and_drops_are_replies_too(bench: Bench) -> None:
    """Half of the body; nothing at all."""
    bench.double.misbehave(
        Misbehaviour(trouble=Trouble.TRUNCATED, times=1), Misbehaviour(trouble=Trouble.DROPPED, times=1)
    )
    half, nothing = bench.double.answer(CRL), bench.double.answer(CRL)
    assert half.sent == len(half.body) // 2
    assert nothing.status == 0


def test_two_threads_get_one_root() -> None:
    """Keys are made when first needed; two who need them at once must not get two."""
    hierarchy, together, got = Hierarchy(Product.MILAN), threading.Barrier(2), []

    def want() -> None:
        together.wait(10)
        got.append(hierarchy.ark)

    threads = [threading.Thread(target=want) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert len(got) == 2
    assert len(set(got)) == 1
