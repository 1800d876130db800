"""An X.509 certificate and its properties (RFC 5280; key sizes: CA/Browser Forum's baseline requirements)."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa

LEAST_RSA_BITS = 2048
LEAST_CURVE_BITS = 256
WEAK_HASHES = ("md5", "sha1")
# The manual's 30 days are for a lifetime of 90: a certificate of 45 days is renewed at 15, like certbot does.
DUE, OVERDUE, URGENT = timedelta(days=30), timedelta(days=14), timedelta(days=7)
DUE_SHARE, OVERDUE_SHARE, URGENT_SHARE = 1 / 3, 1 / 6, 1 / 12


@dataclass(frozen=True)
class Certificate:
    """The properties of a certificate. `names`: of its SAN, in lower case; clients ignore the common name."""

    subject: str
    issuer: str
    names: tuple[str, ...]
    serial: int
    begins: datetime
    ends: datetime
    key: str
    weaknesses: tuple[str, ...]
    must_staple: bool
    is_authority: bool
    parsed: x509.Certificate = field(repr=False)

    @property
    def weak_signature(self) -> str:
        """A weak signature, such as “signed with SHA1”; "" for a strong one. Weak ones cannot be verified here."""
        return next((weak for weak in self.weaknesses if weak.startswith("signed")), "")

    @property
    def serial_text(self) -> str:
        """The serial number, as in `openssl x509 -serial`."""
        return f"{self.serial:X}"

    def left(self, now: datetime) -> timedelta:
        """The time until its expiry; negative afterwards."""
        return self.ends - now

    def within(self, limit: timedelta, share: float, now: datetime) -> bool:
        """Whether it expires within `limit`, or within that share of its lifetime if that is shorter."""
        return self.left(now) <= min(limit, (self.ends - self.begins) * share)

    def is_due(self, now: datetime) -> bool:
        """Whether its renewal is due."""
        return self.within(DUE, DUE_SHARE, now)

    def covers(self, name: str) -> bool:
        """Whether it is valid for `name`; a wildcard matches one label."""
        wanted = name.lower()
        return wanted in self.names or ("." in wanted and f"*.{wanted.split('.', 1)[1]}" in self.names)

    def signed_by(self, other: Certificate) -> bool:
        """Whether the other certificate's key signed it."""
        try:
            self.parsed.verify_directly_issued_by(other.parsed)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            return False
        return True


def read(parsed: x509.Certificate) -> Certificate:
    """Read all properties at once, so that a malformed certificate fails here.

    Raises:
        ValueError: an extension, a name or the key cannot be read.
    """
    try:
        extensions = {extension.oid: extension.value for extension in parsed.extensions}
        key, weak_key = _key(parsed)
        algorithm = parsed.signature_hash_algorithm
    except (UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise ValueError(str(error)) from None
    hashed = algorithm.name if algorithm else ""
    weak_hash = [f"signed with {hashed.upper()}"] if hashed in WEAK_HASHES and parsed.subject != parsed.issuer else []
    feature = extensions.get(x509.TLSFeature.oid)
    constraints = extensions.get(x509.BasicConstraints.oid)
    return Certificate(
        subject=_text(parsed.subject),
        issuer=_text(parsed.issuer),
        names=_names(extensions.get(x509.SubjectAlternativeName.oid)),
        serial=parsed.serial_number,
        begins=parsed.not_valid_before_utc,
        ends=parsed.not_valid_after_utc,
        key=key,
        weaknesses=(*weak_key, *weak_hash),
        must_staple=isinstance(feature, x509.TLSFeature) and x509.TLSFeatureType.status_request in feature,
        is_authority=isinstance(constraints, x509.BasicConstraints) and constraints.ca,
        parsed=parsed,
    )


def _text(name: x509.Name) -> str:
    return name.rfc4514_string() or "no name"


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, x509.SubjectAlternativeName):
        return ()
    addresses = (str(address) for address in value.get_values_for_type(x509.IPAddress))
    return (*(name.lower() for name in value.get_values_for_type(x509.DNSName)), *addresses)


def _key(parsed: x509.Certificate) -> tuple[str, list[str]]:
    """The type of the key, and its weaknesses."""
    match parsed.public_key():
        case rsa.RSAPublicKey() as key:
            weak = [f"RSA with {key.key_size} bits"] if key.key_size < LEAST_RSA_BITS else []
            return f"RSA {key.key_size}", weak
        case ec.EllipticCurvePublicKey() as curve:
            bits = curve.curve.key_size
            return f"EC {curve.curve.name}", [f"a curve of {bits} bits"] if bits < LEAST_CURVE_BITS else []
        case dsa.DSAPublicKey() as old:
            return f"DSA {old.key_size}", ["DSA"]
        case other:
            return type(other).__name__.removesuffix("PublicKey"), []
