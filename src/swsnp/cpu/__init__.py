"""What runs guest code: `builtin` runs Python that yields at VMGEXIT, `plain_kvm` a real vCPU."""
