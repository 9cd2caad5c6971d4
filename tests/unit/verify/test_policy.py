"""The relying party's policy: every field alone, what is reported as not checked, and what is no policy.

Source: AMD 56860, ATTESTATION_REPORT, guest policy, PLATFORM_INFO; docs/policy.md.
"""

from __future__ import annotations

import pickle
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.verify.judging import check, failed

from swsnp.abi.snp_report import GuestPolicy, PlatformInfo, Product, SignerInfo, TcbVersion
from swsnp.errors import UsageError
from swsnp.verify.policy import Policy, entries
from swsnp.verify.result import Outcome

if TYPE_CHECKING:
    from tests.unit.verify.conftest import Bench

MILAN, TURIN = Product.MILAN, Product.TURIN
POLICY = 0x30000
"""What the bench's reports have: SMT allowed, and the bit that is always set."""
HIGH = TcbVersion.encode(MILAN, boot_loader=4, snp=0x18, microcode=0xDC)
LOW = TcbVersion.encode(MILAN, boot_loader=4, snp=0x18, microcode=0xDA)

# field, value, what the report must have for it to hold, what makes it refuse, check, field of the finding
CASES: list[tuple[str, Any, dict[str, Any], dict[str, Any], str, str]] = [
    ("report_data", b"\x07" * 64, {"report_data": b"\x07" * 64}, {}, "Y3", "REPORT_DATA"),
    ("measurements", {b"\x07" * 48, b"\x08" * 48}, {"measurement": b"\x08" * 48}, {}, "Y4", "MEASUREMENT"),
    ("host_data", b"\x07" * 32, {"host_data": b"\x07" * 32}, {}, "Y5", "HOST_DATA"),
    ("family_id", b"\x07" * 16, {"family_id": b"\x07" * 16}, {}, "Y6", "FAMILY_ID"),
    ("image_id", b"\x07" * 16, {"image_id": b"\x07" * 16}, {}, "Y7", "IMAGE_ID"),
    ("report_ids", [b"\x07" * 32, b"\x08" * 32], {"report_id": b"\x07" * 32}, {}, "Y8", "REPORT_ID"),
    ("report_id_ma", b"\xff" * 32, {}, {}, "Y9", "REPORT_ID_MA"),
    ("vmpl", 0, {"vmpl": 0}, {"vmpl": 1}, "Y10", "VMPL"),
    ("vmpl", 2, {"vmpl": 2}, {"vmpl": 1}, "Y10", "VMPL"),
    ("maximum_vmpl", 2, {"vmpl": 2}, {"vmpl": 3}, "Y10", "VMPL"),
    ("minimum_guest_svn", 4, {"guest_svn": 4}, {"guest_svn": 3}, "Y11", "GUEST_SVN"),
    ("minimum_abi", (1, 51), {"policy": GuestPolicy(POLICY | 0x0133)}, {}, "Y12", "POLICY.ABI"),
    (
        "minimum_abi",
        (1, 51),
        {"policy": GuestPolicy(POLICY | 0x0200)},
        {"policy": GuestPolicy(POLICY | 0x0132)},
        "Y12",
        "POLICY.ABI",
    ),
    (
        "allow_smt",
        False,
        {"policy": GuestPolicy(0x20000), "platform_info": PlatformInfo(0x24)},
        {},
        "Y13",
        "POLICY.SMT",
    ),
    ("allow_cxl", False, {}, {"policy": GuestPolicy(POLICY | 1 << 21)}, "Y13", "POLICY.CXL_ALLOW"),
    (
        "require_single_socket",
        True,
        {"policy": GuestPolicy(POLICY | 1 << 20)},
        {},
        "Y14",
        "POLICY.SINGLE_SOCKET",
    ),
    (
        "require_mem_aes_256_xts",
        True,
        {"policy": GuestPolicy(POLICY | 1 << 22)},
        {},
        "Y14",
        "POLICY.MEM_AES_256_XTS",
    ),
    (
        "require_rapl_dis",
        True,
        {"policy": GuestPolicy(POLICY | 1 << 23), "platform_info": PlatformInfo(0x2D)},
        {},
        "Y14",
        "POLICY.RAPL_DIS",
    ),
    (
        "require_ciphertext_hiding_dram",
        True,
        {"policy": GuestPolicy(POLICY | 1 << 24), "platform_info": PlatformInfo(0x35)},
        {},
        "Y14",
        "POLICY.CIPHERTEXT_HIDING_DRAM",
    ),
    (
        "require_page_swap_disable",
        True,
        {"policy": GuestPolicy(POLICY | 1 << 25)},
        {},
        "Y14",
        "POLICY.PAGE_SWAP_DISABLE",
    ),
    ("id_key_digests", [b"\x07" * 48], {"id_key_digest": b"\x07" * 48}, {}, "Y15", "ID_KEY_DIGEST"),
    (
        "id_key_digests",
        [b"\x07" * 48],
        {"id_key_digest": b"\x07" * 48},
        {"id_key_digest": b"\x08" * 48},
        "Y15",
        "ID_KEY_DIGEST",
    ),
    ("require_id_block", True, {"id_key_digest": b"\x07" * 48}, {}, "Y15", "ID_KEY_DIGEST"),
    (
        "author_key_digests",
        [b"\x07" * 48],
        {"author_key_digest": b"\x07" * 48, "signer_info": SignerInfo(1)},
        {"author_key_digest": b"\x08" * 48, "signer_info": SignerInfo(1)},
        "Y16",
        "AUTHOR_KEY_DIGEST",
    ),
    (
        "require_author_key",
        True,
        {"author_key_digest": b"\x07" * 48, "signer_info": SignerInfo(1)},
        {},
        "Y16",
        "AUTHOR_KEY_EN",
    ),
    (
        "required_platform_info",
        PlatformInfo.of(ecc_en=1, alias_check_complete=1),
        {},
        {"platform_info": PlatformInfo(0x21)},
        "Y17",
        "PLATFORM_INFO",
    ),
    (
        "forbidden_platform_info",
        PlatformInfo.of(tio_en=1),
        {},
        {"platform_info": PlatformInfo(0xA5)},
        "Y17",
        "PLATFORM_INFO",
    ),
    (
        "refuse_unknown_platform_info",
        True,
        {"platform_info": PlatformInfo(0xBF)},
        {"platform_info": PlatformInfo(0x65)},
        "Y17",
        "PLATFORM_INFO",
    ),
    ("minimum_launch_tcb", {MILAN: {"microcode": 0xDB}}, {}, {"launch_tcb": LOW}, "Y19", "LAUNCH_TCB"),
    ("minimum_build", 5, {}, {"current_build": 4, "committed_build": 4}, "Y20", "CURRENT build"),
    ("minimum_version", (1, 55), {"current_major": 1, "current_minor": 55}, {}, "Y20", "CURRENT version"),
    (
        "minimum_version",
        (1, 55),
        {"current_major": 2},
        {"current_major": 1, "current_minor": 54},
        "Y20",
        "CURRENT version",
    ),
    ("require_committed_current", True, {}, {"current_tcb": HIGH}, "R4", "COMMITTED_TCB"),
    ("require_committed_current", True, {}, {"current_build": 6}, "R6", "COMMITTED version"),
    ("require_committed_current", True, {}, {"current_minor": 1}, "R6", "COMMITTED version"),
    (
        "launch_mit_vector",
        0b101,
        {"version": 5, "launch_mit_vector": 0b1101},
        {"version": 5, "launch_mit_vector": 0b1001, "current_mit_vector": 0b101},
        "Y21",
        "LAUNCH_MIT_VECTOR",
    ),
    (
        "current_mit_vector",
        0b101,
        {"version": 5, "current_mit_vector": 0b1101},
        {"version": 5, "current_mit_vector": 0b1001, "launch_mit_vector": 0b101},
        "Y22",
        "CURRENT_MIT_VECTOR",
    ),
    ("launch_mit_vector", 0, {"version": 5}, {"version": 4}, "Y21", "LAUNCH_MIT_VECTOR"),
    ("chip_ids", [b"\x07" * 64, bytes(range(1, 65))], {}, {"chip_id": bytes(64)}, "Y23", "CHIP_ID"),
    ("require_chip_id", True, {}, {"chip_id": bytes(64)}, "R3", "CHIP_ID"),
]
REFUSED_BY_DEFAULT = {"report_id_ma"}


