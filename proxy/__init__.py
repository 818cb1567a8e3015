"""The life of a request, in the order in which it meets the rooms of this house.

1.  `observability`   gives it an id and a Record; whatever goes wrong further in becomes an answer here.
2.  `authentication`  reads its credential (`credentials`) and proves it, by key (`keycache`) or token (`tokens`);
                      without a principal nothing else runs, and no byte of the body has been read. What is
                      refused, and where keys are used from, goes into the `audit`.
                      A token is taken apart (`jose`), its signature proven with its issuer's keys (`issuers`,
                      `publickeys`, `jwks`), its claims held to the issuer's rules (`claims`), and whether it was
                      revoked is asked (`revocations`). Then `delegation` says for whom the principal acts.
3.  `routes`          finds its row in the allow-list (`operations`); what has no row does not exist.
4.  `authorization`   turns principal and operation into a permit, the only thing that can be forwarded.
5.  `limits`          charges the caller's quota (`windows`), or refuses.
6.  `relay`           reads the body, bounded in size and time.
7.  `tenancy`         binds the thread ids in it to the principal.
8.  `forwarding`      writes the request that the sidecar will see, with the caller's internal identity.
9.  `upstream`        sends it on a clean connection; `answers` reads what comes back, strictly.
10. `relay`           passes the bytes on as they come, until either side ends it.
11. `observability`   writes the access line.

`listing` filters the one answer that is not passed on as it came. `model`, `errors` and `outages` hold what travels;
`keys` are those of a file, `keystore` has those of a database, `keylookup` asks for them and `keycommands` writes them.
`settings` and `tokensettings`, which `environment` reads, `app`, `openapi` (and its `docspage`), `server` (with
`protocol`, and `workers` where there are several), `cli` and `dev` build the house and open the door.
"""
