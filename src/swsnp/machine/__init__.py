"""One machine: joins the chip, its firmware, the host kernel, VMMs and guests. What most users hold.

with Machine(product=Product.MILAN).create_vm() as vm:
    vm.boot()
    report = vm.report(nonce).report
"""

from swsnp.machine.answers import Answer, ExtendedReport, GuestMoved, GuestStopped, IoctlFailed
from swsnp.machine.machine import SEEDED_NOW, Certs, Machine
from swsnp.machine.move import SavedVm
from swsnp.machine.virtual_machine import VirtualMachine
from swsnp.machine.vlek import Vlek

__all__ = [
    "Answer",
    "Certs",
    "ExtendedReport",
    "GuestMoved",
    "GuestStopped",
    "IoctlFailed",
    "Machine",
    "SEEDED_NOW",
    "SavedVm",
    "VirtualMachine",
    "Vlek",
]
