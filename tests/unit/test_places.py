"""Places: whoever has his share is refused, nobody takes another's, and what ends is free again, however it ends."""

from contextlib import ExitStack, suppress

import pytest

from proxy.errors import RateExceeded
from proxy.outages import PoolExhausted
from proxy.places import Places


def test_a_caller_has_his_share_and_no_more() -> None:
    """His refusal names the policy; when all are taken it is nobody's fault."""
    places = Places(3, 2, "uploads")
    with ExitStack() as held:
        held.enter_context(places.one("alice"))
        held.enter_context(places.one("alice"))
        with pytest.raises(RateExceeded) as refused, places.one("alice"):
            pass
        held.enter_context(places.one("bob"))
        with pytest.raises(PoolExhausted), places.one("bob"):
            pass

    assert refused.value.policies == ("uploads",)
    assert (places.taken, places._by_caller) == (0, {})


def test_whatever_ends_a_hold_frees_it() -> None:
    """Refusals take nothing, and failures give everything back."""
    places = Places(1, 1, "uploads")
    for error in (OSError, RateExceeded(policies=(), retry_after=1, fields=[]), KeyboardInterrupt):
        with suppress(OSError, RateExceeded, KeyboardInterrupt), places.one("alice"):
            raise error
    with places.one("alice"), suppress(RateExceeded), places.one("alice"):
        pass

    assert (places.taken, places._by_caller) == (0, {})
