"""An authority of a test's own: a root, one in between, and what they sign. Dates are relative to now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
NOTHING = dict.fromkeys(
    (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "encipher_only",
        "decipher_only",
    ),
    False,
)
SIGNS = x509.KeyUsage(key_cert_sign=True, crl_sign=True, **NOTHING)


def new_key() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


@dataclass
class Issued:
    """A certificate with its key and those above it, without the root."""

    certificate: x509.Certificate
    key: Key
    above: tuple[x509.Certificate, ...] = ()

    @property
    def chain(self) -> bytes:
        return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in (self.certificate, *self.above))

    @property
    def key_pem(self) -> bytes:
        form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        return self.key.private_bytes(serialization.Encoding.PEM, *form)

    def write(self, directory: Path) -> Path:
        """As certbot keeps them."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "fullchain.pem").write_bytes(self.chain)
        (directory / "privkey.pem").write_bytes(self.key_pem)
        (directory / "privkey.pem").chmod(0o600)
        return directory


def sign(
    name: str,
    by: Issued | None,
    *,
    names: Sequence[str] = (),
    days: float = 90,
    life: float = 90,
    authority: bool = False,
    key: Key | None = None,
    staple: bool = False,
) -> Issued:
    """One that ends in `days`, of a life of so many; `by` nobody: it signs itself."""
    key, ends = key or new_key(), datetime.now(UTC) + timedelta(days=days)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by.certificate.subject if by else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(ends - timedelta(days=life), datetime.now(UTC) - timedelta(hours=1)))
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    above_key = (by.key if by else key).public_key()
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(above_key), critical=False)
    if authority:
        builder = builder.add_extension(SIGNS, critical=True)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(one) for one in names]), False)
    if staple:
        builder = builder.add_extension(x509.TLSFeature([x509.TLSFeatureType.status_request]), critical=False)
    signed = builder.sign(by.key if by else key, hashes.SHA256())
    above = (by.certificate, *by.above) if by and by.certificate.subject != by.certificate.issuer else ()
    return Issued(signed, key, above)


@dataclass
class Authority:
    """The root is what is trusted; the one in between signs."""

    root: Issued = field(default_factory=lambda: sign("root of the test", None, authority=True, life=999, days=900))
    between: Issued = field(init=False)

    def __post_init__(self) -> None:
        self.between = sign("between", self.root, authority=True, life=999, days=800)

    def issue(
        self, *names: str, days: float = 80, life: float = 90, key: Key | None = None, staple: bool = False
    ) -> Issued:
        return sign(names[0], self.between, names=names, days=days, life=life, key=key, staple=staple)
