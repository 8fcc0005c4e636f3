"""How long an uplink waits before it dials for a control link again."""

from itertools import pairwise

import pytest
from uplink_fakes import LongestWaits

from fxrelay.uplink.dial import Unanswered, Unreachable
from fxrelay.uplink.ports import UplinkConfig
from fxrelay.uplink.redial_backoff import (
    ABSENT_CAP_S,
    FLAP_CAP_S,
    INTERNAL,
    RECENT_CAP_S,
    RECENT_S,
    SETTLED_S,
    Failure,
    RedialBackoff,
)
from fxtunnel.codes import Refusal
from fxtunnel.errors import PeerRefused, TunnelError

CONFIG = UplinkConfig()
ABSENT, HUNG_UP, SILENT = Failure.of(Unreachable("refused")), Failure.of(Unanswered("hung up")), Failure.of(TunnelError("no answer"))
MANY = 20


def waits_of(failure: Failure, now: float, began_at: float, lost_at: float) -> list[float]:
    redial_backoff = RedialBackoff(CONFIG, LongestWaits())
    return [redial_backoff.unwelcome_s(failure, now, began_at, lost_at) for _ in range(MANY)]


@pytest.mark.parametrize(
    ("failure", "began_s_ago", "lost_s_ago", "cap_s"),
    [
        (ABSENT, 600.0, 1.0, ABSENT_CAP_S),
        (HUNG_UP, 600.0, 1.0, RECENT_CAP_S),
        (SILENT, 600.0, 1.0, RECENT_CAP_S),
        (INTERNAL, 600.0, 1.0, RECENT_CAP_S),
        (ABSENT, 1.0, 600.0, ABSENT_CAP_S),
        (HUNG_UP, 1.0, 600.0, RECENT_CAP_S),
        (SILENT, 1.0, 600.0, CONFIG.max_backoff_s),
        (ABSENT, 600.0, RECENT_S, CONFIG.max_backoff_s),
        (ABSENT, RECENT_S, 600.0, CONFIG.max_backoff_s),
    ],
)
def test_waits_double_up_to_a_cap_that_is_short_soon_after_a_loss_or_a_start(
    failure: Failure, began_s_ago: float, lost_s_ago: float, cap_s: float
) -> None:
    waits = waits_of(failure, 1_000.0, 1_000.0 - began_s_ago, 1_000.0 - lost_s_ago)
    assert waits[0] == CONFIG.min_backoff_s
    assert waits[-1] == cap_s
    assert all(later == min(2 * earlier, cap_s) for earlier, later in pairwise(waits))


def test_what_the_gateway_asks_for_comes_on_top() -> None:
    asked = Failure.of(PeerRefused(Refusal.TOO_MANY, "later", retry_after_s=5.0))
    assert waits_of(asked, 1_000.0, 0.0, 0.0)[0] == 5.0 + CONFIG.min_backoff_s
    assert RedialBackoff(CONFIG, LongestWaits()).lost_s(asked, 0.0) == 5.0 + CONFIG.min_backoff_s


def test_links_that_break_at_once_are_followed_by_longer_waits_until_one_lasts() -> None:
    redial_backoff = RedialBackoff(CONFIG, LongestWaits())
    assert [redial_backoff.lost_s(INTERNAL, 0.0) for _ in range(MANY)][-1] == FLAP_CAP_S
    assert redial_backoff.lost_s(INTERNAL, SETTLED_S) == CONFIG.min_backoff_s


def test_a_welcome_ends_a_row_of_failures() -> None:
    redial_backoff = RedialBackoff(CONFIG, LongestWaits())
    for _ in range(MANY):
        redial_backoff.unwelcome_s(ABSENT, 1_000.0, 0.0, 0.0)
        redial_backoff.unwelcome_s(ABSENT, 1_000.0, 0.0, 999.0)
        redial_backoff.unwelcome_s(HUNG_UP, 1_000.0, 0.0, 999.0)
    redial_backoff.lost_s(INTERNAL, 0.0)
    again = [redial_backoff.unwelcome_s(ABSENT, 1_000.0, 0.0, 0.0), redial_backoff.unwelcome_s(ABSENT, 1_000.0, 0.0, 999.0)]
    assert [*again, redial_backoff.unwelcome_s(HUNG_UP, 1_000.0, 0.0, 999.0)] == [CONFIG.min_backoff_s] * 3
