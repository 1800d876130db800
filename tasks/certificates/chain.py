"""The chain from a certificate to a trusted authority."""

from __future__ import annotations

import ssl
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from cryptography import x509

from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.certificates.certificate import Certificate, read


def parse_chain(content: bytes) -> tuple[Certificate, ...]:
    """The certificates of a PEM file, in its order.

    Raises:
        ValueError: it contains no certificate, or a damaged one.
    """
    return tuple(read(parsed) for parsed in x509.load_pem_x509_certificates(content))


@probe
def read_authorities(file: str) -> tuple[Certificate, ...]:
    """The system's authorities, as found by OpenSSL, and those of a file.

    Raises:
        OpsError: the file cannot be read, or no authority is trusted.
    """
    found = [*_system(), *(_named(Path(file)) if file else ())]
    if not found:
        hint = "run apt install ca-certificates, or set [certificates] authorities"
        raise OpsError("this host trusts no authority", hint)
    return tuple(found)


def _named(file: Path) -> tuple[Certificate, ...]:
    try:
        return parse_chain(file.read_bytes())
    except OSError as error:
        raise OpsError(f"{file}: {error.strerror}", "correct [certificates] authorities") from None
    except ValueError:
        raise OpsError(f"{file} contains no certificates", "set [certificates] authorities to a PEM file") from None


def _system() -> list[Certificate]:
    found = []
    for encoded in ssl.create_default_context().get_ca_certs(binary_form=True):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about old roots' serial numbers
                found.append(read(x509.load_der_x509_certificate(encoded)))
        except ValueError:  # an unreadable authority verifies nothing
            continue
    return found


def missing_link(chain: Sequence[Certificate], authorities: Sequence[Certificate], now: datetime) -> str:
    """Why the first certificate of `chain` is not trusted by `authorities`; "" if it is.

    Checks signatures, dates and the right to sign. OpenSSL checks the constraints of names and policies (served.py).
    """
    current, rest = chain[0], list(chain[1:])
    while True:
        above = [one for one in authorities if one == current or current.signed_by(one)]
        if not above and current.weak_signature:
            return f"{current.subject} is {current.weak_signature}, which clients no longer trust"
        if any(one.left(now).total_seconds() > 0 for one in above):
            return ""
        if above:
            return f"the authority {above[0].subject} has expired"
        signers = [one for one in rest if one.subject == current.issuer]
        signer = next((one for one in signers if current.signed_by(one)), None)
        if signer is None:
            return _end_of_chain(current, signers)
        if not signer.is_authority:
            return f"{signer.subject} signed {current.subject}, but may not sign certificates"
        if not signer.begins <= now < signer.ends:
            return f"{signer.subject}, which signed {current.subject}, is valid from {signer.begins} to {signer.ends}"
        rest.remove(signer)
        current = signer


def _end_of_chain(last: Certificate, others: Sequence[Certificate]) -> str:
    if last.subject == last.issuer:
        return f"{last.subject} is self-signed and not among the trusted authorities"
    if others:
        return f"{last.issuer} is in the chain with another key than the one that signed {last.subject}"
    return f"{last.issuer}, which signed {last.subject}, is neither in the chain nor among the trusted authorities"
