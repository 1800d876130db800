"""An application that shares nothing with the lab's: other paths, tables and names, and no framework.

`/ready` answers 200 when PostgreSQL and Redis answer; `POST /members` adds one, `GET /members` counts them.
"""

from __future__ import annotations

import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psycopg
import redis


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        try:
            with psycopg.connect(os.environ["DATABASE_URL"], connect_timeout=5) as connection:
                row = connection.execute("SELECT count(*) FROM users").fetchone()
            redis.Redis.from_url(os.environ["REDIS_URL"], socket_timeout=5).ping()
        except (psycopg.Error, redis.RedisError) as error:
            self.answer(503, {"ready": False, "reason": type(error).__name__})
            return
        known = self.path in ("/ready", "/members")
        self.answer(200 if known else 404, {"ready": True, "members": row[0] if row else 0})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        statement = "INSERT INTO users (email, name) VALUES (%s, %s) RETURNING id"
        with psycopg.connect(os.environ["DATABASE_URL"], connect_timeout=5) as connection:
            row = connection.execute(statement, (body["email"], body["name"])).fetchone()
        self.answer(201, {"id": row[0] if row else None})

    def answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
