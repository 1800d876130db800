"""One request to an S3 server: tried again while the server is away or asks for patience, refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
)
from urllib3.exceptions import HTTPError

from blocks.s3 import Bucket
from runbook.errors import OpsError, Unreachable
from runbook.wait import until

T = TypeVar("T")

EVERY_SECONDS = 1.0  # between botocore's own series of attempts, which back off exponentially
PATIENCE = frozenset(
    {
        *("InternalError", "ServiceUnavailable", "SlowDown", "SlowDownRead", "SlowDownWrite", "RequestTimeout"),
        *("Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "OperationAborted"),
        *("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"),  # altered on the way
    }
)
PATIENCE_STATUS = (429, 500, 502, 503, 504)
SENTENCE = 200
NO_LOCK = "ObjectLockConfigurationNotFoundError"
CREDENTIALS = "correct the keys, the profile or the host's role of the environment's backup store"
HINTS = {
    "InvalidAccessKeyId": ("the access key is unknown", CREDENTIALS),
    "SignatureDoesNotMatch": ("the secret key is wrong", CREDENTIALS),
    "InvalidToken": ("the session token is wrong", CREDENTIALS),
    "ExpiredToken": ("the credentials have expired", "renew them, then run it again"),
    "AccessDenied": ("access is denied", "allow this in the policy; an object lock may also protect the object"),
    "403": ("access is denied", CREDENTIALS),
    "NoSuchBucket": ("the bucket does not exist", "create it, or correct the store's URL or endpoint"),
    "PermanentRedirect": ("the bucket is in another region", "correct the store's region"),
    "AuthorizationHeaderMalformed": ("the region is wrong", "correct the store's region"),
    "RequestTimeTooSkewed": ("this host's clock is wrong", "synchronise it (chronyc tracking, timedatectl)"),
    NO_LOCK: ("the bucket has no object lock", "create one with object lock, or leave lock_mode empty"),
    "NoSuchUpload": ("the upload was aborted meanwhile", "run it again"),
    "NotImplemented": ("the server cannot do that", "remove sse and lock_mode, or use another server"),
    "QuotaExceeded": ("the quota is used up", "free space there, or raise it"),
    "XMinioStorageFull": ("the server is full", "free space there"),
}


class RequestRefused(OpsError):
    """The server understood and said no; `code` is S3's name of the reason."""

    def __init__(self, message: str, hint: str, code: str) -> None:
        self.code = code
        super().__init__(message, hint)

    def __reduce__(self) -> tuple[type[RequestRefused], tuple[str, str, str]]:
        """Prefect stores what a run raised."""
        return RequestRefused, (self.message, self.hint, self.code)


def attempt(bucket: Bucket, what: str, call: Callable[[], T]) -> T:
    """What `call` returns. `what` says in an error what was being done ("listing", "part 3 of base.tar").

    Raises:
        Unreachable: the server did not answer, or only with errors of its own, for the bucket's `patience_seconds`.
        OpsError: it refused; the hint says what to correct.
    """

    def once() -> tuple[T]:
        try:
            return (call(),)
        except (ClientError, BotoCoreError, HTTPError, ConnectionError, TimeoutError) as error:
            raise _explained(bucket, what, error) from None

    hint = f"check that {bucket.endpoint or 'AWS'} answers, then run it again: it continues where it stopped"
    return until(
        once, what=f"{what} in {bucket.where}", seconds=bucket.patience_seconds, every_seconds=EVERY_SECONDS, hint=hint
    )[0]


def _explained(bucket: Bucket, what: str, error: Exception) -> OpsError:
    """The error as one sentence that names no secret; `Unreachable` where trying again may help."""
    if isinstance(error, ClientError):
        return _refused(bucket, what, error)
    where = f"{what} in {bucket.where}"
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return OpsError(f"{where}: there are no credentials", CREDENTIALS)
    if isinstance(error, SSLError):
        return OpsError(f"{where}: {_line(error)}", "correct the certificate, or the endpoint's scheme")
    if isinstance(error, EndpointConnectionError | ConnectTimeoutError):
        return Unreachable(f"no connection to {bucket.endpoint or 'AWS'}")
    if isinstance(error, HTTPClientError | IncompleteReadError | HTTPError | ConnectionError | TimeoutError):
        return Unreachable(_line(error))
    return OpsError(f"{where}: {_line(error)}", "correct the backup store in the environment")


def _refused(bucket: Bucket, what: str, error: ClientError) -> OpsError:
    code = str(error.response.get("Error", {}).get("Code", ""))  # for HEAD, which has no body, the HTTP status
    said = " ".join(str(error.response.get("Error", {}).get("Message", "")).split())[:SENTENCE]
    if code in PATIENCE or error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) in PATIENCE_STATUS:
        return Unreachable(f"{code} {said}".rstrip())
    if "ObjectLock" in said:  # "Bucket is missing ObjectLockConfiguration" comes as InvalidRequest
        code = NO_LOCK
    reason, hint = HINTS.get(code, (said, "correct the backup store in the environment"))
    return RequestRefused(f"{what} in {bucket.where}: {reason} ({code})", hint, code)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:SENTENCE] or type(error).__name__
