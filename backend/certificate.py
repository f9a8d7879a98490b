"""The server's certificate: from files, or made on the spot for tests and demonstrations."""

from __future__ import annotations

import ipaddress
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from aioquic.tls import load_pem_private_key, load_pem_x509_certificates
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

# Ours.
LIFETIME = timedelta(days=30)
CLOCK_SKEW = timedelta(hours=1)
NAME = "localhost"
ADDRESSES = ("127.0.0.1", "::1")


class Certificate(NamedTuple):
    """A certificate chain, the server's own certificate first, and its key."""

    chain: list[x509.Certificate]
    key: PrivateKeyTypes

    def pem(self) -> bytes:
        """The chain, without the key."""
        return b"".join(each.public_bytes(Encoding.PEM) for each in self.chain)


def load(cert: Path, key: Path) -> Certificate:
    """Read PEM files. Raises OSError, or ValueError with the file's name."""
    try:
        chain = load_pem_x509_certificates(cert.read_bytes())
    except ValueError:
        chain = []
    if not chain:
        raise ValueError(f"{cert}: no PEM certificate in it")
    try:
        private_key = load_pem_private_key(key.read_bytes())
    except (ValueError, TypeError):  # TypeError: it is encrypted
        raise ValueError(f"{key}: no PEM private key in it, or one with a password") from None
    if _spki(private_key.public_key()) != _spki(chain[0].public_key()):
        raise ValueError(f"{key}: not the key of the certificate in {cert}")
    return Certificate(chain, private_key)


def self_signed(now: datetime) -> Certificate:
    """A certificate for localhost, 127.0.0.1 and ::1, valid for 30 days. It and its key are in memory only."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    addresses = [x509.IPAddress(ipaddress.ip_address(each)) for each in ADDRESSES]
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME), *addresses]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    )
    return Certificate([builder.sign(key, SHA256())], key)


def _spki(public_key: object) -> bytes:
    octets: bytes = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]
    return octets
