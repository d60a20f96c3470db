"""Transport security: which certificates a process shows and trusts, and what may listen without any.

TLS 1.2 and later, by gRPC's and Python's own defaults. Ports look at their files with every new connection, channels
with every call.
"""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography import x509

from shared.renewal import Renewal
from shared.renewing_channel import RenewingChannel

CERT_FLAG = "--tls-cert"
INSECURE_FLAG = "--insecure"
ChannelOptions = Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class Tls:
    """The certificate files of one side of a process, all PEM. With all of them None everything is plain text.

    Raises:
        ValueError: files that cannot be used, named by their flags.
    """

    cert: Path | None = None
    """Certificate (chain) that is shown to whoever connects, and to servers that ask for one."""
    key: Path | None = None
    """Its private key."""
    client_ca: Path | None = None
    """As a server: callers must show a certificate of this authority (mTLS). None: anybody may connect."""
    ca: Path | None = None
    """As a client: servers must show a certificate of this authority. None: connections are plain text."""
    public: bool = False
    """As a client: servers must show a certificate that the system's authorities vouch for."""
    prefix: str = "--tls"
    """How the flags of these files begin, for errors."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            given, missing = ("cert", "key") if self.key is None else ("key", "cert")
            raise ValueError(f"{self.prefix}-{given} needs {self.prefix}-{missing}; give both or neither")
        if self.client_ca is not None and self.cert is None:
            raise ValueError(f"{self.prefix}-client-ca needs {self.prefix}-cert and {self.prefix}-key")
        if self.cert is not None and self.key is not None:
            _check_pair(self.cert, self.key, self.prefix)
        for flag, path in (("client-ca", self.client_ca), ("ca", self.ca)):
            if path is not None:
                _certificates(path, f"{self.prefix}-{flag}")

    @property
    def serves(self) -> bool:
        """True if servers of this side speak TLS."""
        return self.cert is not None

    @property
    def connects(self) -> bool:
        """True if connections of this side speak TLS."""
        return self.ca is not None or self.public

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """For a gRPC port, whose new connections see renewed files; None: plain text."""
        if not self.serves:
            return None
        renewal = Renewal("listening", self._served_files(), self._server_configuration)

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            return renewal.current if renewal.look() else None

        asked = self.client_ca is not None
        return grpc.dynamic_ssl_server_credentials(renewal.current, renewed, require_client_authentication=asked)

    def server_context(self) -> ssl.SSLContext | None:
        """For any other port, whose new connections see renewed files; None: plain text."""
        if not self.serves:
            return None
        renewal = Renewal("listening", self._served_files(), self._server_context)

        def choose(connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
            renewal.look()
            connection.context = renewal.current

        listening = renewal.current
        # Called with every client's first message, also if it names no server.
        listening.sni_callback = choose
        return listening

    def _served_files(self) -> list[Path]:
        return [path for path in (self.cert, self.key, self.client_ca) if path is not None]

    def _server_configuration(self) -> grpc.ServerCertificateConfiguration:
        cert, key = self._checked_pair()
        ca = self.client_ca.read_bytes() if self.client_ca is not None else None
        return grpc.ssl_server_certificate_configuration([(key.read_bytes(), cert.read_bytes())], ca)

    def _server_context(self) -> ssl.SSLContext:
        cert, key = self._checked_pair()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key, password="")
        if self.client_ca is not None:
            context.load_verify_locations(self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
            # A session that is taken up again shows no certificate, so a new authority would not be asked about it.
            context.num_tickets = 0
            context.options |= ssl.OP_NO_TICKET
        return context

    def _checked_pair(self) -> tuple[Path, Path]:
        now = dataclasses.replace(self)
        assert now.cert is not None and now.key is not None
        return now.cert, now.key

    def channel_credentials(self) -> Renewal[grpc.ChannelCredentials] | None:
        """For gRPC channels, and renewed with their files; None: plain text."""
        if not self.connects:
            return None
        files = [path for path in (self.cert, self.key, self.ca) if path is not None]
        return Renewal("calling", files, self._channel_credentials)

    def _channel_credentials(self) -> grpc.ChannelCredentials:
        now = dataclasses.replace(self)
        ca, key, cert = (path and path.read_bytes() for path in (now.ca, now.key, now.cert))
        return grpc.ssl_channel_credentials(ca, key, cert)


PLAIN = Tls()


def add_secure_port(server: grpc.Server | grpc.aio.Server, host: str, port: int, tls: Tls) -> int:
    """Listen on host:port, with TLS where it has certificates; the port.

    Raises:
        RuntimeError: the port is taken.
    """
    bare = host.strip("[]")
    address = f"[{bare}]:{port}" if ":" in bare else f"{host}:{port}"
    credentials = tls.server_credentials()
    if credentials is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, credentials)


def open_channel(address: str, tls: Tls, options: ChannelOptions = (), *, authority: str = "") -> grpc.aio.Channel:
    """A channel to host:port, with TLS where an authority is named; calls after a renewal of its files use these.

    Args:
        address: host:port.
        tls: of this side.
        options: of the channel.
        authority: name that the server's certificate must be for; empty: the host.
    """
    if authority:
        options = [*options, ("grpc.default_authority", authority)]
    credentials = tls.channel_credentials()
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return RenewingChannel(credentials, lambda current: grpc.aio.secure_channel(address, current, options=options))


def is_loopback(host: str) -> bool:
    """True if only this machine reaches what listens there."""
    bare = host.strip("[]")
    if bare == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


def require_protection(flag: str, host: str, tls: Tls, *, insecure: bool) -> None:
    """Refuse to listen in plain text where other machines can reach it, unless that was asked for.

    Args:
        flag: that named the host, for the error.
        host: interface.
        tls: of what listens there.
        insecure: plain text was asked for.

    Raises:
        ValueError: says what to add.
    """
    if is_loopback(host) or tls.serves or insecure:
        return
    raise ValueError(
        f"{flag} {host}: other machines reach this, and without TLS they could read and change everything;"
        f" add {tls.prefix}-cert FILE and {tls.prefix}-key FILE, or {INSECURE_FLAG} for a network that you trust"
    )


def add_tls_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a service's own side."""
    add = parser.add_argument
    add("--tls-cert", type=Path, help="PEM certificate of this service; with --tls-key: listen with TLS")
    add("--tls-key", type=Path, help="its private key")
    add("--tls-client-ca", type=Path, help="PEM authority: callers must show a certificate of it (mTLS)")
    add(INSECURE_FLAG, action="store_true", help="listen in plain text beyond the loopback, if --host says so")


