#!/bin/sh
# As in the official image: the database's schema first, then the proxy with the arguments given.
set -e
[ -z "${DATABASE_URL:-}" ] || NODE_PATH=/opt/prisma-engine/node_modules node /app/first-start.js
exec litellm "$@"
