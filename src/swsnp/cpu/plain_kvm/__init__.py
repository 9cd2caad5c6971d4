"""Real machine code on the host's /dev/kvm, with what SEV-SNP hardware would do supplied in software.

Memory is neither encrypted nor protected from the host: for development and testing only.
"""

from swsnp.cpu.plain_kvm.host import HostKvm, LinuxKvm
from swsnp.cpu.plain_kvm.longmode import FlatStart, boot_pages
from swsnp.cpu.plain_kvm.probe import Verdict, probe, probe_for_linux
from swsnp.cpu.plain_kvm.processor import PlainKvmProcessor
from swsnp.cpu.plain_kvm.vm import HostVm, c_bit_position

__all__ = [
    "FlatStart",
    "HostKvm",
    "HostVm",
    "LinuxKvm",
    "PlainKvmProcessor",
    "Verdict",
    "boot_pages",
    "c_bit_position",
    "probe",
    "probe_for_linux",
]
