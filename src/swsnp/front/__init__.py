"""Doors: where programs reach the machine, and the only packages that touch the host for them."""
