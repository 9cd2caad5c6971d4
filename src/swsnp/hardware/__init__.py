"""What all parties stand on: memory by system address, the RMP, and why a processor leaves its guest."""

from swsnp.hardware.exits import (
    GuestAccessFault,
    GuestExit,
    Halt,
    Interrupted,
    MmioAccess,
    NestedPageFault,
    PortAccess,
    ProcessorError,
    Shutdown,
    Vmgexit,
)
from swsnp.hardware.memory import BusError, SystemMemory
from swsnp.hardware.rmp import PageState, Rmp, RmpEntry, RmpUpdate

__all__ = [
    "BusError",
    "GuestAccessFault",
    "GuestExit",
    "Halt",
    "Interrupted",
    "MmioAccess",
    "NestedPageFault",
    "PageState",
    "PortAccess",
    "ProcessorError",
    "Rmp",
    "RmpEntry",
    "RmpUpdate",
    "Shutdown",
    "SystemMemory",
    "Vmgexit",
]
