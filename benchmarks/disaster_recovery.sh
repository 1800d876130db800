#!/bin/bash
# disaster_recovery.sh of the manual (§8.2), step by step, with the lab's programs in the place of the host's.
#
# supervisord takes systemd's place: stopping waits for the end, starting does not wait, and neither costs the start of
# an interpreter. Everything else comes from the environment.

set -e

BACKUP_DATE=$1
if [ -z "$BACKUP_DATE" ]; then
  echo "Usage: $0 YYYYMMDD"
  exit 1
fi

ask() { # ask PORT HEAD BODY: one HTTP request on loopback; HEAD is a format with its lines ended by \r\n
  exec 3<>"/dev/tcp/127.0.0.1/$1"
  # shellcheck disable=SC2059
  printf "$2\r\n" >&3
  printf '%s' "$3" >&3
  cat <&3
  exec 3>&-
}

supervisorctl() { # supervisorctl stop|start NAME
  local wait=1 body
  [ "$1" = start ] && wait=0
  body="<methodCall><methodName>supervisor.${1}Process</methodName><params>\
<param><value><string>$2</string></value></param>\
<param><value><boolean>$wait</boolean></value></param></params></methodCall>"
  ask "$SUPERVISOR_PORT" "POST /RPC2 HTTP/1.0\r\nAuthorization: Basic $SUPERVISOR_LOGIN\r\n\
Content-Type: text/xml\r\nContent-Length: ${#body}\r\n" "$body" | grep -q '200 OK'
}

echo "=== Starting Disaster Recovery - $(date) ==="
echo "Restoring from backup: $BACKUP_DATE"

# 1. サービス停止
echo "Stopping services..."
supervisorctl stop grc-backend
supervisorctl stop grc-frontend
supervisorctl stop redis

# 2. データベースリストア
echo "Restoring database..."
dropdb -U postgres grc_db
createdb -U postgres grc_db
pg_restore -U postgres -d grc_db "$BACKUP_DIRECTORY/backup_${BACKUP_DATE}.dump"

# 3. Redisリストア
echo "Restoring Redis..."
supervisorctl stop redis
cp "$BACKUP_DIRECTORY/dump_${BACKUP_DATE}.rdb" "$REDIS_DATA/dump.rdb"
chown "$REDIS_OWNER" "$REDIS_DATA/dump.rdb"
supervisorctl start redis

# 4. アプリケーションファイルリストア（必要に応じて）
echo "Restoring application files..."
# rsync -av /backup/app/${BACKUP_DATE}/ /opt/grc/

# 5. マイグレーション実行
echo "Running migrations..."
cd "$BACKEND_DIRECTORY"
"$PYTHON" -m alembic upgrade head

# 6. サービス起動
echo "Starting services..."
supervisorctl start redis
supervisorctl start grc-backend
supervisorctl start grc-frontend

# 7. ヘルスチェック
echo "Health check..."
before=$EPOCHREALTIME
sleep 10
after=$EPOCHREALTIME
echo "slept $before $after"
ask "$BACKEND_PORT" "GET /health HTTP/1.0\r\nHost: localhost\r\n" ""

echo
echo "=== Disaster Recovery Complete - $(date) ==="
