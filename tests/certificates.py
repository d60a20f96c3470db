"""Certificates made for a test, as files."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
import trustme


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    cert: Path
    key: Path


class Authority:
    """Issues certificates."""

    def __init__(self, folder: Path, name: str) -> None:
        self._authority = trustme.CA(organization_name=name)
        self._folder = folder / name
        self._folder.mkdir()
        self.file = self._folder / "ca.pem"
        self._authority.cert_pem.write_to_path(self.file)

    def issue(self, *names: str) -> Pair:
        """A pair for host names and addresses."""
        issued = self._authority.issue_cert(*names)
        pair = Pair(self._folder / f"{names[0]}.pem", self._folder / f"{names[0]}.key")
        pair.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(pair.key)
        return pair

    def credentials(self, own: Pair | None = None) -> grpc.ChannelCredentials:
        """For gRPC clients that trust this authority, and show a certificate of their own."""
        key, cert = (own.key.read_bytes(), own.cert.read_bytes()) if own else (None, None)
        return grpc.ssl_channel_credentials(self.file.read_bytes(), key, cert)

    def context(self, own: Pair | None = None) -> ssl.SSLContext:
        """For HTTPS clients, likewise."""
        context = ssl.create_default_context(cafile=self.file)
        if own is not None:
            context.load_cert_chain(own.cert, own.key)
        return context
