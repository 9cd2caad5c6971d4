"""`swsnp vm -kernel …`: a Linux kernel on the host's own processor, as an SNP guest."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from swsnp.abi.ghcb import ExitCode, describe_termination
from swsnp.cli import BAD_VERDICT, GOOD, common
from swsnp.cli.qemu_devices import with_program_input
from swsnp.cli.vm_devices import VmDevices
from swsnp.cli.vm_input import console_input, program_input
from swsnp.cli.vm_program import program_of
from swsnp.cli.vm_trace import read_file, symbols_of, traced
from swsnp.cpu.plain_kvm import LinuxKvm, probe_for_linux
from swsnp.errors import HostError, UsageError
from swsnp.machine import Machine
from swsnp.machine.kernel_vm import KernelVm, host_processor
from swsnp.machine.machine import utc_now
from swsnp.machine.ordinary_vm import OrdinaryVm
from swsnp.measure.kernel_config import check_config, find_config
from swsnp.measure.kernel_image import read_kernel
from swsnp.measure.vmsa_pages import signature_of_model
from swsnp.trace import Vmgexit
from swsnp.vmm import stop as stops
from swsnp.vmm.devices.bus import Bus
from swsnp.vmm.devices.legacy import attach_legacy
from swsnp.vmm.devices.serial import COM1, COM1_LINE, COM2, COM2_LINE, Serial16550
from swsnp.vmm.initramfs import exit_status

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from swsnp.cli.qemu_options import QemuOptions
    from swsnp.machine.kernel_vm import HostProcessor
    from swsnp.measure.kernel_image import KernelImage
    from swsnp.trace import TraceEvent

__all__ = ["run_kernel"]

_FLUSH_S: Final = 0.05


def run_kernel(ours: argparse.Namespace, options: QemuOptions) -> int:
    """Boot the kernel; the exit code is the guest's own status, 0 after power-off, or reset with -no-reboot.

    Files are judged first, then the host. With --exec it is the program's, and the guest boots once.
    """
    assert options.kernel is not None  # noqa: S101  # the caller looked
    kernel = read_kernel(options.kernel)
    if options.ordinary:
        _refuse_what_snp_has(ours)
    else:
        _check_config(kernel, options.kernel, ours.kernel_config)
    initrd = read_file(options.initrd) if options.initrd is not None else b""
    if ours.exec is not None:
        options = replace(options, devices=with_program_input(options.devices))
    program = program_of(ours, options, kernel)
    if program is not None:
        initrd = initrd + bytes(-len(initrd) % 4) + program.initramfs
        options = replace(
            options,
            append=f"{program.cmdline} {options.append}".rstrip(),
            no_reboot=options.no_reboot or program.tells_status,
        )
    symbols = symbols_of(ours.system_map)
    apart = program is not None and program.tells_status
    with VmDevices(options.devices) as devices:
        what = _Booted(kernel=kernel, initrd=initrd, options=options, devices=devices, console_apart=apart)
        return _boots(ours, what, symbols, _judged_host(options.snp.cbitpos))


@dataclass(frozen=True, kw_only=True)
class _Booted:
    """What is booted; `console_apart`: the standard output is a program's and not the console's."""

    kernel: KernelImage
    initrd: bytes
    options: QemuOptions
    devices: VmDevices
    console_apart: bool


def _boots(
    ours: argparse.Namespace, what: _Booted, symbols: Callable[[int], str], processor: HostProcessor
) -> int:
    """Boot, and again after every reset."""
    options = what.options
    machine = Machine(
        product=options.product, profile=ours.profile, seed=common.seed_of(ours), processor=processor
    )
    if ours.save_root is not None:
        common.save(ours.save_root, machine.root_certificate)
    LinuxKvm.listen_for_interrupts()
    while True:
        guest = _Guest(machine, what, processor)
        with guest, traced(machine.trace, ours.trace, symbols):
            stop = guest.run(ours.timeout)
            if ours.stats is not None:
                common.save(ours.stats, json.dumps(guest.stats(stop), indent=2).encode() + b"\n")
            if options.no_reboot or not (isinstance(stop, stops.PoweredOff) and stop.is_reset):
                code = _exit_code(stop, guest, symbols)
                return _program_code(stop) if what.console_apart else code


def _refuse_what_snp_has(ours: argparse.Namespace) -> None:
    """A guest without SNP makes no events and asks for no reports; its kernel may be built as it likes."""
    for name in ("kernel_config", "save_root", "trace"):
        if getattr(ours, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')}: wanted an SNP guest: no -machine, or one with "
                "confidential-guest-support"
            )


def _check_config(kernel: KernelImage, image: Path, named: Path | None) -> None:
    """Judge the kernel by its configuration, where one can be found."""
    config = find_config(kernel, image, named)
    if config is not None:
        check_config(config, kernel.release)
        return
    print(
        f"swsnp vm: {image}: its configuration was not checked: there is none inside, and no "
        f"config-{kernel.release or 'RELEASE'} beside it; --kernel-config FILE names one",
        file=sys.stderr,
    )


def _judged_host(cbitpos: int | None) -> HostProcessor:
    """What the host's KVM offers, once a guest has run what Linux needs.

    Raises:
        HostError: it cannot.
        UsageError: another C-bit position was asked for than this host has.
    """
    verdict = probe_for_linux()
    if not verdict.usable:
        raise HostError(f"{verdict.reason}; remedy: {verdict.remedy}")
    processor = host_processor()
    if cbitpos not in (None, processor.c_bit):
        raise UsageError(
            f"-object sev-snp-guest: property 'cbitpos': got {cbitpos}, wanted this host's "
            f"{processor.c_bit}, or leave it out"
        )
    return processor


class _Guest:
    """One boot: the launched VM with its devices; a context manager."""

    def __init__(
        self,
        machine: Machine,
        what: _Booted,
        processor: HostProcessor,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._machine, self._clock = machine, clock
        self._times = {"started": clock()}
        self._devices, self._apart = what.devices, what.console_apart
        others = self._apart or self._devices.stdio is not None
        self._console = sys.stderr.buffer if others else sys.stdout.buffer
        options = what.options
        self._terminated: int | None = None
        self._vmgexits = 0
        self._quit = False
        bus, power = Bus(), stops.PowerSwitch()
        attach_legacy(bus, power, utc_now)
        config = replace(
            options.vm_config(),
            cbitpos=processor.c_bit,
            host_cbitpos=processor.c_bit,
            cpu_signature=signature_of_model(options.cpu_model),
            passable_memory=what.devices.passable_memory,
        )
        start = machine.launch_kernel if not options.ordinary else partial(OrdinaryVm, host=processor.host)
        self.vm: KernelVm | OrdinaryVm = start(
            config,
            what.kernel,
            bus=bus,
            power=power,
            initrd=what.initrd,
            cmdline=options.append,
            devices=what.devices.places,
        )
        what.devices.attach(self.vm, bus, power)
        self._note("launched")
        self._serial = Serial16550(self.vm.interrupt_line(COM1_LINE), self._show)
        bus.attach_ports(COM1, self._serial)
        self._devices.on_output = partial(self._note, "output")
        self._output = Serial16550(self.vm.interrupt_line(COM2_LINE), self._put_out)
        if self._uses_com2:
            bus.attach_ports(COM2, self._output)
        self._flushing = threading.Event()
        try:
            self._log = _log_file(options.serial)
        except BaseException:
            self._close_vm()
            raise

    def __enter__(self) -> _Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush_all()
        self._close_vm()
        if self._log is not None:
            self._log.close()

    def _close_vm(self) -> None:
        """Threads of the devices' own touch its memory no more."""
        self._devices.detach()
        self.vm.close()

    def _show(self, data: bytes) -> None:
        self._note("console")
        self._console.write(data)
        self._console.flush()
        if self._log is not None:
            self._log.write(data)
            self._log.flush()

    def _put_out(self, data: bytes) -> None:
        self._note("output")
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def _note(self, what: str) -> None:
        """When something happened for the first time."""
        self._times.setdefault(what, self._clock())

    @property
    def _uses_com2(self) -> bool:
        """A program's output leaves by the second serial port, unless there is a port for it."""
        return self._apart and self._devices.stdio is None

    def _output_by(self) -> str | None:
        """Where a program's output leaves; None: there is none."""
        if not self._apart:
            return None
        return "serial port" if self._uses_com2 else "virtio port"

    def _seconds(self) -> dict[str, float]:
        """From the start to the other times."""
        start = self._times["started"]
        return {what: round(at - start, 3) for what, at in self._times.items() if what != "started"}

    def run(self, timeout_s: float | None) -> stops.StopReason:
        """Run until the guest has ended; prompts without a line feed are shown too."""
        flusher = threading.Thread(target=self._flush, daemon=True)
        flusher.start()
        with self._machine.trace.listen(self._watch, exits=False):
            try:
                with self._input():
                    return self.vm.run(timeout_s)
            except KeyboardInterrupt:
                if self._quit:
                    return stops.PoweredOff("terminal", GOOD)
                raise
            finally:
                self._note("ended")
                self._flushing.set()
                flusher.join()

    def _input(self) -> AbstractContextManager[object]:
        if self._apart:
            return program_input(self._devices, self._interrupt)
        return console_input(self._devices, self._serial.receive, self._interrupt)

    def _interrupt(self) -> None:
        self._quit = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _flush(self) -> None:
        while not self._flushing.wait(_FLUSH_S):
            self._flush_all()

    def _flush_all(self) -> None:
        self._serial.flush()
        self._output.flush()

    def _watch(self, event: TraceEvent) -> None:
        if isinstance(event, Vmgexit):
            self._vmgexits += 1
            if event.exit_code == ExitCode.TERM_REQUEST:
                self._terminated = event.info1

    @property
    def termination(self) -> int | None:
        """Exit info 1 of the guest's TERM_REQUEST event, if there was one."""
        return self._terminated

    def stats(self, stop: stops.StopReason) -> dict[str, Any]:
        """For programs."""
        return {
            "stop": type(stop).__name__,
            "status": getattr(stop, "status", None),
            "snp": isinstance(self.vm, KernelVm),
            "measurement": self.vm.measurement.hex() or None,
            "cbitpos": self.vm.config.cbitpos if isinstance(self.vm, KernelVm) else None,
            "seconds": self._seconds(),
            "entries": [each.entries for each in self.vm.processors.values()],
            "vcpus": [each.times.as_json() for each in self.vm.processors.values()],
            "output_by": self._output_by(),
            "ghcb_events": self._vmgexits,
            "rewritten": len(self.vm.processors[0].sites),
        }


