#!/bin/sh
# What deployments rely on of the official image's entrypoint: bare options mean the server, and no root.
set -e
case "${1:-}" in
  -* | *.conf) set -- redis-server "$@" ;;
esac
if [ "$1" = redis-server ] && [ "$(id -u)" = 0 ]; then
  chown redis:redis .
  exec setpriv --reuid=redis --regid=redis --init-groups "$0" "$@"
fi
# The official image has protected mode compiled out: in a container everybody is remote.
[ "$1" != redis-server ] || set -- "$@" --protected-mode no
exec "$@"
