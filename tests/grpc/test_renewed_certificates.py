"""Certificate files that are replaced under a running gateway: what new connections to each of its ports see."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from ovi.gateway.v1 import gateway_pb2 as pb
from tests.certificates import Authority, Pair
from tests.grpc.gateway_client import GatewayUnderTest, running_gateway
from tests.service_process import free_port

CALL_S = 20.0
NAME = "127.0.0.1"
RENEWED = "renewed files are in use"
REFUSED = "renewed files cannot be used, the ones before stay in use"


def serial(cert: Path) -> int:
    return x509.load_pem_x509_certificate(cert.read_bytes()).serial_number


@dataclass
class Ports:
    """A gateway that shows, and asks for, certificates on three ports: gRPC, HTTP and data."""

    gateway: GatewayUnderTest
    authority: Authority
    files: Pair
    """Shown by all ports."""
    client_ca: Path
    """Asked about clients by all ports."""
    client: Pair
    numbers: tuple[int, int, int]

    def shown(self, context: ssl.SSLContext) -> set[int | None]:
        """Serial numbers of what new connections see that are answered; None: one was not answered."""
        return {self._shown(context, number) for number in self.numbers}

    def _shown(self, context: ssl.SSLContext, number: int) -> int | None:
        with socket.create_connection((NAME, number), timeout=CALL_S) as plain:
            try:
                with context.wrap_socket(plain, server_hostname=NAME) as connection:
                    seen = connection.getpeercert(binary_form=True)
                    connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
                    # HTTP/2 answers with its settings. A client whose certificate is refused hears of it here.
                    answered = connection.recv(1) != b""
            except (ssl.SSLError, ConnectionError):
                return None
        return x509.load_der_x509_certificate(seen).serial_number if answered else None

    def logged(self, event: str, count: int) -> list[dict[str, object]]:
        """What ports have said of their files, when it is so much."""
        service = self.gateway.service

        def said() -> list[dict[str, object]]:
            return [entry for entry in service.log if entry["event"] == event and entry["side"] == "listening"]

        with service.logged:
            service.logged.wait_for(lambda: len(said()) >= count, CALL_S)
            return said()


@pytest.fixture
def ports(tmp_path: Path) -> Iterator[Ports]:
    authority, client_ca, data_port = Authority(tmp_path, "first"), tmp_path / "clients.pem", free_port()
    files, client = authority.issue(NAME), authority.issue("client.example.com")
    client_ca.write_bytes(authority.file.read_bytes())
    flags = [f"--tls-cert={files.cert}", f"--tls-key={files.key}", f"--data-port={data_port}"]
    flags += [f"--tls-client-ca={client_ca}", f"--stage-tls-ca={client_ca}"]
    with running_gateway(tmp_path / "data", *flags, credentials=authority.credentials(client)) as gateway:
        grpc_port, http_port = (int(at.rpartition(":")[2]) for at in (gateway.service.address, gateway.http_url))
        yield Ports(gateway, authority, files, client_ca, client, (grpc_port, http_port, data_port))


def context_of(authority: Authority, client: Pair) -> ssl.SSLContext:
    context = authority.context(client)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


def test_new_connections_see_a_renewed_certificate_and_old_ones_go_on(ports):
    context = context_of(ports.authority, ports.client)
    before = serial(ports.files.cert)
    assert ports.shown(context) == {before}
    ports.authority.issue(NAME)
    after = serial(ports.files.cert)
    assert after != before and ports.shown(context) == {after}
    assert len(ports.logged(RENEWED, 3)) == 3
    assert not ports.gateway.jobs.ListJobs(pb.ListJobsRequest(), timeout=CALL_S).jobs, "a channel of the time before"
    credentials = ports.authority.credentials(ports.client)
    with grpc.secure_channel(ports.gateway.service.address, credentials) as channel:
        grpc.channel_ready_future(channel).result(CALL_S)


def test_damaged_files_change_nothing_until_they_are_whole(ports):
    context = context_of(ports.authority, ports.client)
    before, cert, key = serial(ports.files.cert), ports.files.cert, ports.files.key
    other = ports.authority.issue("localhost")
    damages = (
        (cert, cert.read_bytes()[:100], "holds no certificate"),
        (cert, other.cert.read_bytes(), "is not the unencrypted PEM key"),
        (key, b"", "is not the unencrypted PEM key"),
        (ports.client_ca, b"nothing", "holds no certificate"),
    )
    for count, (file, damaged, reason) in enumerate(damages, 1):
        whole = file.read_bytes()
        file.write_bytes(damaged)
        assert ports.shown(context) == ports.shown(context) == {before}
        reasons = [str(entry["reason"]) for entry in ports.logged(REFUSED, 3 * count)]
        assert len(reasons) == 3 * count, "told once a port, not with each connection"
        assert all(reason in said for said in reasons[-3:])
        file.write_bytes(whole)
    ports.authority.issue(NAME)
    assert ports.shown(context) == {serial(cert)} != {before}


def test_a_new_authority_is_asked_about_clients(ports, tmp_path: Path):
    second = Authority(tmp_path, "second")
    old, new = (context_of(ports.authority, pair) for pair in (ports.client, second.issue("client.example.com")))
    shown = {serial(ports.files.cert)}
    assert (ports.shown(old), ports.shown(new)) == (shown, {None})
    ports.client_ca.write_bytes(ports.authority.file.read_bytes() + second.file.read_bytes())
    assert (ports.shown(old), ports.shown(new)) == (shown, shown)
    ports.client_ca.write_bytes(second.file.read_bytes())
    assert (ports.shown(old), ports.shown(new)) == ({None}, shown)
