"""Where counts are kept: in bounded memory, the longest unused forgotten first."""

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits.storage import storage_from_string

from proxy.windows import MOST_PARTITIONS, BoundedMemoryStorage


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_the_library_finds_it_by_its_name() -> None:
    """It is what `bounded-memory://` means."""
    storage = storage_from_string("bounded-memory://")

    assert isinstance(storage, BoundedMemoryStorage)
    assert storage.check()


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=40), st.integers(1, 4))
def test_memory_is_bounded_and_forgets_the_longest_unused(uses: list[tuple[str, bool]], most: int) -> None:
    """Whoever calls, however often, no more than `most` are kept: those that were used last, with their counts."""
    storage = BoundedMemoryStorage(most=most, clock=Clock())
    kept: OrderedDict[str, int] = OrderedDict()

    for key, spending in uses:
        if spending:
            storage.acquire_sliding_window_entry(key, 1000, 60)
        else:
            storage.get_sliding_window(key, 60)
        kept[key] = kept.pop(key, 0) + spending
        while len(kept) > most:
            kept.popitem(last=False)
        assert storage.get_sliding_window(key, 60)[2] == kept[key]

    assert storage.reset() == len(kept)
    assert storage.reset() == 0


def test_who_comes_again_is_not_forgotten() -> None:
    """A caller who was first and is still there keeps his count; the one who left loses it."""
    storage = BoundedMemoryStorage(most=2, clock=Clock())
    for key in ("stays", "leaves", "stays", "comes"):
        storage.acquire_sliding_window_entry(key, 10, 60)

    counts = [storage.get_sliding_window(key, 60)[2] for key in ("stays", "comes", "leaves")]

    assert counts == [2, 1, 0]


def test_a_flood_of_callers_does_not_fill_the_memory() -> None:
    """Without being told otherwise there is room for a hundred thousand."""
    storage = BoundedMemoryStorage(clock=Clock())

    for number in range(MOST_PARTITIONS + 10):
        storage.acquire_sliding_window_entry(str(number), 1, 60)

    assert not storage.acquire_sliding_window_entry(str(MOST_PARTITIONS + 9), 1, 60)
    assert storage.acquire_sliding_window_entry("0", 1, 60)
    assert storage.reset() == MOST_PARTITIONS == 100_000


@pytest.mark.parametrize(
    ("later", "window"),
    [
        (0, (0, 0.0, 3, 120.0)),
        (15, (0, 0.0, 3, 105.0)),
        (59, (0, 0.0, 3, 61.0)),
        (60, (3, 60.0, 0, 120.0)),
        (75, (3, 45.0, 0, 105.0)),
        (120, (0, 0.0, 0, 120.0)),
        (6000, (0, 0.0, 0, 120.0)),
    ],
)
def test_a_window_becomes_the_last_and_is_forgotten(later: int, window: tuple[int, float, int, float]) -> None:
    """Counts and what is left of both windows, in seconds, as the library wants them."""
    clock = Clock()
    storage = BoundedMemoryStorage(clock=clock)
    for _ in range(3):
        storage.acquire_sliding_window_entry("key", 10, 60)

    clock.now = later

    assert storage.get_sliding_window("key", 60) == pytest.approx(window)


def test_an_amount_is_admitted_whole_or_not_at_all() -> None:
    """A cost that does not fit changes nothing."""
    storage = BoundedMemoryStorage(clock=Clock())

    admitted = [storage.acquire_sliding_window_entry("key", 10, 60, amount) for amount in (8, 3, 2, 1)]

    assert admitted == [True, False, True, False]
    assert storage.get_sliding_window("key", 60)[2] == 10


@pytest.mark.parametrize(
    "clear", [lambda storage: storage.clear("a"), lambda storage: storage.clear_sliding_window("a", 60)]
)
def test_one_key_can_be_forgotten(clear: object) -> None:
    """Forgetting one key forgets no other, and forgetting what is not there does nothing."""
    storage = BoundedMemoryStorage(clock=Clock())
    for key in ("a", "b"):
        storage.acquire_sliding_window_entry(key, 1, 60)

    for _ in range(2):
        clear(storage)  # type: ignore[operator]

    assert storage.acquire_sliding_window_entry("a", 1, 60)
    assert not storage.acquire_sliding_window_entry("b", 1, 60)


def test_fixed_windows_turn_with_the_clock() -> None:
    """A count is of this window alone, and what was asked of an unknown key is nothing."""
    clock = Clock(50)
    storage = BoundedMemoryStorage(clock=clock)

    counts = [storage.incr("key", 60), storage.incr("key", 60, 2), storage.get("key")]
    ends = storage.get_expiry("key")
    clock.now = 60

    assert (counts, ends) == ([1, 3, 3], 60)
    assert (storage.get("key"), storage.get("other")) == (0, 0)
    assert storage.base_exceptions is ValueError


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 3)), max_size=40), st.integers(1, 12))
def test_moving_windows_are_bounded_too(uses: list[tuple[str, int]], most: int) -> None:
    """All moving windows together keep at most so many requests; what is forgotten is what was unused for longest."""
    storage = BoundedMemoryStorage(most=4, most_moments=most, clock=Clock())

    for key, amount in uses:
        storage.acquire_entry(key, 6, 60, amount)
        held = [len(moments) for moments in storage._moments.values()]
        assert sum(held) == storage._held <= most
        assert len(held) <= 4

    storage.reset()
    assert storage._held == 0
