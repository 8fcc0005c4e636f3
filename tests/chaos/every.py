"""All faults, in the order in which they are played; and those whose short form guards the main branch."""

from tests.chaos.fault_clocks import CLOCKS
from tests.chaos.fault_crowds import DESCRIPTORS, IDLE, STALLED
from tests.chaos.fault_cuts import CUTS, SILENCE
from tests.chaos.fault_kills import KILLS
from tests.chaos.fault_known import KNOWN_FAULTS
from tests.chaos.fault_links import GATEWAYS, LINKS_FAULT
from tests.chaos.fault_logins import LOGINS
from tests.chaos.fault_steady import STEADY
from tests.chaos.fault_stops import STOPS
from tests.chaos.fault_stores import DISK, PARTITION
from tests.chaos.fault_storm import NAT_STORM, STORM

FAULTS = (
    *(CUTS, SILENCE, KILLS, STOPS, LINKS_FAULT, GATEWAYS, DESCRIPTORS, IDLE, STALLED),
    *(PARTITION, DISK, CLOCKS),
    *(STORM, NAT_STORM, LOGINS, KNOWN_FAULTS, STEADY),
)
SHORT = (CUTS, KILLS, DESCRIPTORS, IDLE, STALLED, STORM)
