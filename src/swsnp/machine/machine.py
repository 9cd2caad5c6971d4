"""The host with its one chip."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from swsnp.abi.snp_report import AttestationReport, Product
from swsnp.crypto.derive import SeededEntropy
from swsnp.errors import UsageError
from swsnp.firmware.chip import Chip
from swsnp.firmware.mailbox import Mailbox
from swsnp.firmware.settings import preset
from swsnp.guest.driver import K_C, OWN_VMPL
from swsnp.hardware.memory import SystemMemory
from swsnp.hardware.rmp import Rmp
from swsnp.hypervisor import profiles
from swsnp.hypervisor.kvm_api import HostKernelModel
from swsnp.machine.virtual_machine import VirtualMachine
from swsnp.trace import Trace
from swsnp.vmm.certs import BlobFile, BytesSource, CallableSource
from swsnp.vmm.config import DEFAULT_POLICY, VmConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.abi.snp_report import TcbVersion
    from swsnp.amd_ca.manufacture import Hierarchy
    from swsnp.firmware.settings import ChipSettings
    from swsnp.guest.driver import Clock, DriverGeneration
    from swsnp.hypervisor.memory import NestedPaging
    from swsnp.hypervisor.neighbours import Processor
    from swsnp.vmm.certs import CertificateSource

__all__ = ["Certs", "Machine", "SEEDED_NOW", "utc_now"]

Certs: TypeAlias = "Path | str | bytes | Callable[[], bytes] | CertificateSource | None"
"""Where a VM's certificates come from: a blob's path, its bytes, a callable, a source; None: nowhere."""

SEEDED_NOW: Final = datetime(2026, 1, 1, tzinfo=UTC)
"""The date of a seeded machine, so that its certificates are the same on any day."""
_SECRET_SIZE: Final = 32


def utc_now() -> datetime:
    """The present, aware."""
    return datetime.now(UTC)


class _OneAtATime:
    """The mailbox behind one lock: a secure processor does one thing at a time."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._command = mailbox.command
        self._lock = threading.Lock()

    def command(self, command: int, buffer: int) -> int:
        with self._lock:
            return self._command(command, buffer)


