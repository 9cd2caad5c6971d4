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
from swsnp.crypto.ecdsa import SigningKey
from swsnp.errors import UsageError
from swsnp.firmware.chip import Chip
from swsnp.firmware.keys import vlek_key
from swsnp.firmware.mailbox import Mailbox
from swsnp.firmware.settings import preset
from swsnp.firmware.vlek import wrap
from swsnp.guest.driver import K_C, OWN_VMPL
from swsnp.hardware.memory import SystemMemory
from swsnp.hardware.rmp import Rmp
from swsnp.hardware.turn import Turn
from swsnp.hypervisor import profiles
from swsnp.hypervisor.kvm_api import HostKernelModel, no_cpuid
from swsnp.machine.built_in import stand_in_layout
from swsnp.machine.move import GuestContexts
from swsnp.machine.virtual_machine import VirtualMachine
from swsnp.machine.vlek import Vlek, load_hashstick
from swsnp.trace import Trace
from swsnp.vmm.certs import BlobFile, BytesSource, CallableSource
from swsnp.vmm.config import DEFAULT_POLICY, MODEL_CBITPOS, VmConfig
from swsnp.vmm.firmware_image import config_of_plan, image_of_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from swsnp.abi.acpi import VirtioPlace
    from swsnp.abi.snp_report import TcbVersion
    from swsnp.amd_ca.manufacture import Hierarchy
    from swsnp.firmware.settings import ChipSettings
    from swsnp.guest.boot import GuestLayout
    from swsnp.guest.driver import Clock, DriverGeneration
    from swsnp.hypervisor.memory import NestedPaging
    from swsnp.hypervisor.neighbours import Processor
    from swsnp.machine.kernel_vm import HostProcessor, KernelVm
    from swsnp.machine.move import SavedVm
    from swsnp.measure.kernel_image import KernelImage
    from swsnp.measure.launch_plan import LaunchConfig
    from swsnp.vmm.certs import CertificateSource
    from swsnp.vmm.config import LaunchImage
    from swsnp.vmm.run import IoBus
    from swsnp.vmm.stop import PowerSwitch

__all__ = ["Certs", "Machine", "SEEDED_NOW", "utc_now"]

Certs: TypeAlias = "Path | str | bytes | Callable[[], bytes] | CertificateSource | None"
"""Where a VM's certificates come from: a blob's path, its bytes, a callable, a source; None: nowhere."""

SEEDED_NOW: Final = datetime(2026, 1, 1, tzinfo=UTC)
"""The date of a seeded machine, so that its certificates are the same on any day."""
_SECRET_SIZE: Final = 32
_IV_SIZE: Final = 12


