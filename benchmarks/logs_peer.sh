#!/usr/bin/env bash
# The manual's own commands (§5.2, §6.3, §6.4), with jq.
#   logs_peer.sh tokens | errors | audit FILE
set -euo pipefail
case "$1" in
    tokens)
        cat "$2" | jq -r 'select(.message == "AI API Call") | "\(.model) \(.total_tokens)"' |
            awk '{arr[$1]+=$2} END {for (i in arr) print i, arr[i]}'
        ;;
    errors)
        cat "$2" | jq -r 'select(.level == "ERROR") | .message' | sort | uniq -c | sort -rn | head -10 || [ "$?" = 141 ]
        ;;
    audit) cat "$2" | jq 'select(.user_id == "user-123")' ;;
esac
