"""Policy files: a policy that survives being read from its own values, or InputError, nothing else."""

from __future__ import annotations

from fuzz.outcome import attempt
from swsnp.errors import InputError
from swsnp.verify.policy import Policy
from swsnp.verify.policy_file import read_policy

__all__ = ["one", "seeds"]


def seeds() -> list[bytes]:
    """A policy of many forms in JSON and in TOML."""
    digest = "00112233445566778899aabbccddeeff" * 3
    return [
        b'{"measurements": ["%s"], "vmpl": 0, "minimum_version": "1.55", "allow_smt": false, '
        b'"required_platform_info": ["ecc_en", 5], "minimum_tcb": {"Milan": {"snp": 24}}}' % digest.encode(),
        b'id_key_digests = ["%s"]\nmaximum_crl_age_s = 86400\nallow_debug = true\n'
        b'csp_ids = ["CN=x"]\n[minimum_launch_tcb.Turin]\nfmc = 1\n' % digest.encode(),
    ]


def one(data: bytes) -> object:
    """Read; what was read can be asked for everything."""
    policy, refusal = attempt(lambda: read_policy(data, "policy"), InputError)
    if policy is None:
        return refusal
    assert isinstance(policy, Policy)
    assert hash(policy) == hash(read_policy(data, "again"))
    return policy.unset()
