"""Hostile hosts: the interposer, the attacks and the catalogue."""

from swsnp.testing.hostile_host import attacks
from swsnp.testing.hostile_host.cases import HOSTILE_HOST, HostCase, HostOutcome, play_host
from swsnp.testing.hostile_host.interposer import Attack, Departure, HostileHost

__all__ = [
    "Attack",
    "Departure",
    "HOSTILE_HOST",
    "HostCase",
    "HostOutcome",
    "HostileHost",
    "attacks",
    "play_host",
]
