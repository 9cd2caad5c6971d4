"""Checks Y1 to Y23: the report against the relying party's policy.

`compile_policy` looks at the policy once and keeps the checks that it asks for, so that a verification runs
no others. Source: AMD 56860, ATTESTATION_REPORT.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, TypeAlias

from swsnp.abi.snp_report import GuestPolicy
from swsnp.verify.relations import shown
from swsnp.verify.result import mask

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from swsnp.abi.snp_report import AttestationReport, Product, TcbVersion
    from swsnp.verify.policy import Policy
    from swsnp.verify.result import Findings
    from swsnp.verify.shared_report import Own

    Check: TypeAlias = Callable[[AttestationReport, Product | None, Findings], None]
    OwnCheck: TypeAlias = Callable[[Own, Product | None, Findings], None]

__all__ = ["Compiled", "check_given", "compile_policy"]

_NO_DIGEST: Final = bytes(48)
_CHIP_ID: Final = 64
_Y3: Final = mask("Y3")
_Y4: Final = mask("Y4")
_MIT_VECTORS_FROM: Final = 5
_EXACT: Final = (
    ("Y6", "family_id", 0x010),
    ("Y7", "image_id", 0x020),
    ("Y9", "report_id_ma", 0x160),
)


def check_given(
    report_data: bytes,
    measurement: bytes,
    wanted_data: tuple[bytes, ...],
    wanted_measurements: tuple[frozenset[bytes], ...],
    findings: Findings,
) -> None:
    """What makes a report this guest's, now.

    Y3. REPORT_DATA equals what the caller and the policy say; without it, evidence can be replayed.
    Y4. MEASUREMENT is the caller's, and one of the policy's; without it, any guest will do.

    Args:
        report_data: the report's.
        measurement: the report's.
        wanted_data: of the policy and of the call, as far as given; all have to match.
        wanted_measurements: the same; of each, one has to match.
        findings: where to write; a check without anything to compare with is not concluded.
    """
    for wanted in wanted_data:
        if report_data != wanted:
            findings.fail("Y3", "REPORT_DATA", report_data.hex(), wanted.hex(), offset=0x50)
    if wanted_data:
        findings.made |= _Y3
    for alternatives in wanted_measurements:
        if measurement not in alternatives:
            findings.fail("Y4", "MEASUREMENT", measurement.hex(), _listed(alternatives), offset=0x90)
    if wanted_measurements:
        findings.made |= _Y4


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """A policy made ready: its checks and their mask, what Y3 and Y4 compare with, and what it leaves open.

    `own` are the checks that look at what is a report's own, `shared` all others. `not_checked` is found by
    whether the call gives report data, and whether it gives a measurement. Equal to itself alone.
    """

    policy: Policy
    shared: tuple[Check, ...]
    own: tuple[OwnCheck, ...]
    made: int
    report_data: tuple[bytes, ...]
    measurements: tuple[frozenset[bytes], ...]
    not_checked: dict[tuple[bool, bool], tuple[str, ...]]


@lru_cache(maxsize=64)
def compile_policy(policy: Policy) -> Compiled:
    """The checks Y1, Y2 and Y5 to Y23 that this policy asks for.

    Y1. POLICY.DEBUG is clear, unless `allow_debug`.
    Y2. POLICY.MIGRATE_MA is clear, unless `allow_migrate_ma`.
    Y5. HOST_DATA equals `host_data`.
    Y6. FAMILY_ID equals `family_id`.
    Y7. IMAGE_ID equals `image_id`.
    Y8. REPORT_ID is one of `report_ids`.
    Y9. REPORT_ID_MA equals `report_id_ma`.
    Y10. VMPL equals `vmpl`, and is at most `maximum_vmpl`; a host's own request is above every maximum.
    Y11. GUEST_SVN is at least `minimum_guest_svn`.
    Y12. POLICY.ABI is at least `minimum_abi`: the guest runs on no older firmware interface.
    Y13. POLICY.SMT and POLICY.CXL_ALLOW are clear where `allow_smt` or `allow_cxl` is False.
    Y14. POLICY has every bit whose `require_...` is set.
    Y15. ID_KEY_DIGEST is one of `id_key_digests`; with `require_id_block`, it is not zero. A digest that is
        not listed means nothing: anyone can sign an ID block.
    Y16. The same for AUTHOR_KEY_DIGEST, `author_key_digests` and `require_author_key` (AUTHOR_KEY_EN is set).
    Y17. PLATFORM_INFO has all of `required_platform_info`, nothing of `forbidden_platform_info` and, with
        `refuse_unknown_platform_info`, no bit without a name here.
    Y18. REPORTED_TCB is at least `minimum_tcb` in every component listed for the report's product; a product
        without any is refused.
    Y19. LAUNCH_TCB and `minimum_launch_tcb`, likewise.
    Y20. CURRENT version is at least `minimum_version` and CURRENT build, on its own, `minimum_build`.
    Y21. LAUNCH_MIT_VECTOR has all bits of `launch_mit_vector`; before version 5 there is none.
    Y22. CURRENT_MIT_VECTOR and `current_mit_vector`, likewise.
    Y23. CHIP_ID is one of `chip_ids`; the 8 bytes of Turin may stand without their zeros.
    """
    shared: dict[str, Check] = {
        "Y1": _waivable("Y1", "debug", policy.allow_debug),
        "Y2": _waivable("Y2", "migrate_ma", policy.allow_migrate_ma),
    }
    own: dict[str, OwnCheck] = {}
    if policy.host_data is not None:
        own["Y5"] = _exact("Y5", "host_data", policy.host_data, 0x0C0)
    for check, name, offset in _EXACT:
        if policy.demands(name):
            shared[check] = _exact(check, name, getattr(policy, name), offset)
    if policy.report_ids:
        own["Y8"] = _one_of("Y8", "report_id", frozenset(policy.report_ids), 0x140)
    if policy.chip_ids:
        listed = frozenset(each.ljust(_CHIP_ID, b"\0") for each in policy.chip_ids)
        own["Y23"] = _one_of("Y23", "chip_id", listed, 0x1A0)
    for check, names, make in _MADE_BY:
        if any(map(policy.demands, names)):
            shared[check] = make(policy)
    return Compiled(
        policy=policy,
        shared=tuple(shared.values()),
        own=tuple(own.values()),
        made=mask(*shared, *own),
        report_data=() if policy.report_data is None else (policy.report_data,),
        measurements=(frozenset(policy.measurements),) if policy.measurements else (),
        not_checked=_not_checked(policy),
    )


def _not_checked(policy: Policy) -> dict[tuple[bool, bool], tuple[str, ...]]:
    """What demands nothing, when the call gives report data, and when it gives a measurement."""
    unset = policy.unset()
    return {
        (data, measurement): tuple(
            name
            for name in unset
            if not (data and name == "report_data") and not (measurement and name == "measurements")
        )
        for data in (False, True)
        for measurement in (False, True)
    }


def _waivable(check: str, name: str, waived: bool) -> Check:
    field = f"POLICY.{name.upper()}"
    bit = GuestPolicy.ranges()[name].mask

    def apply(report: AttestationReport, product: Product | None, findings: Findings) -> None:
        if report.policy & bit:
            if waived:
                findings.warn(check, f"{field} is set and was allowed", field=field)
            else:
                findings.fail(check, field, 1, 0, offset=0x08)

    return apply


def _exact(
    check: str, name: str, wanted: bytes, offset: int
) -> Callable[[AttestationReport | Own, Product | None, Findings], None]:
    def apply(report: AttestationReport | Own, product: Product | None, findings: Findings) -> None:
        got: bytes = getattr(report, name)
        if got != wanted:
            findings.fail(check, name.upper(), got.hex(), wanted.hex(), offset=offset)

    return apply


def _one_of(check: str, name: str, wanted: frozenset[bytes], offset: int) -> OwnCheck:
    def apply(own: Own, product: Product | None, findings: Findings) -> None:
        got: bytes = getattr(own, name)
        if got not in wanted:
            findings.fail(check, name.upper(), got.hex(), _listed(wanted), offset=offset)

    return apply


def _vmpl(policy: Policy) -> Check:
    exact, maximum = policy.vmpl, policy.maximum_vmpl

    def apply(report: AttestationReport, product: Product | None, findings: Findings) -> None:
        if exact is not None and report.vmpl != exact:
            findings.fail("Y10", "VMPL", f"{report.vmpl:#x}", exact, offset=0x30)
        if maximum is not None and report.vmpl > maximum:
            findings.fail("Y10", "VMPL", f"{report.vmpl:#x}", f"at most {maximum}", offset=0x30)

    return apply


def _guest_svn(policy: Policy) -> Check:
    least = policy.minimum_guest_svn or 0

    def apply(report: AttestationReport, product: Product | None, findings: Findings) -> None:
        if report.guest_svn < least:
            findings.fail("Y11", "GUEST_SVN", report.guest_svn, f"at least {least}", offset=0x04)

    return apply


def _abi(policy: Policy) -> Check:
    least = policy.minimum_abi or (0, 0)

    def apply(report: AttestationReport, product: Product | None, findings: Findings) -> None:
        abi = (report.policy.abi_major, report.policy.abi_minor)
        if abi < least:
            findings.fail("Y12", "POLICY.ABI", _dotted(abi), f"at least {_dotted(least)}", offset=0x08)

    return apply


def _forbidden(policy: Policy) -> Check:
    pairs = (("smt", policy.allow_smt), ("cxl_allow", policy.allow_cxl))
    names = tuple(name for name, allowed in pairs if allowed is False)

    def apply(report: AttestationReport, product: Product | None, findings: Findings) -> None:
        for name in names:
            if getattr(report.policy, name):
                findings.fail("Y13", f"POLICY.{name.upper()}", 1, 0, offset=0x08)

    return apply


def _required(policy: Policy) -> Check:
    names = tuple(name.removeprefix("require_") for name in _REQUIRED_BITS if policy.demands(name))

    def apply(report: AttestationReport, product: Product | None, findings: Findings) -> None:
        for name in names:
            if not getattr(report.policy, name):
                findings.fail("Y14", f"POLICY.{name.upper()}", 0, 1, offset=0x08)

    return apply


def _id_block(policy: Policy) -> Check:
    listed, required = frozenset(policy.id_key_digests), policy.require_id_block

    def apply(report: AttestationReport, product: Product | None, findings: Findings) -> None:
        digest = report.id_key_digest
        if required and digest == _NO_DIGEST:
            findings.fail("Y15", "ID_KEY_DIGEST", "zero (no ID block)", "an ID key's digest", offset=0xE0)
        if listed and digest not in listed:
            findings.fail("Y15", "ID_KEY_DIGEST", digest.hex(), _listed(listed), offset=0xE0)

    return apply


def _author_key(policy: Policy) -> Check:
    listed, required = frozenset(policy.author_key_digests), policy.require_author_key

    def apply(report: AttestationReport, product: Product | None, findings: Findings) -> None:
        digest = report.author_key_digest
        if required and not report.signer_info.author_key_en:
            findings.fail("Y16", "AUTHOR_KEY_EN", 0, 1, offset=0x48)
        if listed and digest not in listed:
            findings.fail("Y16", "AUTHOR_KEY_DIGEST", digest.hex(), _listed(listed), offset=0x110)

    return apply


def _platform(policy: Policy) -> Check:
    required, forbidden = policy.required_platform_info or 0, policy.forbidden_platform_info or 0
    strict = policy.refuse_unknown_platform_info

    def apply(report: AttestationReport, product: Product | None, findings: Findings) -> None:
        got = report.platform_info
        if required & ~got:
            wanted = f"all of {required:#x}"
            findings.fail("Y17", "PLATFORM_INFO", f"{int(got):#x}", wanted, offset=0x40)
        if forbidden & got:
            wanted = f"nothing of {forbidden:#x}"
            findings.fail("Y17", "PLATFORM_INFO", f"{int(got):#x}", wanted, offset=0x40)
        if strict and got.unnamed():
            wanted = "no bits that are not known here"
            findings.fail("Y17", "PLATFORM_INFO", f"{got.unnamed():#x}", wanted, offset=0x40)

    return apply


def _reported_tcb(policy: Policy) -> Check:
    return _minimum_tcb("Y18", "reported_tcb", policy.minimum_tcb, 0x180)


def _launch_tcb(policy: Policy) -> Check:
    return _minimum_tcb("Y19", "launch_tcb", policy.minimum_launch_tcb, 0x1F0)


def _minimum_tcb(check: str, name: str, minimum: Mapping[Product, Mapping[str, int]], offset: int) -> Check:
    field = name.upper()

    def apply(report: AttestationReport, product: Product | None, findings: Findings) -> None:
        least = None if product is None else minimum.get(product)
        if product is None or least is None:
            line = "an unknown product" if product is None else product.value
            listed = ", ".join(each.value for each in minimum)
            findings.fail(check, field, f"a report of {line}", f"one of {listed}", offset=offset)
        else:
            tcb: TcbVersion = getattr(report, name)
            levels = tcb.decode(product)
            low = [f"{part} at least {level}" for part, level in least.items() if levels[part] < level]
            if low:
                findings.fail(check, field, shown(tcb), ", ".join(low), offset=offset)

    return apply


def _firmware(policy: Policy) -> Check:
    version, build = policy.minimum_version or (0, 0), policy.minimum_build or 0

    def apply(report: AttestationReport, product: Product | None, findings: Findings) -> None:
        current = (report.current_major, report.current_minor)
        if current < version:
            wanted = f"at least {_dotted(version)}"
            findings.fail("Y20", "CURRENT version", _dotted(current), wanted, offset=0x1E9)
        if report.current_build < build:
            findings.fail("Y20", "CURRENT build", report.current_build, f"at least {build}", offset=0x1E8)

    return apply


def _launch_mitigations(policy: Policy) -> Check:
    return _mitigations("Y21", "launch_mit_vector", policy.launch_mit_vector or 0, 0x1F8)


def _current_mitigations(policy: Policy) -> Check:
    return _mitigations("Y22", "current_mit_vector", policy.current_mit_vector or 0, 0x200)


def _mitigations(check: str, name: str, wanted: int, offset: int) -> Check:
    field = name.upper()

    def apply(report: AttestationReport, product: Product | None, findings: Findings) -> None:
        got: int = getattr(report, name)
        if report.version < _MIT_VECTORS_FROM:
            findings.fail(check, field, f"none in version {report.version}", f"{wanted:#x}", offset=offset)
        elif wanted & ~got:
            findings.fail(check, field, f"{got:#x}", f"all of {wanted:#x}", offset=offset)

    return apply


_REQUIRED_BITS: Final = (
    "require_single_socket",
    "require_mem_aes_256_xts",
    "require_rapl_dis",
    "require_ciphertext_hiding_dram",
    "require_page_swap_disable",
)
_MADE_BY: Final[tuple[tuple[str, tuple[str, ...], Callable[[Policy], Check]], ...]] = (
    ("Y10", ("vmpl", "maximum_vmpl"), _vmpl),
    ("Y11", ("minimum_guest_svn",), _guest_svn),
    ("Y12", ("minimum_abi",), _abi),
    ("Y13", ("allow_smt", "allow_cxl"), _forbidden),
    ("Y14", _REQUIRED_BITS, _required),
    ("Y15", ("id_key_digests", "require_id_block"), _id_block),
    ("Y16", ("author_key_digests", "require_author_key"), _author_key),
    (
        "Y17",
        ("required_platform_info", "forbidden_platform_info", "refuse_unknown_platform_info"),
        _platform,
    ),
    ("Y18", ("minimum_tcb",), _reported_tcb),
    ("Y19", ("minimum_launch_tcb",), _launch_tcb),
    ("Y20", ("minimum_version", "minimum_build"), _firmware),
    ("Y21", ("launch_mit_vector",), _launch_mitigations),
    ("Y22", ("current_mit_vector",), _current_mitigations),
)
"""Check, fields of the policy that ask for it, and what makes it."""


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _listed(wanted: frozenset[bytes]) -> str:
    return " or ".join(sorted(each.hex() for each in wanted))