@pytest.mark.parametrize(
    ("name", "value", "good", "bad", "number", "field"), CASES, ids=[f"{c[0]}-{c[4]}" for c in CASES]
)
def test_a_field_alone(
    milan: Bench,
    name: str,
    value: Any,
    good: dict[str, Any],
    bad: dict[str, Any],
    number: str,
    field: str,
) -> None:
    """A demand that is met passes and is no longer named as not checked; one that is not refuses alone."""
    demand = {name: value}
    met = check(milan, milan.report(**good), **demand)
    assert failed(met) == []
    assert name not in met.not_checked
    assert [each.outcome for each in met.findings if each.check == number] in (
        [Outcome.OK],
        [Outcome.WARN],
    )
    if name in REFUSED_BY_DEFAULT:
        return
    refused = check(milan, milan.report(**bad), **demand)
    assert [(each.check, each.field) for each in refused.failures] == [(number, field)]
    assert not refused.accepted
    # and without the demand nothing is refused
    assert failed(check(milan, milan.report(**bad))) == []


def test_report_id_ma(milan: Bench) -> None:
    """Y9. Another migration agent than the wanted one."""
    report = milan.report(policy=GuestPolicy(POLICY | 1 << 18), report_id_ma=b"\x09" * 32)
    wanted = {"allow_migrate_ma": True, "report_id_ma": b"\x07" * 32}
    assert failed(check(milan, report, **wanted)) == ["Y9"]
    assert failed(check(milan, report, **{**wanted, "report_id_ma": b"\x09" * 32})) == []


