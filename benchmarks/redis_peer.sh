#!/usr/bin/env bash
# The manual's own commands (§2.1, §2.2), with redis-cli. The password is in REDISCLI_AUTH.
#   redis_peer.sh PORT memkeys | ttl COUNT | clear PATTERN
set -euo pipefail
cli="redis-cli -p $1"
case "$2" in
    memkeys) $cli --memkeys >/dev/null ;;
    ttl) $cli --scan | head -n "$3" | xargs -I{} $cli TTL {} >/dev/null || [ "$?" = 141 ] ;;
    clear) $cli --scan --pattern "$3" | xargs $cli DEL >/dev/null ;;
esac
