"""For relying parties: is a report genuine, by roots that the caller chose, and the guest the wanted one?

Imports nothing that imitates.
"""

from swsnp.verify.policy import Policy
from swsnp.verify.result import CHECKS, Finding, Outcome, Verification
from swsnp.verify.roots import Roots
from swsnp.verify.verifier import Verifier, verify, verify_strict

__all__ = [
    "CHECKS",
    "Finding",
    "Outcome",
    "Policy",
    "Roots",
    "Verification",
    "Verifier",
    "verify",
    "verify_strict",
]
