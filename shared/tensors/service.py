"""TensorService: a store served on a port and threads of its own, so that bulk bytes never delay health or control."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from ovi.common.v1 import tensor_pb2 as pb
from ovi.common.v1 import tensor_pb2_grpc as pb_grpc
from shared.grpc_server import CONNECTION_OPTIONS, SyncErrorInterceptor
from shared.tensors.framing import chunks_of, safetensors_header, spec_to_proto
from shared.tensors.store import Lease, TensorStore
from shared.tls import PLAIN, Tls, add_secure_port

_THREADS = 8


class TensorServicer(pb_grpc.TensorServiceServicer):
    """Fetch, Release, Describe over a TensorStore."""

    def __init__(self, store: TensorStore) -> None:
        self._store = store

    def Fetch(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[pb.FetchResponse]:
        lease = self._store.get(request.tensor_id)
        header = pb.TensorHeader(spec=spec_to_proto(lease.spec), safetensors_header=safetensors_header(lease.spec))
        yield pb.FetchResponse(header=header)
        for chunk in chunks_of(lease.tensor):
            yield pb.FetchResponse(chunk=chunk)

    def Release(self, request: pb.ReleaseRequest, context: grpc.ServicerContext) -> pb.ReleaseResponse:
        return pb.ReleaseResponse(was_held=self._store.release(request.tensor_id))

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeResponse:
        lease = self._store.get(request.tensor_id)
        return pb.DescribeResponse(spec=spec_to_proto(lease.spec), lease_expire_time=_timestamp(lease.expire_time_s))


class TensorServer:
    """A running TensorService and the references it hands out."""

    def __init__(self, store: TensorStore, *, host: str, port: int, advertise_host: str, tls: Tls = PLAIN) -> None:
        """
        Args:
            store: what to serve.
            host: interface to listen on.
            port: TCP port; 0 picks a free one.
            advertise_host: name under which consumers reach this machine.
            tls: certificates of the port.

        Raises:
            RuntimeError: the port is taken.
        """
        self.store = store
        self._server = grpc.server(
            ThreadPoolExecutor(_THREADS, thread_name_prefix="tensors"),
            interceptors=[SyncErrorInterceptor()],
            options=CONNECTION_OPTIONS,
        )
        pb_grpc.add_TensorServiceServicer_to_server(TensorServicer(store), self._server)
        bound = add_secure_port(self._server, host, port, tls)
        self.address = f"{advertise_host}:{bound}"
        self._server.start()

    def publish(self, lease: Lease) -> pb.TensorRef:
        """The reference consumers use."""
        return pb.TensorRef(
            address=self.address,
            tensor_id=lease.tensor_id,
            spec=spec_to_proto(lease.spec),
            transports=[pb.TRANSPORT_GRPC_STREAM],
            lease_expire_time=_timestamp(lease.expire_time_s),
        )

    def stop(self, grace_s: float) -> None:
        """Stop serving; streams under way have `grace_s` seconds to end."""
        self._server.stop(grace_s).wait()


def _timestamp(seconds: float) -> Timestamp:
    return Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
