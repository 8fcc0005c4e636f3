"""All faults, in the order in which they are played; and those whose short form guards the main branch."""

from tests.chaos.fault_cuts import CUTS, SILENCE

FAULTS = (CUTS, SILENCE)
SHORT = (CUTS,)