def test_minimum_tcb(milan: Bench, turin: Bench) -> None:
    """Y18. Per component, never as one number; a product that the policy does not name is refused."""
    for levels, checks in (
        ({"microcode": 0xDB, "snp": 0x18, "boot_loader": 4, "tee": 0}, []),
        ({"microcode": 0xDC}, ["Y18"]),
        ({"tee": 1}, ["Y18"]),
        ({"boot_loader": 5, "microcode": 0}, ["Y18"]),
    ):
        assert failed(check(milan, minimum_tcb={MILAN: levels})) == checks
    refused = check(milan, minimum_tcb={MILAN: {"tee": 1, "snp": 0x19, "microcode": 1}})
    assert refused.failures[0].wanted == "tee at least 1, snp at least 25"
    both = {MILAN: {"microcode": 0xFF}, TURIN: {"fmc": 0}}
    assert failed(check(turin, minimum_tcb=both)) == []
    assert failed(check(turin, minimum_tcb={TURIN: {"fmc": 1}})) == ["Y18"]
    assert failed(check(turin, minimum_tcb={MILAN: {"snp": 0}})) == ["Y18"]
    assert failed(check(turin, minimum_launch_tcb={MILAN: {"snp": 0}})) == ["Y19"]
    unknown = milan.report(cpuid_fam_id=0x1B)
    assert failed(check(milan, unknown, minimum_tcb={MILAN: {"snp": 0}})) == ["P9", "C2", "C5", "Y18"]


def test_minimum_tcb_is_on_reported(milan: Bench) -> None:
    """REPORTED_TCB is what the certificate vouches for; a higher CURRENT_TCB does not help."""
    report = milan.report(current_tcb=HIGH, committed_tcb=HIGH)
    assert failed(check(milan, report, minimum_tcb={MILAN: {"microcode": 0xDC}})) == ["Y18"]


def test_mitigations_before_version_5(milan: Bench) -> None:
    """Y21, Y22. A report that has no vectors meets no demand on them."""
    for name, number in (("launch_mit_vector", "Y21"), ("current_mit_vector", "Y22")):
        demand: dict[str, Any] = {name: 1}
        result = check(milan, **demand)
        assert failed(result) == [number]
        assert result.failures[0].got == "none in version 3"


