"""What a relying party demands of a report, and what it waives. The defaults are the strict ones.

Source: AMD 56860, ATTESTATION_REPORT, guest policy and PLATFORM_INFO. Every field is described key by key in
docs/policy.md; `policy_file` reads the same from JSON or TOML.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

from swsnp.errors import UsageError
from swsnp.verify.policy_forms import (
    Bits,
    Choice,
    Flag,
    Form,
    Hex,
    HexSet,
    Levels,
    Number,
    Texts,
    Version,
    Wrong,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from swsnp.abi.snp_report import PlatformInfo, Product

__all__ = ["Entry", "Policy", "entries"]

_U32: Final = (1 << 32) - 1
_U64: Final = (1 << 64) - 1


def _of(form: Form, check: str, *, waives: bool = False) -> dict[str, Any]:
    """What is known of a field: its form, the check that applies it, and whether True lets something pass."""
    return {"form": form, "check": check, "waives": waives}


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of one field of `Policy`: `check` applies it; a field that waives is never unset."""

    name: str
    form: Form
    check: str
    waives: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A relying party's demands. A field that is None, empty or False is not checked, or nothing is waived.

    Collections are alternatives: one of them has to match. Bytes have the size of the report's field.

    Raises:
        UsageError: a value of another type, size or range than its field has.
    """

    # what the guest is
    report_data: bytes | None = field(default=None, metadata=_of(Hex((64,)), "Y3"))
    measurements: Collection[bytes] = field(default=frozenset(), metadata=_of(HexSet((48,)), "Y4"))
    host_data: bytes | None = field(default=None, metadata=_of(Hex((32,)), "Y5"))
    family_id: bytes | None = field(default=None, metadata=_of(Hex((16,)), "Y6"))
    image_id: bytes | None = field(default=None, metadata=_of(Hex((16,)), "Y7"))
    report_ids: Collection[bytes] = field(default=frozenset(), metadata=_of(HexSet((32,)), "Y8"))
    report_id_ma: bytes | None = field(default=None, metadata=_of(Hex((32,)), "Y9"))
    vmpl: int | None = field(default=None, metadata=_of(Number(0, 3), "Y10"))
    maximum_vmpl: int | None = field(default=None, metadata=_of(Number(0, 3), "Y10"))
    minimum_guest_svn: int | None = field(default=None, metadata=_of(Number(0, _U32), "Y11"))
    id_key_digests: Collection[bytes] = field(default=frozenset(), metadata=_of(HexSet((48,)), "Y15"))
    require_id_block: bool = field(default=False, metadata=_of(Flag(), "Y15"))
    author_key_digests: Collection[bytes] = field(default=frozenset(), metadata=_of(HexSet((48,)), "Y16"))
    require_author_key: bool = field(default=False, metadata=_of(Flag(), "Y16"))
    accept_host_report: bool = field(default=False, metadata=_of(Flag(), "R8", waives=True))

    # what the guest's owner allowed its host: POLICY
    allow_debug: bool = field(default=False, metadata=_of(Flag(), "Y1", waives=True))
    allow_migrate_ma: bool = field(default=False, metadata=_of(Flag(), "Y2", waives=True))
    minimum_abi: tuple[int, int] | None = field(default=None, metadata=_of(Version(), "Y12"))
    allow_smt: bool | None = field(default=None, metadata=_of(Choice(), "Y13"))
    allow_cxl: bool | None = field(default=None, metadata=_of(Choice(), "Y13"))
    require_single_socket: bool = field(default=False, metadata=_of(Flag(), "Y14"))
    require_mem_aes_256_xts: bool = field(default=False, metadata=_of(Flag(), "Y14"))
    require_rapl_dis: bool = field(default=False, metadata=_of(Flag(), "Y14"))
    require_ciphertext_hiding_dram: bool = field(default=False, metadata=_of(Flag(), "Y14"))
    require_page_swap_disable: bool = field(default=False, metadata=_of(Flag(), "Y14"))

    # what the platform is
    required_platform_info: PlatformInfo | None = field(default=None, metadata=_of(Bits(), "Y17"))
    forbidden_platform_info: PlatformInfo | None = field(default=None, metadata=_of(Bits(), "Y17"))
    refuse_unknown_platform_info: bool = field(default=False, metadata=_of(Flag(), "Y17"))
    minimum_tcb: Mapping[Product, Mapping[str, int]] = field(
        default_factory=dict, hash=False, metadata=_of(Levels(), "Y18")
    )
    minimum_launch_tcb: Mapping[Product, Mapping[str, int]] = field(
        default_factory=dict, hash=False, metadata=_of(Levels(), "Y19")
    )
    minimum_build: int | None = field(default=None, metadata=_of(Number(0, 255), "Y20"))
    minimum_version: tuple[int, int] | None = field(default=None, metadata=_of(Version(), "Y20"))
    require_committed_current: bool = field(default=False, metadata=_of(Flag(), "R4"))
    launch_mit_vector: int | None = field(default=None, metadata=_of(Number(0, _U64), "Y21"))
    current_mit_vector: int | None = field(default=None, metadata=_of(Number(0, _U64), "Y22"))
    chip_ids: Collection[bytes] = field(default=frozenset(), metadata=_of(HexSet((8, 64)), "Y23"))
    require_chip_id: bool = field(default=False, metadata=_of(Flag(), "R3"))
    csp_ids: Collection[str] = field(default=frozenset(), metadata=_of(Texts(), "R3"))

    # what the certificates are
    require_crl: bool = field(default=False, metadata=_of(Flag(), "C10"))
    maximum_crl_age_s: int | None = field(default=None, metadata=_of(Number(0, _U32), "C10"))
    allow_expired_leaf: bool = field(default=False, metadata=_of(Flag(), "C8", waives=True))

    def __post_init__(self) -> None:
        for each in _ENTRIES:
            try:
                kept = each.form.keep(getattr(self, each.name))
            except Wrong as wrong:
                raise UsageError(f"policy: {each.name}{wrong.key}: {wrong}") from None
            object.__setattr__(self, each.name, kept)

    def unset(self) -> tuple[str, ...]:
        """Names of the fields that demand nothing, in order; those that only waive are not among them."""
        return tuple(each.name for each in _ENTRIES if not each.waives and not self.demands(each.name))

    def demands(self, name: str) -> bool:
        """Whether the field of that name is set. Zero is a demand, as in `vmpl=0`."""
        return bool(getattr(self, name) != _NOTHING[name])


def entries() -> tuple[Entry, ...]:
    """Every field, in the order of declaration."""
    return _ENTRIES


_ENTRIES: Final = tuple(Entry(name=each.name, **each.metadata) for each in fields(Policy))
_NOTHING: Final = {each.name: each.form.nothing for each in _ENTRIES}
