"""Certificates of one's own for 127.0.0.1, and TLS before a server that has none."""

import asyncio
import datetime as dt
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


class Authority:
    """A certificate authority that has issued one certificate; its own is in the file `ca`."""

    def __init__(self, directory: Path, name: str) -> None:
        issuer, subject = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (name, "127.0.0.1"))
        signer, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign"), False
        ) | {"encipher_only": False, "decipher_only": False}
        own = (
            _builder(issuer, issuer, signer.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=True, **usage), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(signer.public_key()), critical=False)
        )
        issued = (
            _builder(subject, issuer, key.public_key())
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        )
        self.ca, both = directory / f"{name}.pem", directory / f"{name}-server.pem"
        self.ca.write_bytes(own.sign(signer, SHA256()).public_bytes(Encoding.PEM))
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        both.write_bytes(private + issued.sign(signer, SHA256()).public_bytes(Encoding.PEM))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(both)

    @asynccontextmanager
    async def before(self, port: int) -> AsyncIterator[int]:
        """Speak TLS on a port of its own, and pass on what comes to `port`."""
        lines: set[asyncio.Task[None]] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            lines.add(task)
            back, forth = await asyncio.open_connection("127.0.0.1", port)
            try:
                await asyncio.gather(_copy(reader, forth), _copy(back, writer))
            except (OSError, asyncio.CancelledError):
                pass  # either side has gone, or the test is over
            finally:
                lines.discard(task)
                forth.transport.abort()
                writer.transport.abort()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=self._context)
        try:
            yield int(server.sockets[0].getsockname()[1])
        finally:
            server.close()
            for task in lines:
                task.cancel()
            await asyncio.gather(*lines, return_exceptions=True)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.not_valid_before(now - dt.timedelta(days=1)).serial_number(x509.random_serial_number())
    return builder.not_valid_after(now + dt.timedelta(days=1))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
    raise ConnectionResetError  # one side has ended: so has the other
