"""Whether a server staples an OCSP answer to its handshake: asked of `openssl s_client -status`, as Python cannot."""

from __future__ import annotations

from blocks.tls import TlsServer
from runbook import shell
from runbook.errors import OpsError
from runbook.kinds import probe

PATIENCE_SECONDS = 20
HINT = "look at it by hand: openssl s_client -status -connect"


@probe
def read_stapled(server: TlsServer) -> str:
    """What was stapled: its status ("successful"), or "" where nothing was.

    Raises:
        OpsError: openssl is missing, fails, or does not say.
    """
    host = f"[{server.host}]" if ":" in server.host else server.host
    starting = [] if server.protocol == "https" else ["-starttls", server.protocol]
    there = ["-connect", f"{host}:{server.port}", "-servername", server.name]
    argv = ["openssl", "s_client", *there, "-status", *starting]
    said = shell.run(argv, timeout_seconds=PATIENCE_SECONDS, hint=HINT).stdout
    if "OCSP response: no response sent" in said:
        return ""
    for line in said.splitlines():
        if line.strip().startswith("OCSP Response Status:"):
            return line.split(":", 1)[1].split("(")[0].strip()
    raise OpsError("openssl does not say whether an OCSP answer is stapled", HINT)