def utc_now() -> datetime:
    """The present, aware."""
    return datetime.now(UTC)


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
        same_root_as: a machine whose hierarchy certifies this one's chip too, as AMD's does all chips of a
            product line; `amd_names` is then the other's.
        processor: what the host's KVM offers (`kernel_vm.host_processor`), for VMs that run a kernel; C-bit
            and CPUID are then the host's.

    Raises:
        UsageError: a profile that is not known, or the root of another product line.
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
        same_root_as: Machine | None = None,
        processor: HostProcessor | None = None,
    ) -> None:
        if same_root_as is not None and same_root_as.product is not product:
            raise UsageError(f"same_root_as: got a {same_root_as.product.value}, wanted a {product.value}")
        self.product: Product = product
        self.profile = profiles.profile(profile)
        self.trace = Trace()
        self.now = now if seed is None else lambda: SEEDED_NOW
        self.generation, self.clock, self._amd_names = generation, clock, amd_names
        stream: Callable[[str], Callable[[int], bytes]]
        stream = SeededEntropy(seed).child if seed is not None else lambda _: entropy
        self._ca_entropy = None if seed is None and entropy is os.urandom else stream("ca")
        self.chip = Chip(
            product=product,
            secret=stream("chip")(_SECRET_SIZE),
            settings=settings or _settings_of(product, processor),
            entropy=stream("firmware"),
            deterministic=seed is not None,
            engine=engine,
        )
        self._processor = processor
        memory, rmp = SystemMemory(shareable=processor is not None), Rmp()
        # a secure processor does one thing at a time: the driver holds this over each command
        turn = Turn()
        self.mailbox = Mailbox(self.chip, memory=memory, rmp=rmp, trace=self.trace, lock=turn)
        self.kernel = HostKernelModel(
            profile=self.profile,
            mailbox=self.mailbox,
            psp_mutex=turn,
            max_asid=self.chip.settings.max_asid,
            memory=memory,
            rmp=rmp,
            trace=self.trace,
            processors=lambda memory, name, vcpu: self._makers[name](memory, vcpu),
            cbit=MODEL_CBITPOS if processor is None else processor.c_bit,
            cpuid=no_cpuid if processor is None else processor.cpuid,
            launch_large=processor is not None,
        )
        self._makers: dict[str, Callable[[NestedPaging, int], Processor]] = {}
        self._root_of = same_root_as
        self._ca_lock: AbstractContextManager[bool]
        self._ca_lock = threading.RLock() if same_root_as is None else same_root_as._ca_lock
        self._hierarchy: Hierarchy | None = None
        self._provider_secrets: dict[str, bytes] = {}
        self._stream = stream
        self._vlek_ivs = stream("vlek-iv")
        self._contexts = GuestContexts(self.mailbox, self.kernel.driver, turn)
        self._tables: dict[TcbVersion, bytes] = {}
        self._vm_count = 0

    # Certificates

    @property
    def hwid(self) -> bytes:
        """What the key service knows the chip by: its chip id, 64 bytes, of Turin 8."""
        return self.chip.chip_id[: self.product.hwid_size]

    @property
    def hierarchy(self) -> Hierarchy:
        """ARK, ASK and ASVK: the machine's own, or `same_root_as`'s; made in seconds, at first use."""
        if self._root_of is not None:
            return self._root_of.hierarchy
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
            return self.hierarchy.vcek(x, y, self.hwid, tcb)

    def certificate_table(self) -> bytes:
        """VCEK, ASK and ARK as the host would provision them for the chip's reported TCB."""
        with self._ca_lock:
            tcb = self.chip.reported_tcb
            if tcb not in self._tables:
                self._tables[tcb] = self.hierarchy.table(vcek=self.vcek_certificate(tcb))
            return self._tables[tcb]

    def vlek(
        self, csp_id: str, *, provider_secret: bytes | None = None, tcb: TcbVersion | None = None
    ) -> Vlek:
        """A provider's signing key with its certificates; load it with `load_vlek`.

        Args:
            csp_id: the provider, such as "CN=cc-eu-west-1.example"; its certificate carries it.
            provider_secret: 32 bytes. A VLEK does not depend on the chip: machines that are given the same
                one have the same key. By default each machine draws its own for every provider.
            tcb: what it is issued for; the reported TCB by default, the only one that the chip loads.

        Raises:
            LayoutError: a secret of another size, or a provider's name outside ASCII.
        """
        with self._ca_lock:
            if provider_secret is None:
                provider_secret = self._secret_of(csp_id)
            tcb = self.chip.reported_tcb if tcb is None else tcb
            key = vlek_key(provider_secret, self.product, csp_id, tcb)
            x, y = SigningKey.from_scalar(key.scalar).public_point
            certificate = self.hierarchy.vlek(x, y, csp_id, key.tcb)
            table = self.hierarchy.table(vlek=certificate)
        return Vlek(csp_id=csp_id, key=key, certificate=certificate, table=table)

    def _secret_of(self, csp_id: str) -> bytes:
        if csp_id not in self._provider_secrets:
            self._provider_secrets[csp_id] = self._stream(f"csp/{csp_id}")(_SECRET_SIZE)
        return self._provider_secrets[csp_id]

    def load_vlek(self, vlek: Vlek) -> None:
        """Have the chip sign with a VLEK from now on, in place of any other.

        A guest that asks with KEY_SEL 1 gets the VCEK's signature all the same.

        The key is wrapped for this chip and goes through /dev/sev, so it is loaded between two commands.

        Raises:
            UsageError: it was issued for another TCB than the reported one.
        """
        with self._ca_lock:
            iv = self._vlek_ivs(_IV_SIZE)
        stick = wrap(self.chip.vcek_root(vlek.tcb), vlek.key, iv)
        result, status = load_hashstick(self.kernel.task("operator"), stick)
        if result:
            raise UsageError(
                f"VLEK: got one for TCB {vlek.tcb:#018x}, wanted REPORTED_TCB {self.chip.reported_tcb:#018x} "
                f"(AMD 56860, SNP_VLEK_LOAD): errno {-result}, status {status:#x}"
            )

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
        plan: LaunchConfig | None = None,
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
            plan: launch this firmware, page by page as `swsnp measure` has it, instead of the built-in
                guest's own image. The built-in guest runs all the same: the firmware is measured, not
                executed.

        Raises:
            LayoutError: a firmware that cannot be launched.
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
                certs=self._certificate_source(certs),
            )
        if plan is None:
            return self._launch(config, self.generation, vmpck_id)
        config = config_of_plan(config, plan)
        image = image_of_plan(plan)
        layout = stand_in_layout(config.vcpus, image)
        return self._launch(config, self.generation, vmpck_id, image, layout)

    def restore_vm(
        self,
        saved: SavedVm,
        *,
        name: str | None = None,
        certs: Certs | Literal["machine"] = "machine",
    ) -> VirtualMachine:
        """Continue a VM that `VirtualMachine.save` took off another machine, or off this one.

        The guest goes on with its memory, keys and counters. This machine's chip signs for it, and its
        certificates come from `certs`, whatever it had before.

        Args:
            saved: is used up, unless this fails.
            name: in trace events; the old one by default.
            certs: as `create_vm`.

        Raises:
            UsageError: it was restored before, comes from another product line, or its name is taken.
            LaunchError: KVM or firmware refused, as for a policy that this firmware does not know.
            GuestStopped: the guest would not go on here.
        """
        if saved.product is not self.product:
            raise UsageError(f"saved VM: got one of {saved.product.value}, wanted {self.product.value}")
        config = replace(saved.config, name=name or saved.config.name, certs=self._certificate_source(certs))
        with saved.claimed():
            vm = self._launch(config, saved.generation, saved.vmpck_id, saved.memory.image(), saved.layout)
            try:
                vm.resume(saved)
            except BaseException:
                vm.close()
                raise
            return vm

    def launch_kernel(
        self,
        config: VmConfig,
        kernel: KernelImage,
        *,
        bus: IoBus,
        power: PowerSwitch,
        initrd: bytes = b"",
        cmdline: str = "",
        devices: Sequence[VirtioPlace] = (),
    ) -> KernelVm:
        """Launch a VM with a Linux kernel, which runs on the host's own processor; `run` it next.

        Args:
            config: the VM.
            kernel: what `measure.kernel_image` read.
            bus: its devices.
            power: what they switch it off with.
            initrd: the initial RAM disk's bytes.
            cmdline: the command line.
            devices: where virtio devices are that ACPI tells the kernel; `measure.direct_boot.virtio_places`.

        Raises:
            UsageError: what does not fit together; or this machine was made without `processor`.
            LaunchError: KVM model or firmware refused the launch.
            HostError: the host's KVM refused.
        """
        from swsnp.machine.kernel_vm import KernelVm

        if self._processor is None:
            raise UsageError("machine: made without processor=, wanted one for a kernel")
        config = self._checked(config)
        return KernelVm(
            self.kernel.task(config.name),
            config,
            kernel,
            initrd=initrd,
            cmdline=cmdline,
            devices=devices,
            processor=self._processor,
            bus=bus,
            power=power,
            makers=self._makers,
            dialect=self.profile.name,
            trace=self.trace,
        )

    def _checked(self, config: VmConfig) -> VmConfig:
        """The configuration as this machine can have it."""
        if config.name in self._makers:
            raise UsageError(f"VM name: {config.name!r} is taken on this machine")
        return config if self.profile.cert_exit is not None else replace(config, certs=None)

    def _launch(
        self,
        config: VmConfig,
        generation: DriverGeneration,
        vmpck_id: int,
        image: LaunchImage | None = None,
        layout: tuple[GuestLayout, tuple[int, ...]] | None = None,
    ) -> VirtualMachine:
        config = self._checked(config)
        return VirtualMachine(
            self.kernel.task(config.name),
            config,
            makers=self._makers,
            dialect=self.profile.name,
            trace=self.trace,
            generation=generation,
            clock=self.clock,
            processors=self.kernel.host_cpus,
            contexts=self._contexts,
            product=self.product,
            vmpck_id=vmpck_id,
            image=image,
            layout=layout,
        )

    def _certificate_source(self, certs: Certs | Literal["machine"]) -> CertificateSource | None:
        return self._own_source() if certs == "machine" else _source(certs)


def _settings_of(product: Product, processor: HostProcessor | None) -> ChipSettings:
    """The part's; where guests run on the host's CPU, that one is what a CPUID page may promise.

    Parts whose table is not known take any page, as they do without a processor.
    """
    settings = preset(product)
    if processor is None or product is not Product.GENOA:
        return settings
    return replace(settings, host_cpuid=processor.shown())


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
