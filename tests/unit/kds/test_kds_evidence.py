"""Completing evidence: what is missing is asked for, what is there is not, and nothing is trusted for it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.snp_report import AttestationReport, Product, SignerInfo, TcbVersion
from swsnp.amd_ca.kds_double import KdsDouble, Misbehaviour, Trouble
from swsnp.certs.crl import read_crl
from swsnp.certs.kds_cache import Kept
from swsnp.certs.kds_errors import KdsThrottled
from swsnp.certs.kds_evidence import complete_evidence, get_fitting, missing_requests
from swsnp.certs.kds_url import ChainRequest, CrlRequest, VcekRequest
from swsnp.certs.signature import rsa_signed
from swsnp.certs.x509_reader import read, to_pem
from swsnp.machine import Machine
from swsnp.verify import Roots, verify

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.kds.conftest import Bench


@pytest.fixture(scope="session")
def reports(machines: dict[Product, Machine]) -> dict[Product, bytes]:
    """One report of each machine."""
    made = {}
    for product, machine in machines.items():
        with machine.create_vm() as vm:
            vm.boot()
            made[product] = vm.report(bytes(64)).report
    return made


def changed(report: bytes, **fields: object) -> bytes:
    return bytes(replace(AttestationReport.parse(report), **fields))  # type: ignore[arg-type]  # as they came


@pytest.mark.parametrize("product", Product)
def test_a_bare_report_becomes_verifiable(
    bench: Bench, reports: dict[Product, bytes], product: Product
) -> None:
    """Leaf and chain come from the service; the root is chosen elsewhere, and decides."""
    report, machine = reports[product], bench.machines[product]
    named = product if product is Product.GENOA else None  # Genoa's preset makes version 2
    evidence = complete_evidence(report, (), bench.client(), product=named)
    assert evidence == (machine.vcek_certificate(), machine.hierarchy.ask, machine.hierarchy.ark)
    roots = Roots.of(machine.root_certificate)
    assert verify(report, certificates=evidence, roots=roots, at=bench.now, product=named).authenticated
    refused = verify(report, certificates=evidence, roots=Roots.amd(), at=bench.now, product=named)
    assert not refused.authenticated


@pytest.mark.parametrize("form", [lambda der: der, to_pem])
def test_what_is_there_is_not_asked_for(
    bench: Bench, reports: dict[Product, bytes], form: Callable[[bytes], bytes]
) -> None:
    """A complete table costs no request; a leaf alone costs the chain, a chain alone the leaf."""
    machine, report, client = bench.machines[Product.MILAN], reports[Product.MILAN], bench.client()
    leaf, ask, ark = (
        form(each) for each in (machine.vcek_certificate(), machine.hierarchy.ask, machine.hierarchy.ark)
    )
    assert complete_evidence(report, (leaf, ask, ark), client) == (leaf, ask, ark)
    assert bench.double.asked == ()
    chain = ChainRequest(product=Product.MILAN)
    assert missing_requests(report, (leaf,)) == (chain,)
    assert missing_requests(report, (leaf, ask)) == (chain,)
    assert missing_requests(report, (leaf, ark)) == (chain,)
    assert missing_requests(report, (ask, ark)) == (bench.vcek_request(),)


def test_one_file_may_hold_all(bench: Bench, reports: dict[Product, bytes]) -> None:
    """PEM with leaf, ASK and ARK, as some clouds hand it out."""
    machine = bench.machines[Product.MILAN]
    chain = (machine.vcek_certificate(), machine.hierarchy.ask, machine.hierarchy.ark)
    assert missing_requests(reports[Product.MILAN], (b"".join(to_pem(each) for each in chain),)) == ()


def test_a_leaf_that_does_not_fit_is_no_leaf(bench: Bench, reports: dict[Product, bytes]) -> None:
    """A table from before an update: its VCEK stays, and the one for the reported TCB comes beside it."""
    machine, report = bench.machines[Product.MILAN], reports[Product.MILAN]
    levels = machine.chip.reported_tcb.decode(Product.MILAN)
    levels["microcode"] -= 1
    old = machine.vcek_certificate(TcbVersion.encode(Product.MILAN, **levels))
    foreign = bench.machines[Product.GENOA].vcek_certificate()
    given = (old, foreign, machine.hierarchy.ask, machine.hierarchy.ark)
    assert missing_requests(report, given) == (bench.vcek_request(),)
    evidence = complete_evidence(report, given, bench.client())
    assert evidence == (*given, machine.vcek_certificate())
    roots = Roots.of(machine.root_certificate)
    assert verify(report, certificates=evidence, roots=roots, at=bench.now).authenticated


def test_another_chips_leaf_is_no_leaf(bench: Bench, reports: dict[Product, bytes]) -> None:
    """The same product, the same TCB, another chip."""
    machine = bench.machines[Product.MILAN]
    other = Machine(same_root_as=machine).vcek_certificate()
    given = (other, machine.hierarchy.ask, machine.hierarchy.ark)
    assert missing_requests(reports[Product.MILAN], given) == (bench.vcek_request(),)


def test_what_cannot_be_read_is_the_verifiers_to_name(bench: Bench, reports: dict[Product, bytes]) -> None:
    """Garbage among the certificates stays where it is."""
    evidence = complete_evidence(reports[Product.MILAN], (b"garbage", b""), bench.client())
    assert evidence[:2] == (b"garbage", b"")
    assert len(evidence) == 5


def test_a_vlek_has_its_own_chain(bench: Bench, reports: dict[Product, bytes]) -> None:
    """The VLEK itself has to come with the report; ASVK and ARK are asked for."""
    signer = SignerInfo.of(signing_key=1)
    report = changed(reports[Product.MILAN], signer_info=signer)
    vlek = bench.machines[Product.MILAN].vlek("CN=cc.example").certificate
    assert missing_requests(report, (vlek,)) == (ChainRequest(product=Product.MILAN, kind="vlek"),)
    hierarchy = bench.machines[Product.MILAN].hierarchy
    assert missing_requests(report, (vlek, hierarchy.asvk, hierarchy.ark)) == ()
    assert complete_evidence(report, (vlek,), bench.client())[1:] == (hierarchy.asvk, hierarchy.ark)


def test_a_masked_chip_has_its_chain_only(reports: dict[Product, bytes]) -> None:
    """CHIP_ID of zeros names no certificate."""
    report = changed(reports[Product.MILAN], chip_id=bytes(64))
    assert missing_requests(report, ()) == (ChainRequest(product=Product.MILAN),)


def test_an_unsigned_report_lacks_nothing(reports: dict[Product, bytes]) -> None:
    """SIGNING_KEY 7: there is no certificate for it anywhere."""
    assert (
        missing_requests(changed(reports[Product.MILAN], signer_info=SignerInfo.of(signing_key=7)), ()) == ()
    )


@pytest.mark.parametrize("size", [0, 1183, 1185])
def test_no_report(size: int) -> None:
    """The verifier says that it is none."""
    assert missing_requests(bytes(size), ()) == ()


def test_who_names_the_product(bench: Bench, reports: dict[Product, bytes]) -> None:
    """As the verifier decides: the report from version 3 on, else the caller, the leaf, an 8-byte CHIP_ID."""
    old = changed(reports[Product.MILAN], version=2, cpuid_fam_id=0, cpuid_mod_id=0, cpuid_step=0)
    assert missing_requests(old, ()) == ()
    assert ChainRequest(product=Product.MILAN) in missing_requests(old, (), product=Product.MILAN)
    leaf = bench.machines[Product.MILAN].vcek_certificate()
    assert missing_requests(old, (leaf,)) == (ChainRequest(product=Product.MILAN),)
    turin = changed(old, chip_id=bytes(range(1, 9)) + bytes(56), reported_tcb=TcbVersion(0))
    assert missing_requests(turin, ())[0] == VcekRequest(
        product=Product.TURIN, hwid=bytes(range(1, 9)), tcb=TcbVersion(0)
    )
    strange = changed(reports[Product.MILAN], cpuid_fam_id=0x1F)
    assert missing_requests(strange, ()) == ()
    assert ChainRequest(product=Product.MILAN) in missing_requests(strange, (), product=Product.MILAN)


def test_a_report_that_contradicts_the_caller(reports: dict[Product, bytes]) -> None:
    """The report's product decides what to ask for; the contradiction is the verifier's to refuse (P9)."""
    wanted = missing_requests(reports[Product.MILAN], (), product=Product.GENOA)
    assert {each.product for each in wanted} == {Product.MILAN}


def anew(bench: Bench) -> Machine:
    """Another machine with another root, whose service answers at the same address from now on."""
    machine = Machine(now=lambda: bench.now)
    bench.double = bench.transport.double = KdsDouble([machine], now=lambda: bench.now)
    return machine


def test_a_kept_chain_that_does_not_fit_is_renewed(bench: Bench) -> None:
    """The service has other CAs than when the chain and the list came: all are asked for once more."""
    chain, crl = ChainRequest(product=Product.MILAN), CrlRequest(product=Product.MILAN)
    client = bench.client()
    get_fitting((chain, crl), client)
    machine = anew(bench)
    leaf = VcekRequest(product=Product.MILAN, hwid=machine.hwid, tcb=machine.chip.reported_tcb)
    answers = get_fitting((leaf, chain), client)
    assert answers[1].der == (machine.hierarchy.ask, machine.hierarchy.ark)
    assert bench.statuses == [200] * 3  # the leaf, and both once more
    get_fitting((leaf, chain), client)
    assert bench.statuses == [200] * 3
    assert rsa_signed(read_crl(get_fitting((chain, crl), client)[1].body), read(machine.root_certificate))
    assert bench.statuses == [200] * 4  # the list; the chain has just been asked for


def test_what_never_fits_is_not_asked_for_again_and_again(bench: Bench) -> None:
    """A service whose leaves its own chain did not sign costs two requests more in five minutes."""
    other, client = Machine(now=lambda: bench.now), bench.client()
    requests = (bench.vcek_request(), ChainRequest(product=Product.MILAN))
    url = client.url_of(requests[1])
    client.get(requests[0])
    for _ in range(3):
        bench.cache.write(url, Kept(body=other.hierarchy.chain_pem(), fetched=bench.now))
        get_fitting(requests, client)
    assert bench.statuses == [200] * 3
    bench.clock.now += 300
    get_fitting(requests, client)
    assert bench.statuses == [200] * 5


def test_offline_what_does_not_fit_is_given_as_it_is(bench: Bench) -> None:
    """The verifier will refuse it; there is nobody to ask."""
    other = Machine(now=lambda: bench.now)
    client = bench.client(offline=True)
    requests = (bench.vcek_request(), ChainRequest(product=Product.MILAN))
    bench.client().get(requests[0])
    bench.cache.write(client.url_of(requests[1]), Kept(body=other.hierarchy.chain_pem(), fetched=bench.now))
    assert get_fitting(requests, client)[1].der[1] == other.root_certificate
    assert bench.statuses == [200]


def test_a_chain_of_two_roots_does_not_fit(bench: Bench) -> None:
    """Names agree, the root's key did not sign the intermediate: asked for once more."""
    machine, other, client = bench.machines[Product.MILAN], Machine(now=lambda: bench.now), bench.client()
    request = ChainRequest(product=Product.MILAN)
    mixed = to_pem(machine.hierarchy.ask) + to_pem(other.hierarchy.ark)
    bench.cache.write(client.url_of(request), Kept(body=mixed, fetched=bench.now))
    assert get_fitting((request,), client)[0].der == (machine.hierarchy.ask, machine.hierarchy.ark)


def test_no_answer_is_an_error(bench: Bench, reports: dict[Product, bytes]) -> None:
    """Nothing is given back half complete."""
    bench.double.misbehave(Misbehaviour(trouble=Trouble.THROTTLED))
    with pytest.raises(KdsThrottled):
        complete_evidence(reports[Product.MILAN], (), bench.client(budget_s=0.0))


@pytest.mark.parametrize("folder", ["milan-v2-plain", "milan-v3", "genoa-line-v5", "turin-v5"])
def test_genuine_evidence_is_complete(vectors: Path, folder: str) -> None:
    """Genuine report, leaf and chain: nothing is asked for; without the leaf, exactly that."""
    report = (vectors / folder / "report.bin").read_bytes()
    leaf = next((vectors / folder).glob("vcek.*")).read_bytes()
    line = folder.partition("-")[0]
    product = Product(line.capitalize())
    chain = (vectors / "ca" / f"{line}_vcek_cert_chain.pem").read_bytes()
    assert missing_requests(report, (leaf, chain), product=product) == ()
    wanted = missing_requests(report, (chain,), product=product)
    assert [type(each) for each in wanted] == [VcekRequest]
