"""Services that speak TLS among themselves and with clients, as real processes with certificates made here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ovi.common.v1 import tensor_pb2, tensor_pb2_grpc
from ovi.gateway.v1 import gateway_pb2 as pb
from ovi.text_encoder.v1 import text_encoder_pb2, text_encoder_pb2_grpc
from tests.certificates import Authority, Pair
from tests.grpc.gateway_client import GatewayUnderTest, running_gateway
from tests.service_process import running_service

CALL_S = 20.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("inner"), "inner")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Nobody trusts this one."""
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger")


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Of what clients see."""
    return Authority(tmp_path_factory.mktemp("public"), "public")


@pytest.fixture(scope="module")
def service_pair(authority) -> Pair:
    return authority.issue("127.0.0.1", "localhost")


@pytest.fixture(scope="module")
def stack(authority, public, service_pair, tiny_checkpoint, tmp_path_factory) -> Iterator[GatewayUnderTest]:
    """The three real stages and a gateway: mTLS between them, TLS towards clients."""
    inner = authority.credentials(service_pair)
    own = ("--tls-cert", str(service_pair.cert), "--tls-key", str(service_pair.key))
    mutual = (*own, "--tls-client-ca", str(authority.file), "--tls-ca", str(authority.file))
    with contextlib.ExitStack() as running:
        flags = ["--checkpoints", str(tiny_checkpoint), "--device", "cpu", *mutual]
        names = ("text_encoder", "fusion", "vae")
        starting = [running_service(name, *flags, credentials=inner) for name in names]
        with ThreadPoolExecutor(len(names)) as threads:
            stages = dict(zip(names, threads.map(running.enter_context, starting), strict=True))
        shown = public.issue("127.0.0.1")
        addresses = [flag for name, stage in stages.items() for flag in (f"--{name.replace('_', '-')}", stage.address)]
        gateway = running_gateway(
            tmp_path_factory.mktemp("gateway") / "data",
            *addresses,
            *("--tls-cert", str(shown.cert), "--tls-key", str(shown.key)),
            *("--stage-tls-ca", str(authority.file)),
            *("--stage-tls-cert", str(service_pair.cert), "--stage-tls-key", str(service_pair.key)),
            credentials=public.credentials(),
        )
        under_test = running.enter_context(gateway)
        under_test.text_encoder = stages["text_encoder"].address
        under_test.logs = [under_test.service.log, *(stage.log for stage in stages.values())]
        yield under_test


def refused(channel: grpc.Channel) -> bool:
    """True if the other end does not even hear of a call."""
    with channel, pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=CALL_S)
    return caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_clip_is_made_over_mtls(stack, public):
    """Control and data ports, both ways: prompts to fusion, latents to the gateway, and from there to the VAE."""
    job = stack.end_of(stack.create(steps=2, prompt="zeppelins").id)
    assert job.state == pb.JOB_STATE_COMPLETED, job.error
    clip = stack.download(job.id)
    assert clip[4:8] == b"ftyp"
    with httpx.Client(verify=public.context(), base_url=stack.http_url) as client:
        assert client.get("/readyz").json()["status"] == "ready"
        assert client.get(job.video.url_path).content == clip
    assert all(log for log in stack.logs) and "zeppelins" not in str(stack.logs), "no stage logs a prompt"


def test_nobody_connects_to_a_stage_without_a_certificate(stack, authority, stranger, service_pair):
    address = stack.text_encoder
    assert refused(grpc.insecure_channel(address)), "plain text"
    assert refused(grpc.secure_channel(address, authority.credentials())), "no certificate"
    foreign = stranger.issue("127.0.0.1")
    assert refused(grpc.secure_channel(address, authority.credentials(foreign))), "another authority's certificate"
    assert refused(grpc.secure_channel(address, stranger.credentials(service_pair))), "a server we do not trust"
    with grpc.secure_channel(address, authority.credentials(service_pair)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert (
            stub.Check(health_pb2.HealthCheckRequest(), timeout=CALL_S).status == health_pb2.HealthCheckResponse.SERVING
        )


def test_nobody_fetches_tensors_without_a_certificate(stack, authority, service_pair):
    with grpc.secure_channel(stack.text_encoder, authority.credentials(service_pair)) as channel:
        stub = text_encoder_pb2_grpc.TextEncoderServiceStub(channel)
        answer = stub.Encode(text_encoder_pb2.EncodeRequest(prompts=["a bell"], prompt_format=1), timeout=CALL_S)
        ref = answer.embeddings[0].tensor
    request = tensor_pb2.DescribeRequest(tensor_id=ref.tensor_id)

    def code(channel: grpc.Channel) -> grpc.StatusCode:
        with channel, pytest.raises(grpc.RpcError) as caught:
            tensor_pb2_grpc.TensorServiceStub(channel).Describe(request, timeout=CALL_S)
        return caught.value.code()

    assert code(grpc.insecure_channel(ref.address)) is grpc.StatusCode.UNAVAILABLE
    assert code(grpc.secure_channel(ref.address, authority.credentials())) is grpc.StatusCode.UNAVAILABLE
    with grpc.secure_channel(ref.address, authority.credentials(service_pair)) as channel:
        held = tensor_pb2_grpc.TensorServiceStub(channel).Describe(request, timeout=CALL_S)
    assert held.spec == ref.spec


def test_clients_see_tls_on_both_of_the_gateways_ports(stack, stranger):
    assert refused(grpc.insecure_channel(stack.service.address))
    assert refused(grpc.secure_channel(stack.service.address, stranger.credentials()))
    with pytest.raises(httpx.HTTPError), httpx.Client(base_url=stack.http_url.replace("https", "http")) as client:
        client.get("/healthz")
    with pytest.raises(httpx.ConnectError), httpx.Client(verify=stranger.context(), base_url=stack.http_url) as client:
        client.get("/healthz")


def test_the_gateway_can_ask_clients_for_certificates(public, stranger, tmp_path: Path):
    shown, client_pair = public.issue("127.0.0.1"), public.issue("client.example.com")
    flags = ("--tls-cert", str(shown.cert), "--tls-key", str(shown.key), "--tls-client-ca", str(public.file))
    with running_gateway(tmp_path / "data", *flags, credentials=public.credentials(client_pair)) as gateway:
        assert list(gateway.jobs.ListJobs(pb.ListJobsRequest(), timeout=CALL_S).jobs) == []
        assert refused(grpc.secure_channel(gateway.service.address, public.credentials()))
        foreign = stranger.issue("client.example.com")
        for context in (public.context(), public.context(foreign)):
            with pytest.raises(httpx.HTTPError), httpx.Client(verify=context, base_url=gateway.http_url) as client:
                client.get("/healthz")
        with httpx.Client(verify=public.context(client_pair), base_url=gateway.http_url) as client:
            assert client.get("/healthz").status_code == 200
