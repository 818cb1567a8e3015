"""Acting for another user: who may, what may be named, and that no two namespaces are ever one."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.claims import ClaimRules, accept_claims
from proxy.delegation import act_for, act_for_named
from proxy.errors import ClientProblem, CredentialInvalid, ScopeMissing
from proxy.model import CredentialKind, Principal

SERVICE = Principal("svc", "svc", "key:SVC", frozenset({"agent:impersonate", "agent:invoke"}), CredentialKind.API_KEY)
PLAIN = Principal("bob", "bob", "jwt:0::bob", frozenset({"agent:invoke"}), CredentialKind.JWT)
NAMES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=12)


def named(*values: bytes) -> list[tuple[bytes, bytes]]:
    """Make a request's headers."""
    return [(b"accept", b"*/*"), *((b"x-on-behalf-of", value) for value in values)]


def test_who_names_nobody_acts_for_himself() -> None:
    """Without the header nothing changes, with the scope or without it."""
    assert act_for_named(PLAIN, named()) is PLAIN
    assert act_for_named(SERVICE, named()) is SERVICE


def test_a_service_acts_for_its_user() -> None:
    """The user's namespace, the service's scopes, name and quota."""
    acting = act_for_named(SERVICE, named(b"alice@example.com"))

    assert acting.namespace == "for:7:key:SVC:alice@example.com"
    assert (acting.name, acting.on_behalf_of, acting.scopes) == ("svc", "alice@example.com", SERVICE.scopes)
    assert acting.partition == SERVICE.partition == "key:SVC"


@pytest.mark.parametrize("values", [[b"alice"], [b""], [b"alice", b"alice"]])
def test_the_scope_is_needed(values: list[bytes]) -> None:
    """Whoever lacks it is refused, whatever he names; he does not quietly act for himself."""
    with pytest.raises(ScopeMissing, match="agent:impersonate"):
        act_for_named(PLAIN, named(*values))


@pytest.mark.parametrize(
    "values",
    [
        [b""],
        [b" "],
        [b" a"],
        [b"a "],
        [b"a\tb"],
        [b"a\x00"],
        [b"a\r\nb"],
        [b"\xc3\xa9"],
        [b"a" * 256],
        [b"a", b"a"],
        [b"a", b"b"],
    ],
    ids=repr,
)
def test_a_name_is_one_printable_text(values: list[bytes]) -> None:
    """Empty, padded, unprintable, too long or twice: 400."""
    with pytest.raises(ClientProblem) as refused:
        act_for_named(SERVICE, named(*values))

    assert refused.value.status == 400


def service(subject: str, namespace: str, tenant: str = "acme", issuer: str = "https://idp.test") -> Principal:
    """Prove a service's token, with leave to act for users, under a namespace setting."""
    rules = ClaimRules(namespace="tenant" if namespace == "tenant" else "principal")
    told = {"iss": issuer, "sub": subject, "tenant": tenant, "exp": 100, "scope": "agent:impersonate"}
    return accept_claims(told, rules, 0).principal


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        (service("svc1", "principal"), service("svc2", "principal"), False),
        (service("svc1", "principal"), service("svc1", "principal", "globex"), True),
        (service("svc1", "tenant"), service("svc2", "tenant"), True),
        (service("svc1", "tenant"), service("svc2", "tenant", "globex"), False),
        (service("svc1", "tenant"), service("svc2", "tenant", issuer="https://other.test"), False),
        (service("svc1", "tenant"), service("svc1", "principal"), False),
        (SERVICE, replace(SERVICE, namespace="key:OTHER"), False),
    ],
)
def test_a_user_is_shared_by_the_services_of_one_tenant_alone(one: Principal, other: Principal, shared: bool) -> None:
    """Where a tenant owns the threads, its services act for the same users; everywhere else each has its own.

    The quota is each service's own in any case, and the tenant's own threads are no user's.
    """
    first, second = (act_for_named(each, named(b"alice")) for each in (one, other))

    assert (first.namespace == second.namespace) is shared
    assert (first.partition == second.partition) is (one.partition == other.partition)
    assert first.namespace not in {one.namespace, other.namespace}


def principals() -> st.SearchStrategy[Principal]:
    """Make every kind of principal there is, with names chosen to be mistaken for one another."""
    parts = st.sampled_from(["a", "key:SVC", "for:1:a:b", "jwt:0::a", "tenant:0::a", ":", "1:a", "a:b", ""]) | NAMES
    claims = st.fixed_dictionaries({"sub": parts, "iss": parts, "tenant": parts})

    def of_claims(given_claims: dict[str, str], namespace: str) -> Principal | None:
        rules = ClaimRules(namespace="tenant" if namespace == "tenant" else "principal")
        try:
            return accept_claims({"exp": 100} | given_claims, rules, 0).principal
        except CredentialInvalid:
            return None

    proven = st.builds(of_claims, claims, st.sampled_from(["principal", "tenant"])).filter(
        lambda made: made is not None
    )
    by_key = parts.map(lambda key: Principal(key, key, f"key:{key}", frozenset(), CredentialKind.API_KEY))
    return proven | by_key  # type: ignore[return-value]


@given(principals(), NAMES, principals(), NAMES)
def test_no_two_delegations_are_one(one: Principal, user: str, other: Principal, another: str) -> None:
    """Two namespaces are the same only if both the owner and the user are; and none is anybody's own."""
    first, second = act_for(one, user).namespace, act_for(other, another).namespace

    assert (first == second) == ((one.namespace, user) == (other.namespace, another))
    assert first not in (one.namespace, other.namespace)


@given(principals(), principals())
def test_a_quota_is_its_callers_own(one: Principal, other: Principal) -> None:
    """Users of one tenant share threads and not quotas; acting for many users is one quota."""
    assert act_for(one, "x").partition == one.partition
    if one.namespace != other.namespace and not {one.caller, other.caller} - {""}:
        assert one.partition != other.partition
