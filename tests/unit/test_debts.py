"""What is owed to Redis: kept for as long as some window counts it, and in a bounded memory."""

import pytest

from proxy import debts
from proxy.debts import Debt, Debts
from proxy.policies import Per, Quota, Strategy, Unit

WINDOW = 60


def quota(strategy: Strategy = Strategy.FIXED, amount: int = 100) -> Quota:
    """Make a quota of a minute."""
    return Quota("q", "q", "q", Per.PRINCIPAL, strategy, Unit.REQUESTS, amount, WINDOW, 1, shadow=False)


def told(debt: Debt | None, now: float) -> list[tuple[int, float]]:
    """Give what Redis would be told: amounts, and the seconds since."""
    numbers = debt.arguments(now) if debt is not None else []
    return [(int(numbers[at]), int(numbers[at + 1]) / 1_000_000) for at in range(0, len(numbers), 2)]


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [
        (Strategy.FIXED, [(3, 50.0), (4, 10.0)]),
        (Strategy.MOVING, [(3, 50.0), (4, 10.0)]),
        (Strategy.SLIDING, [(2, 110.0), (3, 50.0), (4, 10.0)]),
    ],
)
def test_the_recent_part_of_an_old_debt_is_charged(strategy: Strategy, kept: list[tuple[int, float]]) -> None:
    """An outage that is longer than the window forgives what is older, and nothing else."""
    owed = Debts()
    for amount, at in ((1, 0.0), (2, 60.0), (3, 120.0), (4, 160.0)):
        owed.owe(quota(strategy), "a", amount, at)

    assert told(owed.take("a", 170.0), 170.0) == kept
    assert owed.take("a", 170.0) is None


def test_what_nobody_counts_is_nothing() -> None:
    """A debt of which every part is too old is not told."""
    owed = Debts()
    owed.owe(quota(), "a", 5, 0.0)

    assert owed.amount("a") == 5
    assert owed.take("a", 60.0) is None


def test_what_could_not_be_charged_stays_in_its_time() -> None:
    """With what was owed meanwhile behind it."""
    owed = Debts()
    owed.owe(quota(), "a", 1, 0.0)
    failed = owed.take("a", 1.0)
    owed.owe(quota(), "a", 2, 30.0)
    assert failed is not None
    owed.put_back("a", failed)

    assert told(owed.take("a", 31.0), 31.0) == [(1, 31.0), (2, 1.0)]


def test_memory_is_bounded_in_callers_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million uses by one caller are a few parts; one caller too many is not kept."""
    monkeypatch.setattr(debts, "MOST_OWED", 3)
    owed = Debts()
    for number in range(10_000):
        owed.owe(quota(Strategy.SLIDING), "a", 1, number / 10)
    for key in "bcd":
        owed.owe(quota(), key, 1, 1000.0)
    debt = owed.take("a", 1000.0)

    assert owed.keys() == ["b", "c"]
    assert debt is not None
    assert len(debt.parts) <= 9
    assert 1200 <= debt.amount <= 1350


def test_a_moving_window_is_told_no_more_than_it_holds() -> None:
    """Each request of it is an entry on Redis."""
    owed = Debts()
    owed.owe(quota(Strategy.MOVING, amount=7), "a", 1_000_000, 0.0)

    assert told(owed.take("a", 1.0), 1.0) == [(7, 1.0)]
