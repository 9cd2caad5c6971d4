"""QEMU's part: launches VMs over KVM's user interface, runs their vCPUs, and serves certificate requests."""
