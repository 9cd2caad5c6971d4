"""What reports share is judged once, and never in place of another's. Source: docs/adr/0016."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.verify.judging import check, failed

from swsnp.abi.snp_report import (
    REPORT_SIZE,
    SIGNED_SIZE,
    AttestationReport,
    GuestPolicy,
    PlatformInfo,
    Product,
)
from swsnp.verify import shared_report
from swsnp.verify.policy import Policy
from swsnp.verify.policy_checks import compile_policy
from swsnp.verify.shared_report import Judgement, Own, SharedReport, own_of, shared_of

if TYPE_CHECKING:
    from tests.unit.verify.conftest import Bench

    from swsnp.verify.policy_checks import Compiled

OWN = {"report_data", "host_data", "report_id", "chip_id", "signature_r", "signature_s"}
SIGNED = [name for name, offset, _ in AttestationReport.layout() if offset < SIGNED_SIZE]
PLACES = {name: range(at, at + size) for name, at, size in AttestationReport.layout()}


def test_what_is_a_reports_own() -> None:
    """The nonce, what the host and the chip add, and the signature; each as the record reads it."""
    data = bytes(at % 251 for at in range(REPORT_SIZE))
    report = AttestationReport.parse(data)
    assert set(Own._fields) == OWN
    assert own_of(data)._asdict() == {name: getattr(report, name) for name in OWN}


def test_shared_checks_cannot_see_it(milan: Bench) -> None:
    """A check that asks for a field of another report ends with an error, not with a verdict."""
    shared = shared_of(milan.report(), lax=False).report
    for name, _, _ in AttestationReport.layout():
        if name in OWN:
            with pytest.raises(AttributeError):
                getattr(shared, name)
    report = AttestationReport.parse(milan.report())
    assert {name: getattr(shared, name) for name in SIGNED if name not in OWN} == {
        name: getattr(report, name) for name in SIGNED if name not in OWN
    }


def test_every_other_signed_byte_tells_reports_apart(milan: Bench) -> None:
    """Whatever differs outside of `Own`, up to what is signed, is another kind; inside, it is the same."""
    report = milan.report()
    kind = shared_of(report, lax=False)
    own = {at for name in OWN for at in PLACES[name]}
    for at in range(REPORT_SIZE):
        spoiled = report[:at] + bytes((report[at] ^ 1,)) + report[at + 1 :]
        same = shared_of(spoiled, lax=False) is kind
        assert same is (at in own or at >= SIGNED_SIZE)
    assert shared_of(report, lax=True) is not kind


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "version": st.sampled_from([1, 2, 3, 5]),
        "vmpl": st.sampled_from([1, 4, 0xFFFFFFFF]),
        "policy": st.sampled_from([GuestPolicy(0x20000), GuestPolicy(0xB0000), GuestPolicy(0x1030000)]),
        "platform_info": st.sampled_from([PlatformInfo(0x24), PlatformInfo(0x45)]),
        "host_data": st.just(b"\1" * 32),
        "family_id": st.just(b"\2" * 16),
        "report_id": st.just(b"\3" * 32),
        "chip_id": st.sampled_from([bytes(64), b"\4" * 64]),
        "report_data": st.just(b"\5" * 64),
        "measurement": st.just(b"\6" * 48),
        "cpuid_mod_id": st.sampled_from([0x11, 0xF0]),
    },
)
POLICIES = st.fixed_dictionaries(
    {},
    optional={
        "allow_debug": st.just(True),
        "host_data": st.just(bytes(32)),
        "family_id": st.just(bytes(16)),
        "report_ids": st.just([bytes(32)]),
        "maximum_vmpl": st.just(0),
        "accept_host_report": st.just(True),
        "minimum_guest_svn": st.just(1),
    },
)


@settings(deadline=None, max_examples=60)
@given(first=CHANGES, later=CHANGES, policies=st.tuples(POLICIES, POLICIES), like=st.booleans())
def test_judged_after_others_as_anew(
    milan: Bench,
    first: dict[str, Any],
    later: dict[str, Any],
    policies: tuple[dict[str, Any], dict[str, Any]],
    like: bool,
) -> None:
    """ADR 0010: a memory changes no verdict, no finding, and not their order."""

    def findings(changes: dict[str, Any], demands: dict[str, Any]) -> list[str]:
        result = check(
            milan,
            milan.report(**changes),
            **demands,
            report_data=b"\x11" * 64,
            like="go-sev-guest" if like else None,
        )
        return [*map(str, result.noted), hex(result.made), str(result.product)]

    anew = []
    for changes, demands in zip((first, later), policies, strict=True):
        shared_report._known.cache_clear()
        anew.append(findings(changes, demands))
    shared_report._known.cache_clear()
    for number in (0, 1, 0, 1):
        assert findings((first, later)[number], policies[number]) == anew[number]


def test_the_policys_findings_are_in_order(milan: Bench) -> None:
    """Y1, then Y5, which is made of what is the report's own, then Y6."""
    report = milan.report(policy=GuestPolicy(0xB0000), host_data=b"\1" * 32, family_id=b"\1" * 16)
    result = check(milan, report, host_data=bytes(32), family_id=bytes(16))
    assert [each.check for each in result.noted] == ["Y1", "Y5", "Y6"]
    assert failed(result) == ["Y1", "Y5", "Y6"]


def test_only_silence_is_remembered(milan: Bench) -> None:
    """Findings can be as long as a policy's lists, and a host may send as many reports as it likes."""
    for changes, kept in (({}, 1), ({"guest_svn": 0, "vmpl": 7}, 0), ({"family_id": b"\1" * 16}, 0)):
        shared = shared_of(milan.report(**changes), lax=False)
        found = shared.judged(Product.MILAN, compile_policy(Policy(family_id=bytes(16))))
        assert (found.relations == found.policy == ()) is bool(kept)
        assert len(shared._judged) == kept


def test_a_kind_of_reports_is_judged_once(milan: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One look at the shared bytes for each product and policy, and for few of these at a time."""
    judgements: list[Product | None] = []
    judge = SharedReport._judge

    def counted(self: SharedReport, product: Product | None, compiled: Compiled) -> Judgement:
        judgements.append(product)
        return judge(self, product, compiled)

    monkeypatch.setattr(SharedReport, "_judge", counted)
    for number in range(3):
        assert failed(check(milan, milan.report(report_data=bytes([number]) * 64))) == []
    assert judgements == [Product.MILAN]
    shared = shared_of(milan.report(), lax=False)
    for number in range(20):
        shared.judged(Product.MILAN, compile_policy(Policy(chip_ids=[bytes([number]) * 64])))
    assert len(judgements) == 21
    assert len(shared._judged) == 16
