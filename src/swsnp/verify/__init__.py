"""For relying parties: is a report genuine, by roots that the caller chose? Imports nothing that imitates."""

from swsnp.verify.result import CHECKS, Finding, Outcome, Verification
from swsnp.verify.roots import Roots
from swsnp.verify.verifier import verify, verify_strict

__all__ = ["CHECKS", "Finding", "Outcome", "Roots", "Verification", "verify", "verify_strict"]
