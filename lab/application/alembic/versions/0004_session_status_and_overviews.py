"""Session status as an enum, order of the times checked, an overview and monthly statistics."""

from __future__ import annotations

from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | None = None
depends_on: str | None = None

UPGRADE = (
    "CREATE TYPE public.session_status AS ENUM ('scheduled', 'in_progress', 'completed', 'cancelled')",
    """
    ALTER TABLE public.interview_sessions
        DROP CONSTRAINT interview_sessions_status_check,
        ALTER COLUMN status DROP DEFAULT,
        ALTER COLUMN status TYPE public.session_status USING status::public.session_status,
        ALTER COLUMN status SET DEFAULT 'scheduled',
        ADD CONSTRAINT interview_sessions_score_check CHECK (score BETWEEN 0 AND 1000),
        ADD CONSTRAINT interview_sessions_times_check CHECK (ended_at >= started_at)
    """,
    """
    CREATE VIEW public.session_overview AS
    SELECT s.id, s.position, s.status, s.score, s.started_at, s.duration_seconds, u.username, u.candidate_number,
           (SELECT count(*) FROM public.interview_messages m WHERE m.session_id = s.id) AS messages
    FROM public.interview_sessions s JOIN public.users u ON u.id = s.user_id
    """,
    """
    CREATE MATERIALIZED VIEW public.position_statistics AS
    SELECT position, date_trunc('month', started_at AT TIME ZONE 'Asia/Tokyo')::date AS month, status,
           count(*) AS sessions, round(avg(score), 2) AS average_score, sum(duration_seconds) AS duration_seconds
    FROM public.interview_sessions GROUP BY 1, 2, 3
    """,
    # REFRESH … CONCURRENTLY needs it.
    "CREATE UNIQUE INDEX position_statistics_key ON public.position_statistics (position, month, status)",
)

DOWNGRADE = (
    "DROP MATERIALIZED VIEW public.position_statistics",
    "DROP VIEW public.session_overview",
    """
    ALTER TABLE public.interview_sessions
        DROP CONSTRAINT interview_sessions_times_check,
        DROP CONSTRAINT interview_sessions_score_check,
        ALTER COLUMN status DROP DEFAULT,
        ALTER COLUMN status TYPE text USING status::text,
        ALTER COLUMN status SET DEFAULT 'scheduled',
        ADD CONSTRAINT interview_sessions_status_check
            CHECK (status IN ('scheduled', 'in_progress', 'completed', 'cancelled'))
    """,
    "DROP TYPE public.session_status",
)


def upgrade() -> None:
    for statement in UPGRADE:
        op.execute(statement)


def downgrade() -> None:
    for statement in DOWNGRADE:
        op.execute(statement)