class Machine:
    """A host with one chip. VMs share the chip and nothing else.

    Args:
        product: which chip.
        profile: which KVM; see `hypervisor.profiles`.
        seed: makes ids, keys, messages, reports and signatures equal byte for byte between processes, given
            the same calls in the same order. Whoever knows the seed knows every key.
        settings: versions, TCB and features of the chip; the product's preset by default.
        engine: who signs reports: "cryptography", or "awscrt" (extra `fast`), which cannot be seeded.
        amd_names: AMD's names in the certificates, for programs that insist; the root stays this machine's.
        generation: which sev-guest driver the built-in guest has.
        clock: for the guest driver's pauses.
        entropy: where randomness comes from without a seed.
        now: the time for certificates; a seeded machine's is `SEEDED_NOW`.
    """

    def __init__(
        self,
        *,
        product: Product = Product.MILAN,
        profile: str = profiles.DEFAULT,
        seed: bytes | None = None,
        settings: ChipSettings | None = None,
        engine: Literal["cryptography", "awscrt"] = "cryptography",
        amd_names: bool = False,
        generation: DriverGeneration = K_C,
        clock: Clock = time,
        entropy: Callable[[int], bytes] = os.urandom,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self.product = product
        self.profile = profiles.profile(profile)
        self.trace = Trace()
        self.now = now if seed is None else lambda: SEEDED_NOW
        self.generation, self.clock, self._amd_names = generation, clock, amd_names
        stream = SeededEntropy(seed).child if seed is not None else lambda _: entropy
        self._ca_entropy = None if seed is None and entropy is os.urandom else stream("ca")
        self.chip = Chip(
            product=product,
            secret=stream("chip")(_SECRET_SIZE),
            settings=settings or preset(product),
            entropy=stream("firmware"),
            deterministic=seed is not None,
            engine=engine,
        )
        memory, rmp = SystemMemory(), Rmp()
        self.mailbox = Mailbox(self.chip, memory=memory, rmp=rmp, trace=self.trace)
        self.kernel = HostKernelModel(
            profile=self.profile,
            mailbox=_OneAtATime(self.mailbox),
            memory=memory,
            rmp=rmp,
            trace=self.trace,
            processors=lambda memory, name, vcpu: self._makers[name](memory, vcpu),
        )
        self._makers: dict[str, Callable[[NestedPaging, int], Processor]] = {}
        self._ca_lock = threading.RLock()
        self._hierarchy: Hierarchy | None = None
        self._tables: dict[TcbVersion, bytes] = {}
        self._vm_count = 0

    # Certificates

    @property
    def hierarchy(self) -> Hierarchy:
        """The machine's own ARK, ASK and ASVK; keys are made at first use, which takes seconds."""
        with self._ca_lock:
            if self._hierarchy is None:
                from swsnp.amd_ca.manufacture import Hierarchy

                self._hierarchy = Hierarchy(
                    self.product, entropy=self._ca_entropy, now=self.now, amd_names=self._amd_names
                )
            return self._hierarchy

    @property
    def root_certificate(self) -> bytes:
        """The ARK, DER. Trusting it is trusting this machine, and nothing else."""
        with self._ca_lock:
            return self.hierarchy.ark

    def vcek_certificate(self, tcb: TcbVersion | None = None) -> bytes:
        """The chip's VCEK certificate for a TCB, DER; for the reported one by default.

        Raises:
            UsageError: a TCB above the committed one.
        """
        tcb = self.chip.reported_tcb if tcb is None else tcb
        x, y = self.chip.vcek_public_point(tcb)
        with self._ca_lock:
            return self.hierarchy.vcek(x, y, self.chip.chip_id[: self.product.hwid_size], tcb)

    def certificate_table(self) -> bytes:
        """VCEK, ASK and ARK as the host would provision them for the chip's reported TCB."""
        with self._ca_lock:
            tcb = self.chip.reported_tcb
            if tcb not in self._tables:
                self._tables[tcb] = self.hierarchy.table(vcek=self.vcek_certificate(tcb))
            return self._tables[tcb]

    def _own_source(self) -> CertificateSource:
        return CallableSource(self.certificate_table, name="the machine's table")

    def certificates_of(self, report: bytes) -> tuple[bytes, ...]:
        """What a key service answers for a report of this machine: VCEK, ASK and ARK, DER.

        Raises:
            UsageError: the report is another chip's.
        """
        parsed = AttestationReport.parse(report)
        if parsed.chip_id != self.chip.chip_id:
            raise UsageError("report: its chip id is not this machine's; ask the machine that made it")
        with self._ca_lock:
            return self.vcek_certificate(parsed.reported_tcb), self.hierarchy.ask, self.hierarchy.ark

    # Virtual machines

    def create_vm(
        self,
        name: str | None = None,
        *,
        certs: Certs | Literal["machine"] = "machine",
        vcpus: int = 1,
        policy: int = DEFAULT_POLICY,
        host_data: bytes = bytes(32),
        config: VmConfig | None = None,
        vmpck_id: int = OWN_VMPL,
    ) -> VirtualMachine:
        """Launch a VM with the built-in guest; `boot` it next.

        Args:
            name: in trace events; unique on this machine.
            certs: where its certificates come from; "machine" is this machine's own table. A KVM without a
                certificate exit serves none.
            vcpus: how many.
            policy: guest policy.
            host_data: 32 bytes.
            config: everything at once, in place of the arguments above.
            vmpck_id: the driver's module parameter.

        Raises:
            UsageError: a configuration that cannot be, or a name that is taken.
            LaunchError: KVM or firmware refused the launch.
        """
        if config is None:
            self._vm_count += 1
            config = VmConfig(
                name=name or f"vm{self._vm_count}",
                vcpus=vcpus,
                policy=policy,
                host_data=host_data,
                certs=self._own_source() if certs == "machine" else _source(certs),
            )
        if self.profile.cert_exit is None:
            config = replace(config, certs=None)
        if config.name in self._makers:
            raise UsageError(f"VM name: {config.name!r} is taken on this machine")
        return VirtualMachine(
            self.kernel.task(config.name),
            config,
            makers=self._makers,
            dialect=self.profile.name,
            trace=self.trace,
            generation=self.generation,
            clock=self.clock,
            vmpck_id=vmpck_id,
        )


def _source(certs: Certs) -> CertificateSource | None:
    match certs:
        case None:
            return None
        case str() | Path():
            return BlobFile(Path(certs))
        case bytes():
            return BytesSource(certs)
        case _ if callable(certs):
            return CallableSource(certs)
        case _:
            return certs
