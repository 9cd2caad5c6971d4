"""The guest context: what the firmware keeps of one guest. Source: AMD 56860, guest context.

The page itself is opaque to the host; the model keeps its content here and leaves zeros in the page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_launch import INITIAL_DIGEST, IdBlock
from swsnp.abi.snp_migration import MetadataEntry
from swsnp.abi.snp_report import GuestPolicy, TcbVersion
from swsnp.crypto.seal import KEY_SIZE, MessageKey

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.firmware.report import ReportTemplate
    from swsnp.firmware.settings import ApiVersion

__all__ = ["BoundKey", "GuestContext", "GuestState", "NO_MIGRATION_AGENT"]

NO_MIGRATION_AGENT: Final = (1 << 64) - 1
"""MA address of a guest without migration agent."""
_NO_REPORT_ID_MA: Final = b"\xff" * 32


class GuestState(IntEnum):
    """STATE of SNP_GUEST_STATUS."""

    INIT = 0
    LAUNCH = 1
    RUNNING = 2


class BoundKey(IntEnum):
    """Which key of the ID block derived keys are bound to."""

    NONE = 0
    ID_KEY = 1
    AUTHOR_KEY = 2


@dataclass(slots=True, kw_only=True)
class GuestContext:
    """One guest, from SNP_GCTX_CREATE to SNP_DECOMMISSION."""

    gctx_paddr: int
    launch_tcb: TcbVersion
    created_by: ApiVersion
    vek: bytes = field(repr=False)
    state: GuestState = GuestState.INIT
    policy: GuestPolicy = GuestPolicy(0)  # noqa: RUF009  # an int: immutable
    asid: int = 0
    active: bool = False
    """With an ASID: False is an activation that waits for SNP_LAUNCH_FINISH."""
    sockets: frozenset[int] = frozenset()
    """Sockets whose cores have the guest's key."""
    ld: bytes = INITIAL_DIGEST
    imd: bytes = INITIAL_DIGEST
    imi_en: bool = False
    gosvw: bytes = bytes(16)
    desired_tsc_khz: int = 0
    psp_tsc_offset: int = 0
    ma_paddr: int = NO_MIGRATION_AGENT
    launch_mit_vector: int = 0
    oek: bytes = field(default=b"", repr=False)
    oek_iv_count: int = 0
    """IVs that page swapping has used under the OEK."""
    root_md_entry: MetadataEntry = field(default_factory=MetadataEntry)
    vmrk: bytes = field(default=b"", repr=False)
    vmpcks: tuple[bytes, ...] = field(default=(), repr=False)
    message_keys: tuple[MessageKey, ...] = field(default=(), repr=False)
    message_counts: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    report_id: bytes = bytes(32)
    report_id_ma: bytes = _NO_REPORT_ID_MA
    host_data: bytes = bytes(32)
    id_block_en: bool = False
    id_block: IdBlock = field(default_factory=IdBlock)
    """All zero without an ID block."""
    id_key_digest: bytes = bytes(48)
    author_key_en: bool = False
    author_key_digest: bytes = bytes(48)
    vcek_dis: bool = False
    report_template: ReportTemplate | None = field(default=None, repr=False)

    def draw_secrets(self, entropy: Callable[[int], bytes]) -> None:
        """The random keys and REPORT_ID of a guest; at SNP_LAUNCH_START."""
        self.oek = entropy(KEY_SIZE)
        self.install_vmpcks(tuple(entropy(KEY_SIZE) for _ in range(4)))
        self.vmrk = entropy(KEY_SIZE)
        self.report_id = entropy(32)

    def install_vmpcks(self, vmpcks: tuple[bytes, ...]) -> None:
        """Talk to the guest under these keys from the next message on; VMPCK0..3."""
        self.vmpcks = vmpcks
        self.message_keys = tuple(MessageKey(key) for key in vmpcks)

    def erase(self) -> None:
        """Forget every key; at SNP_DECOMMISSION."""
        self.vek = self.oek = self.vmrk = b""
        self.vmpcks = self.message_keys = ()

    @property
    def has_migration_agent(self) -> bool:
        """Whether a migration agent may export this guest."""
        return self.ma_paddr != NO_MIGRATION_AGENT

    def bound_key(self) -> tuple[BoundKey, bytes]:
        """The key of the ID block that derived keys are bound to, and its digest."""
        if self.author_key_en:
            return BoundKey.AUTHOR_KEY, self.author_key_digest
        if self.id_block_en:
            return BoundKey.ID_KEY, self.id_key_digest
        return BoundKey.NONE, bytes(48)
