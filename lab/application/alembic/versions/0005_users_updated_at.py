"""Keep users.updated_at by a trigger: operators change users by hand too."""

from __future__ import annotations

from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    op.execute(
        """
        CREATE FUNCTION public.set_updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            NEW.updated_at := now();
            RETURN NEW;
        END
        $$
        """
    )
    op.execute(
        """
        CREATE TRIGGER users_updated_at BEFORE UPDATE ON public.users
        FOR EACH ROW EXECUTE FUNCTION public.set_updated_at()
        """
    )
    op.execute("COMMENT ON TABLE public.users IS '面接の受験者と担当者'")


def downgrade() -> None:
    op.execute("COMMENT ON TABLE public.users IS NULL")
    op.execute("DROP TRIGGER users_updated_at ON public.users")
    op.execute("DROP FUNCTION public.set_updated_at()")
