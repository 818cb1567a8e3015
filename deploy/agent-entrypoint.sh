#!/bin/sh
# Turns NAME_FILE into NAME for what the agent reads from its environment alone, then becomes the command.
set -eu

for name in JWT_SECRET_KEY OPENAI_API_KEY AGENT_POSTGRES_DSN AGENT_REDIS_URL; do
    eval "file=\${${name}_FILE:-}"
    if [ -n "$file" ]; then
        value=$(cat "$file")
        export "$name=$value"
        unset "${name}_FILE" value
    fi
done

exec "$@"
