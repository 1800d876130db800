"""Google's own credential chain against a real token endpoint and a real metadata server, both on loopback."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from google.auth.compute_engine import _metadata

from blocks.ai_providers import AIProviders
from runbook.errors import OpsError
from tasks.ai.vertex import ADC_FILE, SCOPE, ask_vertex, find_vertex_token
from tests.fixtures.faulty import FaultyHandler, FaultyServer, serving
from tests.fixtures.providers import TOKEN, providers

GRANT = "urn:ietf:params:oauth:grant-type:jwt-bearer"


class Google(FaultyHandler):
    """oauth2.googleapis.com/token, which checks signatures, and a metadata server."""

    public: ClassVar[rsa.RSAPublicKey]

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        head, claims, signature = form["assertion"][0].split(".")
        given = base64.urlsafe_b64decode(signature + "==")
        try:
            self.public.verify(given, f"{head}.{claims}".encode(), padding.PKCS1v15(), hashes.SHA256())
        except Exception:
            self._json(400, {"error": "invalid_grant", "error_description": "Invalid JWT Signature."})
            return
        told = json.loads(base64.urlsafe_b64decode(claims + "=="))
        good = (form["grant_type"], told["iss"], told["scope"]) == ([GRANT], "ops@grc.iam.test", SCOPE)
        self._json(200 if good else 400, {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"})

    def do_GET(self) -> None:
        assert self.headers["Metadata-Flavor"] == "Google"
        found = {
            "access_token": TOKEN,
            "expires_in": 3600,
            "token_type": "Bearer",
            "email": "ops@grc.iam.test",
            "scopes": [SCOPE],
            "aliases": ["default"],
        }
        if "/project/project-id" in self.path:
            self.send(200, b"grc", Content_Type="text/plain", Metadata_Flavor="Google")
        else:
            self._json(200, found)

    def _json(self, status: int, body: object) -> None:
        self.send(status, json.dumps(body).encode(), Content_Type="application/json", Metadata_Flavor="Google")


@pytest.fixture
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer[str]]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "GOOGLE_CLOUD_PROJECT", "CLOUDSDK_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(_metadata, "_NO_GCE_CHECK", True)  # read from NO_GCE_CHECK at import, as its host is
    monkeypatch.setenv("PATH", str(tmp_path))
    with serving(FaultyServer[str](Google)) as server:
        yield server


def account(path: Path, token_uri: str, key: rsa.RSAPrivateKey) -> Path:
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, *form).decode()
    path.write_text(
        json.dumps(
            {
                "type": "service_account",
                "project_id": "grc",
                "private_key_id": "1",
                "private_key": pem,
                "client_email": "ops@grc.iam.test",
                "client_id": "1",
                "token_uri": token_uri,
            }
        )
    )
    return path


def test_a_service_account_s_key_is_exchanged_for_a_token_and_each_way_without_one_is_reported(
    google: FaultyServer[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, other = (rsa.generate_private_key(65537, 2048) for _ in range(2))
    Google.public, token_uri = key.public_key(), f"{google.url}/token"
    ai = AIProviders(vertex_project="grc", vertex_models=["gemini-2.5-pro"], timeout_seconds=30)
    with pytest.raises(OpsError, match="no default credentials, and there is no program gcloud"):
        find_vertex_token(ai)

    monkeypatch.setenv(ADC_FILE, str(account(tmp_path / "key.json", token_uri, key)))
    token = find_vertex_token(ai)
    assert token.get_secret_value() == TOKEN
    with providers() as server:
        asked = ai.model_copy(update={"vertex_endpoint": server.url})
        assert ask_vertex(asked, "gemini-2.5-pro", token).ok

    account(tmp_path / "key.json", token_uri, other)
    with pytest.raises(OpsError, match="Google refuses the credentials for Vertex AI: invalid_grant: Invalid JWT"):
        find_vertex_token(ai)
    account(tmp_path / "key.json", "http://127.0.0.1:9/token", key)
    with pytest.raises(OpsError, match="Google refuses the credentials for Vertex AI: .*onnection"):
        find_vertex_token(ai)
    for content in ("garbage", "{}"):
        (tmp_path / "key.json").write_text(content)
        with pytest.raises(OpsError, match="there is no access token for Vertex AI") as error:
            find_vertex_token(ai)
        assert ADC_FILE in error.value.hint


def test_the_metadata_server_of_the_host_gives_a_token(
    google: FaultyServer[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = google.url.removeprefix("http://")
    monkeypatch.setattr(_metadata, "_NO_GCE_CHECK", False)
    monkeypatch.setenv("GCE_METADATA_IP", address)
    monkeypatch.setattr(_metadata, "_GCE_METADATA_HOST", address)
    assert find_vertex_token(AIProviders(vertex_project="grc")).get_secret_value() == TOKEN
