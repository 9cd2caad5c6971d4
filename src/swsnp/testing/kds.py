"""The imitated key service for test suites: as a fixture `swsnp_kds`, or by hand.

with KdsServer(KdsDouble([machine])) as kds:
    kds.double.misbehave(Misbehaviour(trouble=Trouble.THROTTLED, times=2, retry_after="1"))
    ...  # whatever asks kds.url
    assert kds.double.asked
"""

from __future__ import annotations

from swsnp.amd_ca.kds_double import Asked, CertifiedChip, KdsDouble, Misbehaviour, Reply, Trouble
from swsnp.amd_ca.kds_server import KdsServer

__all__ = ["Asked", "CertifiedChip", "KdsDouble", "KdsServer", "Misbehaviour", "Reply", "Trouble"]