def test_chip_ids_of_turin(turin: Bench) -> None:
    """Y23. The 8 bytes stand for themselves and 56 zeros."""
    assert failed(check(turin, chip_ids=[turin.chip_id[:8]])) == []
    assert failed(check(turin, chip_ids=[turin.chip_id])) == []
    assert failed(check(turin, chip_ids=[b"\x07" * 8])) == ["Y23"]


def test_a_host_report_is_above_every_maximum(milan: Bench) -> None:
    """Y10. FFFFFFFFh is no privilege level of a guest."""
    report = milan.report(vmpl=0xFFFFFFFF)
    assert failed(check(milan, report, accept_host_report=True, maximum_vmpl=3)) == ["Y10"]
    assert failed(check(milan, report, accept_host_report=True, vmpl=0)) == ["Y10"]


def test_crl_age(milan: Bench) -> None:
    """C10. A CRL that is old is refused before it ends, and none at all is older than any."""
    crls = [milan.hierarchy.crl()]
    day = milan.at + timedelta(days=1)
    assert failed(check(milan, crls=crls, at=day, maximum_crl_age_s=86400)) == []
    assert failed(check(milan, crls=crls, at=day, maximum_crl_age_s=86399)) == ["C10"]
    assert failed(check(milan, at=day, maximum_crl_age_s=86400)) == ["C10"]
    assert failed(check(milan, maximum_crl_age_s=0)) == ["C10"]


def test_both_policy_and_call(milan: Bench) -> None:
    """Y3, Y4. What the call says is asked beside what the policy says."""
    data, other = b"\x11" * 64, b"\x12" * 64
    image, another = b"\x22" * 48, b"\x23" * 48
    assert check(milan, policy_report_data=data, report_data=data, measurement=image).accepted
    for policy_data, call_data in ((data, other), (other, data)):
        assert failed(check(milan, policy_report_data=policy_data, report_data=call_data)) == ["Y3"]
    for listed, call in ([image], another), ([another], image):
        assert failed(check(milan, measurements=listed, measurement=call)) == ["Y4"]


@pytest.mark.parametrize("by_policy", [True, False])
def test_accepted_wants_both(milan: Bench, by_policy: bool) -> None:
    """Accepted: report data and a measurement were given, by either way, and matched."""
    data: dict[str, Any] = {"policy_report_data" if by_policy else "report_data": b"\x11" * 64}
    image: dict[str, Any] = {"measurements": [b"\x22" * 48]} if by_policy else {"measurement": b"\x22" * 48}
    for given, missing in (
        ({}, ("report_data", "measurement")),
        (data, ("measurement",)),
        (image, ("report_data",)),
        ({**data, **image}, ()),
    ):
        result = check(milan, **given)
        assert result.authenticated
        assert result.passed
        assert result.accepted is not bool(missing)
        assert result.missing == missing
        assert ("report_data" in result.not_checked) is ("report_data" in missing)
        assert ("measurements" in result.not_checked) is ("measurement" in missing)


def test_a_broken_policy_leaves_the_report_authentic(milan: Bench) -> None:
    """Two facts: the policy says whether to accept, not whether a processor signed."""
    result = check(milan, vmpl=1)
    assert result.authenticated
    assert not result.passed
    assert not result.accepted


