"""Properties of a database that `pg_dump` without `-C` omits: owner, locale, privileges, settings."""

from __future__ import annotations

from psycopg import sql
from pydantic import BaseModel, ConfigDict

from blocks.postgres.server import Connection, execute

# src/bin/pg_dump/dumputils.c, variable_is_guc_list_quote: their elements are quoted one by one.
QUOTED_LISTS = frozenset(("local_preload_libraries", "search_path", "session_preload_libraries", "temp_tablespaces"))
PROVIDERS = {"c": "libc", "i": "icu", "b": "builtin"}


class Properties(BaseModel):
    """A database's own attributes. `acl` is `grantee: privilege` lines, `settings` are (role or "", name, value)."""

    model_config = ConfigDict(frozen=True)
    owner: str
    encoding: str
    provider: str
    collate: str
    ctype: str
    locale: str
    rules: str
    collation_version: str
    tablespace: str
    connection_limit: int
    comment: str
    acl: tuple[str, ...]
    settings: tuple[tuple[str, str, str], ...]
    template: bool = False


def read_properties(connection: Connection, database: str) -> Properties:
    """Read them from any database of the same server."""
    row = execute(
        connection,
        """
        SELECT pg_get_userbyid(d.datdba), pg_encoding_to_char(d.encoding), to_jsonb(d) ->> 'datlocprovider',
               d.datcollate, d.datctype, coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale', ''),
               coalesce(to_jsonb(d) ->> 'daticurules', ''), coalesce(to_jsonb(d) ->> 'datcollversion', ''),
               t.spcname, d.datconnlimit, coalesce(shobj_description(d.oid, 'pg_database'), ''),
               ARRAY(SELECT format('%%s: %%s%%s', coalesce(r.rolname, 'PUBLIC'), a.privilege_type,
                                   CASE WHEN a.is_grantable THEN ' with grant option' ELSE '' END)
                     FROM aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
                     LEFT JOIN pg_roles r ON r.oid = a.grantee ORDER BY 1),
               ARRAY(SELECT ARRAY[coalesce(r.rolname, ''), split_part(item, '=', 1),
                                  substr(item, strpos(item, '=') + 1)]
                     FROM pg_db_role_setting s LEFT JOIN pg_roles r ON r.oid = s.setrole
                     CROSS JOIN unnest(s.setconfig) item WHERE s.setdatabase = d.oid ORDER BY 1),
               d.datistemplate
        FROM pg_catalog.pg_database d JOIN pg_catalog.pg_tablespace t ON t.oid = d.dattablespace
        WHERE d.datname = %s
        """,
        database,
    )[0]
    owner, encoding, provider, collate, ctype, locale, rules, version, tablespace, limit, comment, acl = row[:12]
    settings, template = row[12:]
    return Properties(
        owner=owner,
        encoding=encoding,
        provider=PROVIDERS.get(provider or "c", "libc"),
        collate=collate,
        ctype=ctype,
        locale=locale,
        rules=rules,
        collation_version=version,
        tablespace=tablespace,
        connection_limit=limit,
        comment=comment,
        acl=tuple(acl),
        settings=tuple((str(a), str(b), str(c)) for a, b, c in settings),
        template=template,
    )


def creation(database: str, properties: Properties) -> sql.Composed:
    """`CREATE DATABASE` from template0 with the same encoding, locale and tablespace."""
    parts = [
        sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(database)),
        sql.SQL("OWNER {}").format(sql.Identifier(properties.owner)),
        sql.SQL("ENCODING {}").format(properties.encoding),
        sql.SQL("LC_COLLATE {} LC_CTYPE {}").format(properties.collate, properties.ctype),
        # Always explicit: the default is template0's provider, which can be another.
        sql.SQL("LOCALE_PROVIDER {}").format(sql.Identifier(properties.provider)),
    ]
    if properties.provider != "libc":
        kind = "ICU_LOCALE {}" if properties.provider == "icu" else "BUILTIN_LOCALE {}"
        parts.append(sql.SQL(kind).format(properties.locale))
    if properties.rules:
        parts.append(sql.SQL("ICU_RULES {}").format(properties.rules))
    if properties.tablespace != "pg_default":
        parts.append(sql.SQL("TABLESPACE {}").format(sql.Identifier(properties.tablespace)))
    return sql.SQL(" ").join(parts)


def apply_properties(connection: Connection, database: str, wanted: Properties) -> None:
    """Give a database the privileges, settings, connection limit and comment of another.

    Do this last: a setting such as `default_transaction_read_only` would stop the restore itself.
    """
    name = sql.Identifier(database)
    grantees = {line.split(": ")[0] for line in (*wanted.acl, *read_properties(connection, database).acl)}
    for grantee in sorted(grantees | {"PUBLIC", wanted.owner}):
        connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM {}").format(name, _role(grantee)))
    for line in wanted.acl:
        grantee, privilege = line.split(": ", 1)
        words = privilege.removesuffix(" with grant option")
        option = " WITH GRANT OPTION" if words != privilege else ""
        grant = sql.SQL("GRANT " + words + " ON DATABASE {} TO {}" + option)
        connection.execute(grant.format(name, _role(grantee)))
    for role, setting, value in wanted.settings:
        _apply_setting(connection, name, role, setting, value)
    connection.execute(sql.SQL("ALTER DATABASE {} CONNECTION LIMIT {}").format(name, wanted.connection_limit))
    connection.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(name, wanted.comment or None))
    connection.execute(sql.SQL("ALTER DATABASE {} IS_TEMPLATE {}").format(name, wanted.template))


def _apply_setting(connection: Connection, database: sql.Identifier, role: str, setting: str, value: str) -> None:
    whose = (
        sql.SQL("ALTER ROLE {} IN DATABASE {}").format(sql.Identifier(role), database)
        if role
        else sql.SQL("ALTER DATABASE {}").format(database)
    )
    parameter = sql.SQL(".").join(sql.Identifier(part) for part in setting.split("."))
    if setting not in QUOTED_LISTS:
        connection.execute(whose + sql.SQL(" SET {} TO {}").format(parameter, value))
        return
    # FROM CURRENT stores the text unchanged, so no list has to be split and quoted again here.
    with connection.transaction():
        execute(connection, "SELECT set_config(%s, %s, true)", setting, value)
        connection.execute(whose + sql.SQL(" SET {} FROM CURRENT").format(parameter))


def _role(name: str) -> sql.Composable:
    return sql.SQL("PUBLIC") if name == "PUBLIC" else sql.Identifier(name)
