"""Whose address a request counts as, with proxies before us and without."""

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.failures import address_partition
from proxy.model import Headers
from proxy.observability import client_address

PEER = ("10.0.0.1", 4711)


def forwarded(*values: bytes) -> Headers:
    """Make the fields of a request that came through proxies."""
    return [(b"accept", b"*/*"), *((b"x-forwarded-for", value) for value in values)]


@pytest.mark.parametrize(
    ("hops", "values", "address"),
    [
        (0, (), "10.0.0.1"),
        (0, (b"1.1.1.1",), "10.0.0.1"),
        (1, (), "10.0.0.1"),
        (1, (b"",), "10.0.0.1"),
        (1, (b" , ,",), "10.0.0.1"),
        (1, (b"1.1.1.1",), "1.1.1.1"),
        (1, (b"6.6.6.6, 1.1.1.1",), "1.1.1.1"),
        (1, (b"6.6.6.6", b"1.1.1.1"), "1.1.1.1"),
        (1, (b"6.6.6.6,\t1.1.1.1 ,",), "1.1.1.1"),
        (2, (b"1.1.1.1",), "10.0.0.1"),
        (2, (b"6.6.6.6, 1.1.1.1, 2.2.2.2",), "1.1.1.1"),
        (2, (b"6.6.6.6, 1.1.1.1", b"2.2.2.2"), "1.1.1.1"),
        (1, (b"2001:db8::1",), "2001:db8::1"),
        (1, (b"x" * 100,), "x" * 64),
        (1, (b"\xff\x00",), "\xff\x00"),
    ],
)
def test_hops_are_counted_from_the_right(hops: int, values: tuple[bytes, ...], address: str) -> None:
    """The entry counts that the last trusted hop wrote; without enough of them, the peer itself."""
    assert client_address(PEER, forwarded(*values), trusted_hops=hops) == address


@pytest.mark.parametrize(("hops", "address"), [(0, "unknown"), (1, "1.1.1.1"), (2, "unknown")])
def test_a_peer_without_an_address_is_unknown(hops: int, address: str) -> None:
    """A peer behind a Unix socket has none of its own."""
    assert client_address(None, forwarded(b"1.1.1.1"), trusted_hops=hops) == address


@given(st.lists(st.binary(max_size=12), max_size=4), st.integers(1, 3))
def test_what_a_client_makes_up_counts_for_nothing(made_up: list[bytes], hops: int) -> None:
    """Whatever a client sent along, the entries that trusted hops appended decide."""
    honest = [b"1.1.1.1", b"2.2.2.2", b"3.3.3.3"][:hops]

    address = client_address(PEER, forwarded(*made_up, b", ".join(honest)), trusted_hops=hops)

    assert address == "1.1.1.1"


@given(st.lists(st.binary(max_size=12), max_size=4))
def test_without_trust_nothing_is_believed(values: list[bytes]) -> None:
    """By default nobody before us is trusted."""
    assert client_address(PEER, forwarded(*values), trusted_hops=0) == "10.0.0.1"


@pytest.mark.parametrize(
    ("address", "partition"),
    [
        ("1.2.3.4", "1.2.3.4"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("2001:db8:0:1::1", "2001:db8:0:1::-64"),
        ("2001:db8:0:1:ffff:ffff:ffff:ffff", "2001:db8:0:1::-64"),
        ("2001:DB8:0:1::2", "2001:db8:0:1::-64"),
        ("2001:db8:0:2::1", "2001:db8:0:2::-64"),
        ("fe80::1%eth0", "fe80::-64"),
        ("::1", "::-64"),
        ("", "unknown"),
        ("unknown", "unknown"),
        ("1.2.3.4:5", "1.2.3.4"),
        ("1.2.3", "unknown"),
        ("01.2.3.4", "unknown"),
        ("[::1]", "::-64"),
        ("[2001:db8::1]:443", "2001:db8::-64"),
        ("1.2.3.4, 5.6.7.8", "unknown"),
        ("\xff", "unknown"),
    ],
)
def test_an_address_counts_as_a_subscriber(address: str, partition: str) -> None:
    """One of IPv4 is itself, however written; of IPv6 the /64 that one subscriber has (RFC 6177)."""
    assert address_partition(address) == partition


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_a_subscriber_is_one_partition(prefix: int, one: int, other: int) -> None:
    """No choice of the lower half of an address makes another of it."""
    partitions = {address_partition(str(IPv6Address(prefix << 64 | host))) for host in (one, other)}

    mapped = {host for host in (one, other) if prefix == 0 and host >> 32 == 0xFFFF}
    assert len(partitions) == 1 or mapped


@given(st.ip_addresses(v=4) | st.ip_addresses(v=6), st.ip_addresses(v=4) | st.ip_addresses(v=6))
def test_two_subscribers_are_two_partitions(one: IPv4Address | IPv6Address, other: IPv4Address | IPv6Address) -> None:
    """Nobody pays for the failures of another network."""
    blocks = {(each.version, int(each) >> 64 if each.version == 6 else int(each)) for each in (one, other)}

    partitions = {address_partition(str(each)) for each in (one, other)}

    mapped = [each for each in (one, other) if isinstance(each, IPv6Address) and each.ipv4_mapped]
    assert len(partitions) == len(blocks) or mapped


@given(st.text() | st.binary(max_size=20).map(lambda raw: raw.decode("latin-1")))
def test_any_address_is_a_partition(address: str) -> None:
    """No address fails, and no partition is empty."""
    assert address_partition(address)


def test_an_address_is_taken_apart_once() -> None:
    """Every request with a key asks what its address counts as, and a caller has the same one for long."""
    address_partition("198.51.100.7")
    before = address_partition.cache_info().misses

    assert address_partition("198.51.100.7") == "198.51.100.7"
    assert address_partition.cache_info().misses == before
