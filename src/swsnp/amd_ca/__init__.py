"""amd_ca."""