def common_name(cert: Path) -> str:
    """A DNS name or address that a certificate is for: what a client that trusts this very file may ask for.

    Raises:
        ValueError: it names none.
    """
    first = _certificates(cert, CERT_FLAG)[0]
    try:
        names = first.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise ValueError(f"{CERT_FLAG} {cert}: has no subject alternative name; make one for a host name") from None
    known: list[str] = [*names.get_values_for_type(x509.DNSName)]
    known += [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    if not known:
        raise ValueError(f"{CERT_FLAG} {cert}: is for no host name and no address")
    return known[0].replace("*", "any", 1)


def _certificates(path: Path, flag: str) -> list[x509.Certificate]:
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ValueError(f"{flag} {path}: holds no certificate in PEM form") from None
    now = datetime.now(UTC)
    if found[0].not_valid_after_utc < now:
        raise ValueError(f"{flag} {path}: its certificate ended on {found[0].not_valid_after_utc:%Y-%m-%d}; renew it")
    return found


def _check_pair(cert: Path, key: Path, prefix: str) -> None:
    _certificates(cert, f"{prefix}-cert")
    try:
        key.read_bytes()
        # An empty password, so that an encrypted key is refused rather than asked for on a terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except ssl.SSLError:
        raise ValueError(f"{prefix}-key {key}: is not the unencrypted PEM key of {prefix}-cert {cert}") from None
    except OSError as error:
        raise ValueError(f"{prefix}-key {key}: cannot be read ({error.strerror})") from None
