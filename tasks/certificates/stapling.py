"""Whether a server staples an OCSP response: by `openssl s_client -status`, because Python cannot read it."""

from __future__ import annotations

from blocks.tls import TlsServer
from runbook import shell
from runbook.errors import OpsError
from runbook.kinds import probe

PATIENCE_SECONDS = 20
HINT = "check it by hand: openssl s_client -status -connect"


@probe
def read_stapled(server: TlsServer) -> str:
    """The status of the stapled response ("successful"), or "" without one.

    Raises:
        OpsError: openssl is missing, fails, or does not report it.
    """
    host = f"[{server.host}]" if ":" in server.host else server.host
    starting = [] if server.protocol == "https" else ["-starttls", server.protocol]
    there = ["-connect", f"{host}:{server.port}", "-servername", server.name]
    argv = ["openssl", "s_client", *there, "-status", *starting]
    printed = shell.run(argv, timeout_seconds=PATIENCE_SECONDS, hint=HINT).stdout
    if "OCSP response: no response sent" in printed:
        return ""
    for line in printed.splitlines():
        if line.strip().startswith("OCSP Response Status:"):
            return line.split(":", 1)[1].split("(")[0].strip()
    raise OpsError("openssl does not report whether an OCSP response is stapled", HINT)