def test_what_is_not_checked_is_named() -> None:
    """Every field that demands nothing is named; the four that only waive are not demands."""
    waiving = {"allow_debug", "allow_migrate_ma", "allow_expired_leaf", "accept_host_report"}
    assert {each.name for each in entries() if each.waives} == waiving
    assert set(Policy().unset()) == {each.name for each in entries()} - waiving
    full = Policy(**{name: value for name, value, *_ in CASES if value is not None})
    set_here = {name for name, *_ in CASES}
    assert set(full.unset()) == {each.name for each in entries()} - waiving - set_here
    # zero and False are demands where None is none
    zero = Policy(vmpl=0, minimum_build=0, allow_smt=False, minimum_abi=(0, 0))
    assert {"vmpl", "minimum_build", "allow_smt", "minimum_abi"}.isdisjoint(zero.unset())
    assert "allow_smt" not in Policy(allow_smt=True).unset()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("report_data", b"\0" * 63, "report_data: got 63 bytes, wanted 64 bytes"),
        ("report_data", "00" * 64, "report_data: got '0000"),
        ("measurements", [b"\0" * 48, b"\0" * 47], r"measurements\[1\]: got 47 bytes, wanted 48 bytes"),
        ("measurements", b"\0" * 48, "wanted a tuple, list or set"),
        ("chip_ids", [b"\0" * 9], r"chip_ids\[0\]: got 9 bytes, wanted 8 or 64 bytes"),
        ("csp_ids", "CN=x", "csp_ids: got 'CN=x', wanted a tuple, list or set"),
        ("csp_ids", [""], r"csp_ids\[0\]: got '', wanted a text that is not empty"),
        ("csp_ids", [b"CN=x"], r"csp_ids\[0\]: got b'CN=x'"),
        ("vmpl", 4, "vmpl: got 4, wanted an integer of 0 to 3"),
        ("vmpl", True, "vmpl: got True, wanted an integer of 0 to 3"),
        ("vmpl", -1, "vmpl: got -1"),
        ("minimum_guest_svn", 1 << 32, "wanted an integer of 0 to 4294967295"),
        ("minimum_abi", (1, 256), r"minimum_abi: got \(1, 256\), wanted major and minor of 0 to 255"),
        ("minimum_abi", (1, -1), "wanted major and minor"),
        ("minimum_abi", "1.51", "wanted two integers: major, minor"),
        ("minimum_abi", (1, 2, 3), "wanted two integers"),
        ("minimum_abi", (1, True), "wanted two integers"),
        ("minimum_abi", [1, 51], "wanted two integers"),
        ("allow_debug", 1, "allow_debug: got 1, wanted true or false"),
        ("allow_debug", None, "allow_debug: got None, wanted true or false"),
        ("allow_smt", 0, "allow_smt: got 0, wanted true or false"),
        ("required_platform_info", 0, "required_platform_info: got 0, wanted some of the 64 bits"),
        ("required_platform_info", 1 << 64, "wanted some of the 64 bits"),
        ("required_platform_info", True, "wanted some of the 64 bits"),
        ("required_platform_info", ["ecc_en"], "wanted some of the 64 bits"),
        ("minimum_tcb", {"Milan": {"snp": 1}}, "minimum_tcb: got 'Milan', wanted a Product"),
        ("minimum_tcb", [MILAN], "minimum_tcb: got .*, wanted levels per product"),
        ("minimum_tcb", {MILAN: {}}, "minimum_tcb.Milan: got {}, wanted levels of boot_loader, tee"),
        ("minimum_tcb", {MILAN: 3}, "minimum_tcb.Milan: got 3"),
        ("minimum_tcb", {MILAN: {"fmc": 1}}, "minimum_tcb.Milan: got 'fmc', wanted one of boot_loader"),
        ("minimum_tcb", {MILAN: {"snp": 256}}, "minimum_tcb.Milan.snp: got 256, wanted an integer of 0 to"),
        ("minimum_tcb", {MILAN: {"snp": True}}, "minimum_tcb.Milan.snp: got True"),
        ("minimum_tcb", {MILAN: {"snp": 1.0}}, "minimum_tcb.Milan.snp: got 1.0"),
        ("minimum_tcb", {MILAN: {"snp": "1"}}, "minimum_tcb.Milan.snp: got '1'"),
    ],
)
def test_what_is_no_policy(name: str, value: Any, text: str) -> None:
    """A demand of another form is the caller's mistake, told by field, got and wanted."""
    with pytest.raises(UsageError, match=f"^policy: .*{text}"):
        Policy(**{name: value})


def test_a_policy_keeps_what_it_was_given() -> None:
    """Later changes of the caller's objects do not change a policy; it travels to other processes."""
    listed, levels = [b"\x01" * 48], {MILAN: {"snp": 1}}
    given: Any = bytearray(32)
    policy = Policy(measurements=listed, minimum_tcb=levels, host_data=given)
    listed.append(b"\x02" * 48)
    levels[MILAN]["snp"] = 0
    assert policy == Policy(measurements={b"\x01" * 48}, minimum_tcb={MILAN: {"snp": 1}}, host_data=bytes(32))
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert len({policy, Policy(measurements={b"\x01" * 48})}) == 2
