"""From a certificate to an authority that is trusted: which link is missing, and who is trusted."""

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
        ValueError: it holds none, or one that is damaged.
    """
    return tuple(read(parsed) for parsed in x509.load_pem_x509_certificates(content))


@probe
def read_authorities(file: str) -> tuple[Certificate, ...]:
    """The system's authorities, as OpenSSL finds them, and those of a file.

    Raises:
        OpsError: the file cannot be read, or nobody is trusted.
    """
    found = [*_system(), *(_named(Path(file)) if file else ())]
    if not found:
        hint = "apt install ca-certificates, or name [certificates] authorities"
        raise OpsError("this host trusts no authority", hint)
    return tuple(found)


def _named(file: Path) -> tuple[Certificate, ...]:
    try:
        return parse_chain(file.read_bytes())
    except OSError as error:
        raise OpsError(f"{file}: {error.strerror}", "correct [certificates] authorities") from None
    except ValueError:
        raise OpsError(f"{file} holds no certificates", "name a PEM file in [certificates] authorities") from None


def _system() -> list[Certificate]:
    found = []
    for encoded in ssl.create_default_context().get_ca_certs(binary_form=True):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old roots' serial numbers
                found.append(read(x509.load_der_x509_certificate(encoded)))
        except ValueError:  # one that nobody can read signs nothing
            continue
    return found


def missing_link(chain: Sequence[Certificate], authorities: Sequence[Certificate], now: datetime) -> str:
    """Why nobody who trusts `authorities` believes the first of `chain`; "" where they do.

    Signatures, dates and who may sign are looked at; constraints of names and policies are OpenSSL's (served.py).
    """
    current, rest = chain[0], list(chain[1:])
    while True:
        above = [one for one in authorities if one == current or current.signed_by(one)]
        if not above and current.weak_signature:
            return f"{current.subject} is {current.weak_signature}, which nobody believes any more"
        if any(one.left(now).total_seconds() > 0 for one in above):
            return ""
        if above:
            return f"the authority {above[0].subject} has expired"
        signers = [one for one in rest if one.subject == current.issuer]
        signer = next((one for one in signers if current.signed_by(one)), None)
        if signer is None:
            return _end_of_chain(current, signers)
        if not signer.is_authority:
            return f"{signer.subject} may not sign certificates, and signed {current.subject}"
        if not signer.begins <= now < signer.ends:
            return f"{signer.subject}, which signed {current.subject}, is valid from {signer.begins} to {signer.ends}"
        rest.remove(signer)
        current = signer


def _end_of_chain(last: Certificate, others: Sequence[Certificate]) -> str:
    if last.subject == last.issuer:
        return f"{last.subject} signed itself, and is not among the authorities"
    if others:
        return f"{last.issuer} is in the chain with another key than the one that signed {last.subject}"
    return f"{last.issuer}, which signed {last.subject}, is neither in the chain nor among the authorities"
