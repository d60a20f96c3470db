"""The consumer's side: turns a TensorRef into a tensor over the cheapest transport both ends can do."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from typing import Protocol

import grpc
import torch

from ovi.common.v1 import tensor_pb2 as pb
from ovi.common.v1 import tensor_pb2_grpc as pb_grpc
from shared.errors import CorruptTensor, FieldViolation, InvalidRequest, ReferenceLost
from shared.grpc_client import error_of
from shared.tensors.framing import TensorAssembler, TensorSpec, check_safetensors_header, spec_from_proto
from shared.tls import PLAIN, Tls

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})


class TensorTransport(Protocol):
    """One way to move a tensor's bytes. Shared memory and CUDA IPC take their place beside the stream here."""

    kind: pb.Transport.ValueType

    def fetch(self, ref: pb.TensorRef, spec: TensorSpec, *, timeout_s: float) -> torch.Tensor:
        """A tensor of this process with the values behind `ref`."""
        ...


class Channels:
    """One gRPC channel a producer address, opened at first use and kept until certificates are renewed."""

    def __init__(self, tls: Tls = PLAIN) -> None:
        """
        Args:
            tls: how producers are connected to.
        """
        self._credentials = tls.channel_credentials()
        self._channels: dict[str, grpc.Channel] = {}
        self._lock = threading.Lock()

    def stub(self, address: str) -> pb_grpc.TensorServiceStub:
        """A TensorService client of this address."""
        with self._lock:
            if self._credentials is not None and self._credentials.look():
                self._channels.clear()  # Streams under way hold theirs.
            channel = self._channels.get(address)
            if channel is None:
                channel = self._channels[address] = self._open(address)
        return pb_grpc.TensorServiceStub(channel)

    def _open(self, address: str) -> grpc.Channel:
        if self._credentials is None:
            return grpc.insecure_channel(address)
        return grpc.secure_channel(address, self._credentials.current)

    def close(self) -> None:
        """Close every channel."""
        with self._lock:
            for channel in self._channels.values():
                channel.close()
            self._channels.clear()


class GrpcStreamTransport:
    """TensorService.Fetch: works everywhere."""

    kind: pb.Transport.ValueType = pb.TRANSPORT_GRPC_STREAM

    def __init__(self, channels: Channels) -> None:
        self._channels = channels

    def fetch(self, ref: pb.TensorRef, spec: TensorSpec, *, timeout_s: float) -> torch.Tensor:
        """Stream the tensor into memory allocated once.

        Raises:
            ReferenceLost: the producer is gone or no longer holds it.
            CorruptTensor: the stream is not what the reference announced.
        """
        call = self._channels.stub(ref.address).Fetch(pb.FetchRequest(tensor_id=ref.tensor_id), timeout=timeout_s)
        try:
            return _assemble(call, ref, spec)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                raise ReferenceLost(f"the producer {ref.address} of tensor {ref.tensor_id} cannot be reached") from None
            raise error_of(error) from None
        finally:
            call.cancel()


def _assemble(call: grpc.CallIterator[pb.FetchResponse], ref: pb.TensorRef, spec: TensorSpec) -> torch.Tensor:
    first = next(iter(call), None)
    if first is None or first.WhichOneof("part") != "header":
        raise CorruptTensor(f"tensor stream of {ref.tensor_id} does not begin with a header")
    if first.header.spec != ref.spec:
        announced, referred = (" ".join(str(spec).split()) for spec in (first.header.spec, ref.spec))
        raise CorruptTensor(f"tensor {ref.tensor_id} is announced as ({announced}), referred to as ({referred})")
    check_safetensors_header(first.header.safetensors_header, spec)
    assembler = TensorAssembler(spec)
    for message in call:
        if message.WhichOneof("part") != "chunk":
            raise CorruptTensor(f"tensor stream of {ref.tensor_id} has a second header")
        assembler.add(message.chunk)
    return assembler.finish()


def _transport_name(number: pb.Transport.ValueType) -> str:
    """Of a transport, or of a number that a later protocol may know."""
    return pb.Transport.Name(number) if number in pb.Transport.values() else str(number)


class TensorResolver:
    """Fetches references and gives their leases back."""

    def __init__(self, transports: Sequence[TensorTransport], channels: Channels, hosts: Collection[str]) -> None:
        """
        Args:
            transports: cheapest first.
            channels: shared with the stream transport.
            hosts: producers that may be contacted (`*.name`: every one below that name); a request must not make this
                process call anybody else.
        """
        self._transports = tuple(transports)
        self._channels = channels
        self._hosts = frozenset(hosts)
        self._domains = tuple(host[1:] for host in hosts if host.startswith("*."))

    @classmethod
    def over_grpc(cls, hosts: Collection[str] = LOOPBACK_HOSTS, tls: Tls = PLAIN) -> TensorResolver:
        """A resolver with the stream alone."""
        channels = Channels(tls)
        return cls([GrpcStreamTransport(channels)], channels, hosts)

    def fetch(self, ref: pb.TensorRef, *, field: str, max_bytes: int, timeout_s: float = 60.0) -> torch.Tensor:
        """The tensor behind `ref`, on the CPU. The lease stays; see `release`.

        Args:
            ref: from a request.
            field: its name in that request, for errors.
            max_bytes: most that this consumer takes.
            timeout_s: for the whole transfer.

        Raises:
            InvalidRequest: a malformed reference, or a producer that is not allowed.
            ReferenceLost: the producer no longer has it.
            CorruptTensor: what came is not what was announced.
        """
        self._check_address(ref, field)
        spec = spec_from_proto(ref.spec, field=f"{field}.spec", max_bytes=max_bytes)
        for transport in self._transports:
            if transport.kind in ref.transports:
                return transport.fetch(ref, spec, timeout_s=timeout_s)
        offered = [_transport_name(t) for t in ref.transports[:8]]
        known = [_transport_name(t.kind) for t in self._transports]
        raise InvalidRequest.of(f"{field}.transports", f"got {offered}, allowed is at least one of {known}")

    def release(self, ref: pb.TensorRef, *, timeout_s: float = 5.0) -> None:
        """Give the lease back. A producer that is gone has nothing to free, so that is no error."""
        try:
            request = pb.ReleaseRequest(tensor_id=ref.tensor_id)
            self._channels.stub(ref.address).Release(request, timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise error_of(error) from None

    def close(self) -> None:
        """Close the connections."""
        self._channels.close()

    def accepts(self, host: str) -> bool:
        """True if a producer on this host may be contacted."""
        return host in self._hosts or host.endswith(self._domains)

    def _check_address(self, ref: pb.TensorRef, field: str) -> None:
        host, _, port = ref.address.rpartition(":")
        violations = []
        if not self.accepts(host) or not port.isdecimal() or not 0 < int(port) < 65536:
            what = f"got {ref.address[:100]!r}, allowed is host:port of {sorted(self._hosts)} (see --producer-hosts)"
            violations.append(FieldViolation(f"{field}.address", what))
        if not 0 < len(ref.tensor_id) <= 64 or not ref.tensor_id.replace("-", "").replace("_", "").isalnum():
            what = "must be 1 to 64 characters of [A-Za-z0-9_-]"
            violations.append(FieldViolation(f"{field}.tensor_id", what))
        if violations:
            raise InvalidRequest(violations)
