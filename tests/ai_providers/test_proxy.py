"""The proxy before the providers: what it passes on unchanged, and how it fails, over real HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import botocore.auth  # type: ignore[import-untyped]
import httpx
import pytest
from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
from botocore.credentials import Credentials  # type: ignore[import-untyped]
from pydantic import SecretStr, ValidationError

from blocks.ai_providers import AIProviders
from runbook.errors import OpsError
from tasks.ai.azure import ask_azure
from tasks.ai.bedrock import ask_bedrock
from tasks.ai.proxy import ProviderProxy
from tasks.ai.upstream import upstream_of
from tasks.ai.vertex import ask_vertex
from tests.fixtures.faulty import FaultyHandler, FaultyServer, serving
from tests.fixtures.providers import KEY, MODEL, SECRET, TOKEN, ProviderServer, providers
from tests.fixtures.servers import free_port


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def described(url: str) -> AIProviders:
    return AIProviders(
        azure_endpoint=url,
        azure_key=SecretStr(KEY),
        bedrock_region="ap-northeast-1",
        bedrock_access_key="ops",
        bedrock_secret_key=SecretStr(SECRET),
        bedrock_runtime_endpoint=url,
        vertex_project="grc",
        vertex_endpoint=url,
        proxy={name: f"127.0.0.1:{free_port()}" for name in ("azure", "bedrock", "vertex")},
        control=f"http://127.0.0.1:{free_port()}",
        timeout_seconds=60,
    )


def through(ai: AIProviders, **changed: Any) -> AIProviders:
    """The same, as the application describes it: the proxy's addresses are its base URLs."""
    at = {name: f"http://{address}" for name, address in ai.proxy.items()}
    return ai.model_copy(
        update={
            "azure_endpoint": at["azure"],
            "bedrock_runtime_endpoint": at["bedrock"],
            "vertex_endpoint": at["vertex"],
            **changed,
        }
    )


@pytest.fixture
def server() -> Iterator[ProviderServer]:
    with providers() as server:
        yield server


def control(ai: AIProviders, name: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{ai.control}/control/{name}", json=body, timeout=60)


def test_each_provider_s_protocol_passes_and_each_fault_is_of_one_provider_only(server: ProviderServer) -> None:
    ai = described(server.url)
    app = through(ai)

    def kinds(app: AIProviders = app) -> list[str]:
        answers = (
            ask_azure(app, "gpt-4o", "2024-10-21"),
            ask_bedrock(app, f"jp.{MODEL}"),
            ask_vertex(app, "gemini-2.5-pro", SecretStr(TOKEN)),
        )
        return [answer.kind for answer in answers]

    with ProviderProxy(ai) as proxy:
        assert kinds() == ["ok", "ok", "ok"]
        assert httpx.get(f"{ai.control}/health", timeout=60).json() == {
            "status": "healthy",
            "proxy": True,
            "providers": dict.fromkeys(ai.proxy, "ok"),
            "received": dict.fromkeys(ai.proxy, 1),
        }
        for fault, kind in {"500": "broken", "429": "throttled", "refused": "unreachable"}.items():
            assert control(ai, "azure", failing=True, fault=fault).status_code == 200
            assert kinds() == [kind, "ok", "ok"], fault
            assert proxy.state()["providers"] == {"azure": "failing", "bedrock": "ok", "vertex": "ok"}
        control(ai, "azure", failing=True, fault="timeout")
        assert kinds(through(ai, timeout_seconds=0.3)) == ["hangs", "ok", "ok"]
        control(ai, "azure", failing=True, fault="slow", delay_seconds=0.4)
        slow = ask_azure(app, "gpt-4o", "2024-10-21")
        assert (slow.kind, slow.seconds >= 0.4) == ("ok", True)
        control(ai, "azure", failing=False)
        assert kinds() == ["ok", "ok", "ok"]
        for bad in ({"failing": True, "fault": "explode"}, {"failing": "yes"}, {}):
            assert control(ai, "azure", **bad).status_code == 400
        assert control(ai, "openai", failing=True).status_code == 400
        with pytest.raises(OpsError, match="cannot listen on"), ProviderProxy(ai):
            pass
        assert kinds() == ["ok", "ok", "ok"], "a second proxy that does not start closes nothing of the first"
    with server.fault("azure", "429"), ProviderProxy(ai):
        assert kinds() == ["throttled", "ok", "ok"], "the provider's own refusal passes"
    with pytest.raises(OpsError, match="address of azure is not configured"):
        upstream_of(AIProviders(), "azure")
    for wrong, told in ({"proxy": {"azure": "9101"}}, "expected is host:port"), ({"proxy": ai.proxy}, "control is “”"):
        with pytest.raises(ValidationError, match=told):
            AIProviders(**wrong)


class _Recorder(FaultyHandler):
    """Keeps a request, and streams its answer in pieces without a length."""

    seen: ClassVar[list[tuple[str, dict[str, str], bytes]]] = []
    first = threading.Event()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.path, dict(self.headers.items()), body))
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-One: 1\r\nConnection: close\r\n\r\n")
        self.wfile.write(b"data: 1\n\n")
        self.first.wait(60)  # the rest only when the first piece has arrived
        self.wfile.write(b"data: 2\n\n")
        self.close_connection = True


def test_bedrock_s_requests_are_signed_for_the_provider_and_streams_pass_piece_by_piece() -> None:
    with serving(FaultyServer[str](_Recorder)) as upstream:
        ai = described(upstream.url)
        with ProviderProxy(ai):
            path, body = f"/model/jp.{MODEL.replace(':', '%3A')}/converse", b'{"messages": []}'
            old = {"Authorization": "AWS4-HMAC-SHA256 Credential=app/", "X-Amz-Date": "20200101T000000Z"}
            with httpx.stream("POST", f"http://{ai.proxy['bedrock']}{path}", content=body, headers=old) as answer:
                pieces = answer.iter_raw()
                assert next(pieces) == b"data: 1\n\n"
                _Recorder.first.set()
                assert b"".join(pieces) == b"data: 2\n\n"
                assert answer.headers["X-One"] == "1"
    [(seen_path, headers, seen_body)] = _Recorder.seen
    assert (seen_path, seen_body) == (path, body)
    assert headers["Host"] == upstream.url.removeprefix("http://")
    request = AWSRequest("POST", upstream.url + path, data=body)
    request.headers["Host"] = headers["Host"]
    request.headers["Accept"] = headers["Accept"]
    request.context["timestamp"] = headers["X-Amz-Date"]
    auth = botocore.auth.SigV4Auth(Credentials("ops", SECRET), "bedrock", "ap-northeast-1")
    request.headers["X-Amz-Date"] = headers["X-Amz-Date"]
    wanted = auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)
    assert headers["Authorization"].endswith(f"Signature={wanted}"), headers["Authorization"]
    assert time.strptime(headers["X-Amz-Date"], "%Y%m%dT%H%M%SZ").tm_year > 2020
