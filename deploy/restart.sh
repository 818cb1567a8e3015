#!/bin/sh
# Restarts the containers of one tier one after another: ./restart.sh agent, or ./restart.sh proxy.
# Each ends what it does first; the next waits until it is healthy, and until nginx has asked for its name again.
set -eu

service=${1:?usage: restart.sh SERVICE}
cd "$(dirname "$0")"

for container in $(docker compose -f docker-compose.yml -f docker-compose.scale.yml ps --quiet "$service"); do
    docker restart --time 40 "$container" >/dev/null
    until [ "$(docker inspect --format '{{.State.Health.Status}}' "$container")" = healthy ]; do
        sleep 1
    done
    # nginx: `valid=5s`, and `fail_timeout=2s` for one that refused.
    sleep 8
done
