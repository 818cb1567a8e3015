"""Acting for another: what `X-On-Behalf-Of` makes of a principal who may say so.

Pure; the user who is named is one of that principal's own, and nobody who has a credential himself.
"""

import re
from dataclasses import replace
from typing import Final

from proxy.errors import ClientProblem, ScopeMissing
from proxy.model import Headers, Principal
from proxy.operations import IMPERSONATE

ON_BEHALF_OF: Final = b"x-on-behalf-of"
_USER: Final = re.compile(rb"[!-~](?:[ -~]{0,253}[!-~])?")


def act_for_named(principal: Principal, headers: Headers) -> Principal:
    """Give the principal whose threads are meant: `principal`, or the user of its own that it names.

    Raises ScopeMissing for a name without the scope for it, ClientProblem for one that is no name.
    """
    named = [value for name, value in headers if name == ON_BEHALF_OF]
    if not named:
        return principal
    if IMPERSONATE not in principal.scopes:
        raise ScopeMissing(IMPERSONATE)
    if len(named) != 1 or _USER.fullmatch(named[0]) is None:
        raise ClientProblem("X-On-Behalf-Of must be one name of 1 to 255 printable ASCII characters.")
    return act_for(principal, named[0].decode("ascii"))


def act_for(principal: Principal, user: str) -> Principal:
    """Give `principal` acting for `user`: its scopes and its quota, a namespace of their own.

    The length before the owner's namespace parts the two names, whatever either of them contains.
    """
    owner = principal.namespace
    return replace(
        principal,
        subject=user,
        namespace=f"for:{len(owner)}:{owner}:{user}",
        on_behalf_of=user,
        caller=principal.caller or owner,
    )
