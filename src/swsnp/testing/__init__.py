"""Help for test suites: neighbours that misbehave, a clock, randomness that repeats.

* `HOSTILE_GUEST` and `play`: guest code that a hypervisor or VMM must withstand.
* `HOSTILE_HOST`, `play_host` and `HostileHost`: hosts that a guest or an attestation client must withstand.
* `HOSTILE_OPERATOR` and `play_operator`: what stands where the certificates should be.
* `FakeClock`, `SeededEntropy`: time and chance that a test owns.
* `swsnp.testing.fixtures`: a plugin for pytest; `swsnp.testing.strategies`: strategies for Hypothesis.
* `swsnp.testing.kds`: the key service, imitated, on request badly.

The last three are not loaded from here, so that neither pytest nor Hypothesis nor HTTP is needed.
"""

from swsnp.crypto.derive import SeededEntropy
from swsnp.testing.clock import FakeClock
from swsnp.testing.guest_case import Case, Program, by_profile, everywhere, firmware_status, play, with_exit
from swsnp.testing.hostile_guest import HOSTILE_GUEST
from swsnp.testing.hostile_host import (
    HOSTILE_HOST,
    Attack,
    Departure,
    HostCase,
    HostileHost,
    HostOutcome,
    attacks,
    play_host,
)
from swsnp.testing.hostile_operator import (
    HOSTILE_OPERATOR,
    BlockingCertificates,
    OperatorCase,
    play_operator,
)
from swsnp.testing.program_saw import ProgramSaw, ask_report, served
from swsnp.testing.raw_guest import OUTSIDE, RawGuest
from swsnp.testing.seen import (
    Answer,
    Held,
    MsrReplied,
    Replied,
    RunError,
    Running,
    Seen,
    StillRunning,
    Stopped,
    Unanswered,
    limited,
)

__all__ = [
    # guests
    "Case",
    "HOSTILE_GUEST",
    "OUTSIDE",
    "Program",
    "RawGuest",
    "by_profile",
    "everywhere",
    "firmware_status",
    "play",
    "with_exit",
    # what became of them
    "Answer",
    "Held",
    "MsrReplied",
    "Replied",
    "RunError",
    "Running",
    "Seen",
    "StillRunning",
    "Stopped",
    "Unanswered",
    "limited",
    # hosts
    "Attack",
    "Departure",
    "HOSTILE_HOST",
    "HostCase",
    "HostOutcome",
    "HostileHost",
    "attacks",
    "play_host",
    # operators
    "BlockingCertificates",
    "HOSTILE_OPERATOR",
    "OperatorCase",
    "play_operator",
    # what a program gets
    "ProgramSaw",
    "ask_report",
    "served",
    # time and chance
    "FakeClock",
    "SeededEntropy",
]
