"""The figures of `make bench` for real vCPUs come from guests that really run."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from bench.real_vcpu import real_vcpu_jobs


@pytest.mark.usefixtures("c_bit")
def test_real_vcpu() -> None:
    """Each request is answered through a VMGEXIT of machine code; the floor is one more KVM_RUN beside it."""
    with ExitStack() as stack:
        jobs = list(real_vcpu_jobs(stack))
        assert [job.library for job in jobs] == ["cryptography", "awscrt"]
        for job in jobs:
            for _ in range(2):
                job.call()
                job.floor()
