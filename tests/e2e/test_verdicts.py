"""Emulated evidence of every product line, report version and signing key, judged by the verifier.

Under the machine's own root, chosen explicitly, all of it is accepted; under AMD's roots none of it is.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from swsnp import Machine, Product
from swsnp.abi.snp_message import KeySel
from swsnp.abi.snp_report import AttestationReport, SigningKey
from swsnp.firmware.settings import preset
from swsnp.verify import Policy, Roots, Verifier

NONCE = bytes(range(64))
CSP = "CN=provider-a.example"
ROOTS: dict[tuple[Product, bool], Machine] = {}


def first_of(product: Product, amd_names: bool) -> Machine:
    """A machine whose hierarchy the others of its line share: RSA keys take seconds."""
    key = (product, amd_names)
    if key not in ROOTS:
        ROOTS[key] = Machine(product=product, amd_names=amd_names)
    return ROOTS[key]


@pytest.mark.parametrize("key", [SigningKey.VCEK, SigningKey.VLEK])
@pytest.mark.parametrize("version", [2, 3, 5])
@pytest.mark.parametrize("product", list(Product))
def test_accepted_under_our_root_only(product: Product, version: int, key: SigningKey) -> None:
    """The whole path, from the guest's request to the verdict; and the same bytes under AMD's roots."""
    settings = replace(preset(product), report_version=version)
    machine = Machine(product=product, settings=settings, same_root_as=first_of(product, False))
    table = machine.certificate_table()
    if key is SigningKey.VLEK:
        vlek = machine.vlek(CSP)
        machine.load_vlek(vlek)
        table = vlek.table
    with machine.create_vm("judged", certs=table) as vm:
        vm.boot()
        chosen = KeySel.VLEK if key is SigningKey.VLEK else KeySel.VCEK
        answer = vm.extended_report(NONCE, rsvd=chosen.to_bytes(28, "little"))
    report = AttestationReport.parse(answer.report)
    assert (report.version, report.signer_info.signing_key) == (version, key)
    own = Verifier(roots=Roots.of(machine.root_certificate), policy=Policy(csp_ids=[CSP]))
    amd = Verifier(roots=Roots.amd(), policy=Policy(csp_ids=[CSP]))
    for verifier, failures in ((own, []), (amd, ["C5"])):
        result = verifier.verify(
            answer.report,
            table=answer.certs,
            at=machine.now(),
            report_data=NONCE,
            measurement=report.measurement,
        )
        assert [each.check for each in result.failures] == failures
        assert result.accepted is not bool(failures)
        assert result.product is product


def test_amds_names_over_our_keys() -> None:
    """C5. With AMD's own names in the certificates, the pinned keys still tell the difference."""
    machine = first_of(Product.MILAN, True)
    with machine.create_vm("named") as vm:
        vm.boot()
        answer = vm.extended_report(NONCE)
    for like in (None, "go-sev-guest"):
        verifier = Verifier(roots=Roots.amd(), like=like)
        result = verifier.verify(answer.report, table=answer.certs, at=machine.now())
        assert [each.check for each in result.failures] == ["C5"]
        assert not result.authenticated
