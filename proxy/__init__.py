"""The life of a request, in the order in which it meets the rooms of this house.

1.  `observability`   gives it an id and a Record; whatever goes wrong further in becomes an answer here.
2.  `authentication`  reads its credential (`credentials`) and proves it, by key (`keycache`) or token (`tokens`);
                      without a principal nothing else runs, and no byte of the body has been read. What is
                      refused, and where keys are used from, goes into the `audit` (to its `auditfile`); `failures` are
                      counted per address.
                      A token is taken apart (`jose`), its signature proven with its issuer's keys (`issuers`,
                      `publickeys`, `jwks`), its claims held to the issuer's rules (`claims`), and whether it was
                      revoked is asked (`revocations`). Then `delegation` says for whom the principal acts.
3.  `routes`          finds its row in the allow-list (`operations`); what has no row does not exist.
4.  `authorization`   turns principal and operation into a permit, the only thing that can be forwarded.
5.  `overload`        refuses new work while the proxy has too much to do, the lowest tier's first; then
    `admission`       charges every quota of the request's plan (`policies`), or refuses: in this process (`localtier`,
                      on slowapi's limiter from `limits`, with counts in `windows`) or for all replicas at once
                      (`redistier`, through `redisclient`; what Redis is still to be told is `outstanding`, charges
                      as `debts`). `standings` tells what is left, `leases` hold what runs.
6.  `relay`           reads the body, bounded in size and time.
7.  `tenancy`         binds the thread ids in it to the principal (`agui` in that protocol's own form), and opens
                      the `handles` of the principal's files.
8.  `forwarding`      writes the request that the sidecar will see, with the caller's internal identity.
9.  `upstream`        sends it on a clean connection to the `origin`; `answers` reads what comes back, strictly.
10. `relay`           passes the bytes on as they come, until either side ends it; a run's stream (`streams`) as lines
                      or as events (`framing`), as its client asked (`negotiation`). `usage` reads from them what the
                      run has used (of what is long, from its `outlines`), `tallies` add it up; `aguievents` keeps
                      what an exception said out of AG-UI. `runs` knows which go on, and minds those whose client left.
11. `observability`   tells its watchers that it has ended: the `accesslog` writes its line, `metrics` count it,
                      `traces` send its spans.

`listing` filters the one answer that is made here. `filing` has the phases of files, and `uploads` sends their bytes
upstream, named by `handles`; `agui` binds AG-UI's own body; `duplex` relays WebSockets, on which two ends have a
`conversation` whose messages `frames` binds; of these two there are so many `places`.
`model`, `errors`, `outages` and `ends` hold what travels, `storedkeys` what is kept;
`keys` are those of a file, `keystore` has those of a database, `keylookup` asks for them and `keycommands` writes them,
of which `notices` tell every proxy.
`logs` writes what anybody has to say, and never waits for whoever reads it. The metrics are those of `families`;
`exposition` serves them, for several workers from one `board`. `telemetry` begins what `telemetrysettings` ask for.
`livecheck` asks everything that this proxy depends on how it is.
`settings`, `tokensettings`, `limitsettings`, `flowsettings`, `exchangesettings` and `overloadsettings`, which
`environment` reads and `reload` reads again, `app` (with FastAPI's `application`, and what serves no request in the
`background`, by `tasks`), `openapi` (and its `docspage`), `server` (with `protocol`, its `outbox`, `signals` and
`partings`, and `workers` where there are several), `cli`, `limitcommands` and `dev` build the house and open the door.
"""