def _log_file(serial: str) -> Any:
    kind, _, name = serial.partition(":")
    if kind != "file":
        return None
    try:
        return Path(name).open("wb")
    except OSError as error:
        raise UsageError(f"-serial: {name}: cannot be written: {error.strerror}") from None


# How it ended


def _exit_code(stop: stops.StopReason, guest: _Guest, symbols: Callable[[int], str]) -> int:
    if isinstance(stop, stops.PoweredOff):
        return GOOD if stop.status is None else stop.status
    where = "; ".join(
        f"vCPU {number} at {symbols(each.rip)}"
        for number, each in guest.vm.processors.items()
        if each.entries
    )
    print(f"swsnp vm: {_reason(stop, guest)} ({where})", file=sys.stderr)
    if isinstance(stop, stops.TimedOut):
        for number, place in enumerate(stop.threads):
            state = guest.vm.processors[number].state()
            print(f"swsnp vm: vCPU {number}: {state}; its thread was in {place}", file=sys.stderr)
    return BAD_VERDICT


def _program_code(stop: stops.StopReason) -> int:
    status = stop.status if isinstance(stop, stops.PoweredOff) else None
    if status is None and isinstance(stop, stops.PoweredOff):
        print("swsnp vm: the guest ended without the program's exit status", file=sys.stderr)
    return exit_status(status)


def _reason(stop: stops.StopReason, guest: _Guest) -> str:
    match stop:
        case stops.TimedOut(seconds=seconds):
            return f"the guest was stopped after {seconds:g} s"
        case stops.Terminated(ghcb_msr=msr):
            return f"the guest asked to be terminated: {describe_termination(msr, guest.termination)}"
        case stops.GuestShutdown():
            return "the guest triple-faulted"
        case stops.Idle():
            return "the guest halted with interrupts off"
        case stops.InternalError():
            errors = [each.last_error for each in guest.vm.processors.values() if each.last_error]
            return "; ".join(errors) or f"KVM_EXIT_INTERNAL_ERROR {stop.suberror}"
        case stops.RunFailed(detail=detail) | stops.UnhandledExit(detail=detail):
            return detail
        case _:
            return str(stop)
