"""Hostile operators: what stands, or happens, where a VM's certificates should be.

A case arranges it in a folder and gives the source that a VM is to be started with. Users with a VMM of their
own take the path: `source.path` of every case whose source is a `BlobFile`.
"""

from swsnp.testing.hostile_operator.case import BlockingCertificates, OperatorCase, play_operator
from swsnp.testing.hostile_operator.cases import HOSTILE_OPERATOR

__all__ = ["BlockingCertificates", "HOSTILE_OPERATOR", "OperatorCase", "play_operator"]
