"""deploy/k8s: rendered by kustomize, checked against Kubernetes' schemas, its commands by the services' own parsers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.commands import ROOT, check_stack, expand, resolve

K8S = ROOT / "deploy" / "k8s"
OVERLAYS = ("tiny", "gpu", "multi-host")
VERSION = "1.34"
"""Of the schemas; later versions of Kubernetes take the same."""
OTHERS = {"LeaderWorkerSet", "ServiceMonitor", "PrometheusRule"}
"""Kinds that controllers bring, for which there is no schema; of a LeaderWorkerSet the pods are checked."""
LEADER = {"POD_NAME": "fusion-hosts-0", "LWS_LEADER_ADDRESS": "fusion-hosts-0.fusion-hosts.ovi"}
Manifest = dict[str, Any]


def render(folder: Path) -> list[Manifest]:
    """What `kubectl kustomize` makes of a folder; no cluster is asked."""
    own = Path(sys.executable).with_name("kubectl")
    kubectl = str(own) if own.is_file() else shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not here")
    command = [kubectl, "kustomize", "--load-restrictor", "LoadRestrictionsNone", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return render(K8S / "overlays" / request.param)


def found(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (manifest,) = [m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name]
    return manifest


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Every pod's template, as a template of a StatefulSet has it, by name."""
    for manifest in manifests:
        if manifest["kind"] == "StatefulSet":
            yield manifest["metadata"]["name"], manifest["spec"]["template"]
        elif manifest["kind"] == "LeaderWorkerSet":
            group = manifest["spec"]["leaderWorkerTemplate"]
            yield "fusion", group["leaderTemplate"]
            yield "fusion worker", group["workerTemplate"]


