"""deploy/k8s/components/mtls on the overlays: who shows which certificate to whom, and whether gRPC takes its names."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from shared.places import Name
from shared.tls import Tls, add_secure_port
from tests.certificates import Authority
from tests.deploy.commands import ROOT, check_stack, expand, resolve
from tests.deploy.test_kubernetes import K8S, OTHERS, Manifest, found, pods, render, validate

SERVICES = ("gateway", "text-encoder", "fusion", "vae")
CERT_MANAGER = {"Issuer", "Certificate"}
FILES = "/run/tls"


@pytest.fixture(scope="module", params=["gpu", "tiny"])
def manifests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    deploy = tmp_path_factory.mktemp("cluster") / "deploy"
    folder = shutil.copytree(K8S, deploy / "k8s")
    shutil.copytree(ROOT / "deploy" / "grafana", deploy / "grafana")
    file = folder / "overlays" / request.param / "kustomization.yaml"
    overlay = yaml.safe_load(file.read_text())
    overlay["components"] = ["../../components/mtls", *overlay.get("components", ())]
    file.write_text(yaml.safe_dump(overlay))
    return render(file.parent)


@pytest.fixture
def options(manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the services resolve their commands to, each with a certificate as its Secret will have it, by service."""
    authority, resolved = Authority(tmp_path, "authority"), {}
    for name, template in pods(manifests):
        if name == "postgres":
            continue
        folder = tmp_path / name
        folder.mkdir()
        wanted = found(manifests, "Certificate", name)["spec"]
        pair = authority.issue(*(wanted["dnsNames"] + wanted.get("ipAddresses", [])))
        for file, source in (("tls.crt", pair.cert), ("tls.key", pair.key), ("ca.crt", authority.file)):
            shutil.copy(source, folder / file)
        (container,) = template["spec"]["containers"]
        command = [expand(argument, {"POD_NAME": f"{name}-0"}) for argument in container["args"]]
        command = [argument.replace(f"={FILES}/", f"={folder}/") for argument in command]
        service, resolved_options = resolve(command, monkeypatch, tmp_path)
        resolved[service] = resolved_options
    return resolved


def certificates_of(options: dict[str, Any]) -> dict[str, Tls]:
    """Of each service, towards the others."""
    by_stage = {name: service.stage.listen.tls for name, service in options.items() if name != "gateway"}
    return by_stage | {"gateway": options["gateway"].security.stage_tls}


def test_everything_is_what_kubernetes_takes(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if manifest["kind"] in CERT_MANAGER:
            assert manifest["apiVersion"] == "cert-manager.io/v1" and manifest["metadata"]["namespace"] == "ovi"
        elif manifest["kind"] not in OTHERS:
            validate(manifest)


def test_every_service_asks_for_certificates_and_shows_one(options: dict[str, Any]) -> None:
    check_stack(options)
    sides = certificates_of(options)
    assert sides.keys() == {name.replace("-", "_") for name in SERVICES}
    for name, side in sides.items():
        assert side.serves and side.connects and side.client_ca == side.ca, name


def test_no_stage_may_fall_back_to_plain_text(manifests: list[Manifest]) -> None:
    for name in SERVICES:
        args = found(manifests, "StatefulSet", name)["spec"]["template"]["spec"]["containers"][0]["args"]
        assert ("--insecure" in args) == (name == "gateway"), "its ports for clients are the ingress's"


def test_certificates_are_for_the_names_that_others_connect_to(options: dict[str, Any]) -> None:
    """With gRPC's own rules for wildcards; a call of each name is made over mTLS."""
    gateway, sides = options["gateway"], certificates_of(options)
    names = {"gateway": [gateway.advertise_host]}
    for stage, places in gateway.stages.by_stage.items():
        called = [place.host for place in places.given if isinstance(place, Name)]
        assert called, "a name for all pods"
        names[stage] = [*called, options[stage].stage.advertise_host, "127.0.0.1"]
    for service, known_as in names.items():
        server = grpc.server(ThreadPoolExecutor(1))
        port = add_secure_port(server, "127.0.0.1", 0, sides[service])
        server.start()
        caller = sides["gateway" if service == "fusion" else "fusion"].channel_credentials().current
        for name, reached in [*((name, True) for name in known_as), ("vae.example.com", False)]:
            target = (("grpc.ssl_target_name_override", name),)
            with grpc.secure_channel(f"127.0.0.1:{port}", caller, target) as channel:
                ready = grpc.channel_ready_future(channel)
                if reached:
                    ready.result(20)
                else:
                    with pytest.raises(grpc.FutureTimeoutError):
                        ready.result(0.5)
        server.stop(0)


def test_pods_mount_what_is_issued_and_probe_with_it(manifests: list[Manifest]) -> None:
    for name in SERVICES:
        secret = found(manifests, "Certificate", name)["spec"]["secretName"]
        spec = found(manifests, "StatefulSet", name)["spec"]["template"]["spec"]
        (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "tls"]
        assert volume["secret"] == {"secretName": secret, "defaultMode": 0o440}
        (container,) = spec["containers"]
        assert {"name": "tls", "mountPath": FILES, "readOnly": True} in container["volumeMounts"]
        if name == "gateway":
            continue
        env = {variable["name"]: variable.get("value") for variable in container["env"]}
        expected = {"OVI_TLS_CA": "ca.crt", "OVI_TLS_CERT": "tls.crt", "OVI_TLS_KEY": "tls.key"}
        assert env == {"POD_NAME": None} | {key: f"{FILES}/{file}" for key, file in expected.items()}
        port = next(port["containerPort"] for port in container["ports"] if port["name"] == "grpc")
        for probe in (container["startupProbe"], container["readinessProbe"]):
            assert probe["exec"]["command"] == ["ovi", "health", f"127.0.0.1:{port}"]


def test_certificates_come_from_one_authority_that_is_the_stacks_own(manifests: list[Manifest]) -> None:
    authority = found(manifests, "Certificate", "authority")["spec"]
    assert authority["isCA"] and authority["issuerRef"] == {"kind": "Issuer", "name": "self-signed"}
    assert found(manifests, "Issuer", "self-signed")["spec"] == {"selfSigned": {}}
    assert found(manifests, "Issuer", "authority")["spec"] == {"ca": {"secretName": authority["secretName"]}}
    for name in SERVICES:
        spec = found(manifests, "Certificate", name)["spec"]
        assert spec["issuerRef"] == {"kind": "Issuer", "name": "authority"}
        assert {"server auth", "client auth"} <= set(spec["usages"])
