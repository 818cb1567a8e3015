"""Several workers count together: the board between them, through deaths at any moment."""

import os

from proxy.board import _HALF, Board, Place
from proxy.families import FAMILIES
from proxy.metrics import Metrics, Snapshot, merged
from proxy.model import Record


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _count(metrics: Metrics, number: int, *, status: int = 200) -> None:
    for _ in range(number):
        record = Record(b"i", 1.0, "a", "POST", "/agent/invoke", operation="invoke", status=status)
        metrics.begin(record, [])
        metrics.end(record, 1.02)


def _requests(snapshot: Snapshot) -> float:
    return sum(values[0] for _, values in snapshot["requests"])


def test_workers_count_together() -> None:
    """Whoever is asked tells of all: what it counted itself as of now, the others' as they last published."""
    board, both = Board.create(2), (Metrics(), Metrics())
    places = [Place(board, number, metrics) for number, metrics in enumerate(both)]
    _count(both[0], 3)
    places[0].publish()
    _count(both[1], 4)

    seen = places[1].gather()
    durations = dict(seen["request_duration_seconds"])["invoke",]

    assert _requests(seen) == 7
    assert sum(durations[:-1]) == 7
    assert round(durations[-1], 6) == 0.14


def test_a_board_is_opened_by_its_descriptor() -> None:
    """A process that was given the descriptor sees the same places."""
    board, metrics = Board.create(3), Metrics()
    _count(metrics, 2)
    board.write(2, metrics.snapshot())

    other = Board(os.dup(board.descriptor))
    seen = other.read(2)

    assert other.places == 3
    assert seen is not None
    assert _requests(seen) == 2


def test_a_new_worker_counts_on_where_the_dead_one_stopped() -> None:
    """No counter falls, or Prometheus would take the fall for a new beginning of them all."""
    board, dead, new = Board.create(1), Metrics(), Metrics()
    _count(dead, 5)
    Place(board, 0, dead).publish()

    place = Place(board, 0, new)
    _count(new, 1)

    assert _requests(place.gather()) == 6
    assert dict(place.gather()["requests_in_flight"])[()] == [0]


def test_a_dead_workers_gauges_are_nobodys() -> None:
    """What it had in flight is over; what it counted happened."""
    clock = Clock()
    board, dead = Board.create(2), Metrics()
    board._clock = clock
    dead.begin(Record(b"i", 1.0, "a"), [])
    _count(dead, 1)
    Place(board, 0, dead).publish()
    place = Place(board, 1, Metrics())
    before = dict(place.gather()["requests_in_flight"])[()]
    clock.now += 60

    assert before == [1]
    assert dict(place.gather()["requests_in_flight"])[()] == [0]
    assert _requests(place.gather()) == 1


def test_a_worker_that_leaves_takes_its_gauges_along() -> None:
    """It says so in its last words."""
    board, metrics = Board.create(2), Metrics()
    metrics.begin(Record(b"i", 1.0, "a"), [])
    place = Place(board, 0, metrics)
    place.publish()
    place.publish(leaving=True)

    assert dict(Place(board, 1, Metrics()).gather()["requests_in_flight"])[()] == [0]


def test_a_worker_killed_in_the_middle_of_writing_loses_only_that() -> None:
    """The half that it wrote before still counts."""
    board, metrics = Board.create(1), Metrics()
    place = Place(board, 0, metrics)
    _count(metrics, 1)
    place.publish()
    _count(metrics, 1)
    place.publish()
    board._memory[30:40] = b"\0" * 10  # the second publication went to the even half

    seen = board.read(0)

    assert seen is not None
    assert _requests(seen) == 1


def test_an_empty_place_is_nobodys() -> None:
    """Before a worker's first words there is nothing."""
    assert Board.create(1).read(0) is None


def test_the_most_that_can_be_counted_fits_a_place() -> None:
    """With every operation, method, status and kind that there are, and every code: far below a half."""
    metrics = Metrics()
    for number in range(300):
        for method in ("GET", "POST", "PUT", "DELETE", "other"):
            record = Record(b"i", 1.0, "a", method, "/", operation=f"operation-{number % 20}", status=200 + number)
            record.fault, record.code = "client", f"some_code_{number}"
            metrics.end(record, 2.0)
    board = Board.create(1)
    board.write(0, metrics.snapshot())
    seen = board.read(0)

    assert seen is not None
    assert _requests(seen) == 1500
    assert _HALF > 300_000


def test_what_can_only_be_true_of_all_is_not_summed() -> None:
    """Two workers without a key store are no store that answers twice."""
    assert FAMILIES["key_store_up"].merge == "min"
    up: Snapshot = {"key_store_up": [((), [1.0])], "streams_active": [((), [2.0])]}
    down: Snapshot = {"key_store_up": [((), [0.0])], "streams_active": [((), [3.0])]}

    both = merged([up, down])

    assert both["key_store_up"] == [((), [0.0])]
    assert both["streams_active"] == [((), [5.0])]
