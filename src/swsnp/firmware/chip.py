"""The part: its identity, its settings, and the variables that outlive a reset of SNP. Source: AMD 56860."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_report import PlatformInfo, Product, TcbVersion
from swsnp.crypto.ecdsa import Engine, SigningKey
from swsnp.errors import UsageError
from swsnp.firmware import keys
from swsnp.firmware.keys import VlekKey
from swsnp.firmware.settings import ApiVersion, ChipSettings, fms_eax, preset

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ApiVersion", "Chip", "ChipSettings", "PlatformVariables", "VlekKey", "preset"]

_NO_TCB: Final = TcbVersion(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformVariables:
    """What SNP_CONFIG, SNP_COMMIT, SNP_INIT_EX, updates and a loaded VLEK change.

    Replaced as a whole, so that whoever built something from them sees by identity whether it still holds.
    """

    current_tcb: TcbVersion
    committed_tcb: TcbVersion
    current_version: ApiVersion
    committed_version: ApiVersion
    reported_override: TcbVersion = _NO_TCB
    mask_chip_id: bool = False
    mask_chip_key: bool = False
    vlek: VlekKey | None = None
    rapl_dis: bool = False
    ciphertext_hiding_en: bool = False
    mit_vector: int = 0

    @property
    def reported_tcb(self) -> TcbVersion:
        """REPORTED_TCB: the override of SNP_CONFIG if there is one, else the committed TCB."""
        return self.reported_override or self.committed_tcb


class Chip:
    """One secure processor.

    Args:
        product: its product line; decides the form of TCB_VERSION and chip id.
        secret: 32 bytes; everything that identifies the chip is derived from it.
        settings: what it is set to; the product's preset if left out.
        entropy: source of the random keys of its guests.
        deterministic: sign with nonces of RFC 6979. With a seeded `entropy` all that the chip does is then
            equal byte for byte in every run.
        engine: what computes signatures.

    Raises:
        LayoutError: a secret that is not 32 bytes.
        UsageError: deterministic signatures from an engine that cannot give them.
    """

    def __init__(
        self,
        *,
        product: Product,
        secret: bytes,
        settings: ChipSettings | None = None,
        entropy: Callable[[int], bytes] = os.urandom,
        deterministic: bool = False,
        engine: Engine = "cryptography",
    ) -> None:
        self.product = product
        self.settings = preset(product) if settings is None else settings
        self.entropy = entropy
        self._secret = secret
        self._deterministic = deterministic
        self._engine = engine
        self._vceks: dict[TcbVersion, SigningKey] = {}
        self._vlek_signer: tuple[VlekKey, SigningKey] | None = None
        self.chip_ids = tuple(keys.chip_id(secret, product, socket=n) for n in range(self.settings.sockets))
        self.variables = PlatformVariables(
            current_tcb=self.settings.current_tcb,
            committed_tcb=self.settings.committed_tcb,
            current_version=self.settings.current_version,
            committed_version=self.settings.committed_version,
            rapl_dis=self.settings.rapl_dis,
            ciphertext_hiding_en=self.settings.ciphertext_hiding_en,
            mit_vector=self.settings.mit_vector,
        )
        self.vcek(self.reported_tcb)  # an impossible engine is refused here, not at the first report

    def __repr__(self) -> str:
        return f"Chip({self.product.value}, chip_id={self.chip_id.hex()[:16]}…, secret withheld)"

    @property
    def chip_id(self) -> bytes:
        """64 bytes, those of socket 0; what reports carry unless masked."""
        return self.chip_ids[0]

    @property
    def reported_tcb(self) -> TcbVersion:
        """REPORTED_TCB of this moment."""
        return self.variables.reported_tcb

    @property
    def fms(self) -> int:
        """Family, model, stepping as CPUID Fn1 EAX."""
        return fms_eax(self.settings)

    @property
    def platform_info(self) -> PlatformInfo:
        """PLATFORM_INFO of reports."""
        settings, variables = self.settings, self.variables
        named = PlatformInfo.of(
            smt_en=settings.smt_en,
            tsme_en=settings.tsme_en,
            ecc_en=settings.ecc_en,
            rapl_dis=variables.rapl_dis,
            ciphertext_hiding_dram_en=variables.ciphertext_hiding_en,
            alias_check_complete=settings.alias_check_complete,
        )
        return PlatformInfo(named | settings.platform_info_more)

    @property
    def supported_mitigations(self) -> int:
        """The mitigations that are in force or can come into force, a bit each."""
        return self.variables.mit_vector | self.settings.mit_supported

    def may_derive(self, tcb: TcbVersion) -> bool:
        """Whether keys for a TCB are this firmware's to derive: no component above the committed TCB."""
        committed = self.variables.committed_tcb.decode(self.product)
        return not any(tcb.reserved(self.product)) and tcb.decode(self.product).at_most(committed)

    def vcek(self, tcb: TcbVersion) -> SigningKey:
        """The VCEK for a TCB.

        Raises:
            UsageError: a component exceeds the committed TCB, or a reserved byte is not zero.
        """
        key = self._vceks.get(tcb)
        if key is None:
            self._require_derivable(tcb)
            scalar = keys.vcek_scalar(self._secret, self.product, tcb)
            key = self._vceks[tcb] = self._signing_key(scalar)
        return key

    def vcek_public_point(self, tcb: TcbVersion) -> tuple[bytes, bytes]:
        """X and Y of the VCEK for a TCB, big-endian, 48 bytes each; errors as `vcek`."""
        return self.vcek(tcb).public_point

    def vcek_root(self, tcb: TcbVersion) -> bytes:
        """The root of derived keys for a TCB, 48 bytes; errors as `vcek`."""
        self._require_derivable(tcb)
        return keys.vcek_root(self._secret, self.product, tcb)

    def _require_derivable(self, tcb: TcbVersion) -> None:
        if not self.may_derive(tcb):
            committed = self.variables.committed_tcb
            raise UsageError(
                f"VCEK: got TCB {tcb:#018x}, wanted no component above the committed {committed:#018x} "
                f"({self.product.value}): no firmware derives keys of a newer TCB"
            )

    def _signing_key(self, scalar: int) -> SigningKey:
        return SigningKey.from_scalar(scalar, deterministic=self._deterministic, engine=self._engine)

    def load_vlek(self, vlek: VlekKey) -> None:
        """Load a VLEK, in place of any other.

        Raises:
            UsageError: it was issued for another TCB than the reported one (the command says BAD_SVN).
        """
        if vlek.tcb != self.reported_tcb:
            raise UsageError(
                f"VLEK: got one for TCB {vlek.tcb:#018x}, wanted REPORTED_TCB {self.reported_tcb:#018x} "
                "(AMD 56860, SNP_VLEK_LOAD)"
            )
        self._vlek_signer = (vlek, self._signing_key(vlek.scalar))
        self.variables = replace(self.variables, vlek=vlek)

    def wipe_vlek(self) -> None:
        """Forget the loaded VLEK: SNP_SHUTDOWN does."""
        self._vlek_signer = None
        self.variables = replace(self.variables, vlek=None)

    def vlek_signer(self) -> SigningKey | None:
        """The key of the loaded VLEK."""
        return None if self._vlek_signer is None else self._vlek_signer[1]

    def configure(
        self,
        *,
        reported_tcb: TcbVersion = _NO_TCB,
        mask_chip_id: bool = False,
        mask_chip_key: bool = False,
    ) -> None:
        """SNP_CONFIG: set the reported TCB (0: the committed one of this moment) and both masks.

        Raises:
            UsageError: a TCB above the committed one.
        """
        if reported_tcb:
            self._require_derivable(reported_tcb)
        self.variables = replace(
            self.variables,
            reported_override=reported_tcb or self.variables.committed_tcb,
            mask_chip_id=mask_chip_id,
            mask_chip_key=mask_chip_key,
        )

    def commit(self) -> None:
        """SNP_COMMIT: what runs becomes the floor; the override of SNP_CONFIG is forgotten."""
        now = self.variables
        self.variables = replace(
            now,
            committed_tcb=now.current_tcb,
            committed_version=now.current_version,
            reported_override=_NO_TCB,
        )

    def verify_mitigation(self, mitigation: int) -> None:
        """SNP_VERIFY_MITIGATION: some supported mitigations come into force, a bit each.

        Raises:
            UsageError: one of them is not supported.
        """
        if lacking := mitigation & ~self.supported_mitigations:
            raise UsageError(
                f"mitigations: got {lacking:#x} beside the supported {self.supported_mitigations:#x} "
                "(AMD 56860, SNP_VERIFY_MITIGATION)"
            )
        self.variables = replace(self.variables, mit_vector=self.variables.mit_vector | mitigation)

    def update(self, *, current_tcb: TcbVersion, current_version: ApiVersion) -> None:
        """Other firmware or microcode runs from now on, not committed yet.

        Raises:
            UsageError: below the committed TCB: the part refuses to roll back.
        """
        committed = self.variables.committed_tcb.decode(self.product)
        if not committed.at_most(current_tcb.decode(self.product)):
            raise UsageError(
                f"firmware update: got TCB {current_tcb:#018x}, wanted no component below the committed "
                f"{self.variables.committed_tcb:#018x} (AMD 56860, SNP_DOWNLOAD_FIRMWARE_EX)"
            )
        self.variables = replace(self.variables, current_tcb=current_tcb, current_version=current_version)