def validate(manifest: Manifest) -> None:
    kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_everything_is_what_kubernetes_takes(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if manifest["kind"] not in OTHERS:
            validate(manifest)
            assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "ovi"
    for name, template in pods(manifests):
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": template["spec"]})


def test_the_schema_refuses_what_it_does_not_know(manifests: list[Manifest]) -> None:
    wrong = found(manifests, "StatefulSet", "gateway") | {"spec": {"replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(wrong)


def test_every_command_is_understood_and_the_services_find_each_other(
    manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {}
    for name, template in pods(manifests):
        if name in ("postgres", "fusion worker"):
            continue
        (container,) = template["spec"]["containers"]
        values = {"POD_NAME": f"{name}-0", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "0"}
        if "torch.distributed.run" in container["args"]:
            values |= LEADER
        command = [expand(argument, values) for argument in container["args"]]
        resolved, options[name.replace("-", "_")] = resolve(command, monkeypatch, tmp_path)
        assert resolved == name.replace("-", "_")
        listen = getattr(options[resolved], "stage", options[resolved]).listen
        assert container["startupProbe"]["grpc"]["port"] == container["readinessProbe"]["grpc"]["port"] == listen.port
        assert template["spec"]["terminationGracePeriodSeconds"] > listen.grace_s
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["grpc"] == listen.port
        data_port = options[resolved].data_port if resolved == "gateway" else options[resolved].stage.data_port
        assert ports["data"] == data_port
    check_stack(options)


def test_ranks_of_a_group_differ_in_nothing_but_their_place() -> None:
    group = dict(pods(render(K8S / "overlays" / "multi-host")))
    leader, worker = (group[name]["spec"]["containers"][0] for name in ("fusion", "fusion worker"))
    assert leader["args"] == worker["args"]
    assert "readinessProbe" not in worker, "rank 0 alone serves"


def test_services_select_pods_and_name_their_ports(manifests: list[Manifest]) -> None:
    templates = dict(pods(manifests))
    for service in (m for m in manifests if m["kind"] == "Service"):
        selector = service["spec"]["selector"].items()
        chosen = [t for t in templates.values() if selector <= t["metadata"]["labels"].items()]
        assert len(chosen) == 1, service["metadata"]["name"]
        ports = {port["name"] for port in chosen[0]["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for stateful in (m for m in manifests if m["kind"] == "StatefulSet"):
        service = found(manifests, "Service", stateful["spec"]["serviceName"])
        assert service["spec"]["clusterIP"] == "None", "its pods have names"


def test_pods_keep_to_the_restricted_standard(manifests: list[Manifest]) -> None:
    """What the namespace enforces."""
    namespace = found(manifests, "Namespace", "ovi")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, template in pods(manifests):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert not container["image"].endswith("latest") and ":" in container["image"], name


def test_every_pod_is_behind_a_policy_and_stages_are_for_the_gateway_alone(manifests: list[Manifest]) -> None:
    policies = {m["metadata"]["name"]: m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"}
    assert policies["nothing"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    stages = policies["stages"]
    selected = stages["podSelector"]["matchLabels"].items()
    for name, template in pods(manifests):
        is_stage = selected <= template["metadata"]["labels"].items()
        assert is_stage == (name not in ("gateway", "postgres")), name
        part_of = template["metadata"]["labels"].get("app.kubernetes.io/part-of")
        assert part_of == ("ovi" if name != "postgres" else None), "stages may fetch from it"
    (control, data) = stages["ingress"]
    assert control["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "gateway"}}}]
    assert data["ports"] == [{"port": "data"}]


def test_workers_come_with_the_queue_and_the_gateway_knows_them_all() -> None:
    manifests = render(K8S / "overlays" / "gpu")
    scaler = found(manifests, "HorizontalPodAutoscaler", "fusion")["spec"]
    fusion = found(manifests, "StatefulSet", scaler["scaleTargetRef"]["name"])
    assert "replicas" not in fusion["spec"], "they would be set back with every change"
    assert scaler["metrics"][0]["external"]["metric"]["name"] == "ovi_queue_length"
    args = found(manifests, "StatefulSet", "gateway")["spec"]["template"]["spec"]["containers"][0]["args"]
    (workers,) = [argument for argument in args if argument.startswith("--fusion=")]
    service = found(manifests, "Service", fusion["spec"]["serviceName"])
    assert service["spec"]["clusterIP"] == "None", "its name has an address for each pod"
    port = next(port["port"] for port in service["spec"]["ports"] if port["name"] == "grpc")
    assert workers == f"--fusion=dns:///{service['metadata']['name']}:{port}"
    assert not any(argument.startswith("--max-concurrent-jobs") for argument in args), "they follow the workers"


def test_every_claim_secret_and_volume_is_there(manifests: list[Manifest]) -> None:
    claims = {m["metadata"]["name"] for m in manifests if m["kind"] == "PersistentVolumeClaim"}
    for name, template in pods(manifests):
        volumes = {volume["name"]: volume for volume in template["spec"].get("volumes", [])}
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim")
            assert claim is None or claim["claimName"] in claims
        for container in [*template["spec"]["containers"], *template["spec"].get("initContainers", [])]:
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted <= volumes.keys() or name == "postgres"


def test_with_a_bucket_gateways_share_no_volume(tmp_path: Path) -> None:
    folder = shutil.copytree(K8S, tmp_path / "deploy" / "k8s")
    shutil.copytree(ROOT / "deploy" / "grafana", tmp_path / "deploy" / "grafana")
    kustomization = folder / "overlays" / "gpu" / "kustomization.yaml"
    with_bucket = kustomization.read_text().replace("components:", "components:\n  - ../../components/bucket")
    kustomization.write_text(with_bucket)
    manifests = render(folder / "overlays" / "gpu")
    gateway = found(manifests, "StatefulSet", "gateway")
    validate(gateway)
    spec = gateway["spec"]["template"]["spec"]
    assert spec["containers"][0]["envFrom"] == [{"secretRef": {"name": "ovi-artifacts"}}]
    assert not any("persistentVolumeClaim" in volume for volume in spec["volumes"])
    claims = {m["metadata"]["name"] for m in manifests if m["kind"] == "PersistentVolumeClaim"}
    assert claims == {"checkpoints"}
    mounted = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}


def test_an_image_of_ones_own_is_put_everywhere(tmp_path: Path) -> None:
    folder = shutil.copytree(K8S, tmp_path / "deploy" / "k8s")
    shutil.copytree(ROOT / "deploy" / "grafana", tmp_path / "deploy" / "grafana")
    for overlay in OVERLAYS:
        with (folder / "overlays" / overlay / "kustomization.yaml").open("a") as file:
            file.write('images: [{name: ovi-serve, newName: registry.example.com/ovi, newTag: "7"}]\n')
        for name, template in pods(render(folder / "overlays" / overlay)):
            for container in [*template["spec"]["containers"], *template["spec"].get("initContainers", [])]:
                assert container["image"] == "registry.example.com/ovi:7" or name == "postgres", (overlay, name)


def test_alerts_are_those_of_the_containers() -> None:
    rule = found(render(K8S / "overlays" / "gpu"), "PrometheusRule", "ovi")
    assert rule["spec"] == yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text())
