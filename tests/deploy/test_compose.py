"""compose.yaml: read by Compose itself and by its schema, its commands by the services' own parsers."""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from services.gateway.objects import checked_url
from tests.deploy.commands import ROOT, check_stack, resolve

PROFILES = {
    "cpu": {"text-encoder-cpu", "fusion-cpu", "vae-cpu", "tiny-checkpoints"},
    "gpu": {"text-encoder", "fusion", "vae"},
    "gpus": {"text-encoder-gpus", "fusion-gpus", "vae-gpus"},
}
ALWAYS = {"gateway", "postgres", "prometheus", "grafana"}
SERVICES = re.compile(r"(gateway|text-encoder|fusion|vae)(-\w+)?")
_COMPOSE = Path(sys.executable).with_name("docker-compose")
SECRETS = {"POSTGRES_PASSWORD": "postgres-password", "GRAFANA_PASSWORD": "grafana-password"}


def compose_command() -> list[str]:
    """Compose as it is installed with the tests, or as docker has it; no engine is asked."""
    if _COMPOSE.is_file():
        return [str(_COMPOSE)]
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    pytest.skip("neither docker-compose nor docker's plugin is here; the schema's test runs all the same")


def config(
    *profiles: str, file: str | Path = ROOT / "compose.yaml", **environment: str
) -> subprocess.CompletedProcess[str]:
    """`docker compose config` with these profiles."""
    command = [*compose_command(), "--env-file", os.devnull, "--file", str(file)]
    command += [f"--profile={profile}" for profile in profiles]
    variables = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment}
    return subprocess.run(
        [*command, "config", "--format", "json"], capture_output=True, text=True, env=variables, timeout=60, check=False
    )


@pytest.fixture(scope="module", params=PROFILES)
def stack(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """A profile, and what Compose makes of the file with it."""
    done = config(request.param, **SECRETS)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower(), done.stderr
    return request.param, json.loads(done.stdout)


def test_the_file_is_what_the_specification_says() -> None:
    schemas = importlib.resources.files("check_jsonschema.builtin_schemas")
    schema = json.loads(schemas.joinpath("vendor", "compose-spec.json").read_text())
    content = yaml.safe_load((ROOT / "compose.yaml").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    assert [error.message for error in validator.iter_errors(content)] == []
    content["services"]["gateway"]["no_such_key"] = 1
    assert list(validator.iter_errors(content)), "the schema refuses what it does not know"


def test_a_profile_is_a_whole_stack(stack: tuple[str, dict[str, Any]]) -> None:
    profile, content = stack
    assert set(content["services"]) == ALWAYS | PROFILES[profile]


def test_without_passwords_nothing_starts() -> None:
    done = config("cpu")
    assert done.returncode != 0
    assert "POSTGRES_PASSWORD" in done.stderr and "make secrets" in done.stderr


def test_every_command_is_understood_and_the_services_find_each_other(
    stack: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    profile, content = stack
    options = {}
    for name, service in content["services"].items():
        if SERVICES.fullmatch(name):
            resolved, its_options = resolve(service["command"], monkeypatch, tmp_path)
            assert name.startswith(resolved.replace("_", "-"))
            options[resolved] = its_options
    check_stack(options)
    networks = {name: service.get("networks", {}) for name, service in content["services"].items()}
    for stage in ("text-encoder", "fusion", "vae"):
        (name,) = [name for name in PROFILES[profile] if name.startswith(stage)]
        assert stage in networks[name]["stages"]["aliases"], "the name under which the others know it"
        assert set(networks[name]) == {"stages"}
    assert content["networks"]["stages"]["internal"], "plain text goes where nobody else is"


def test_services_are_confined_and_reached_from_this_machine_alone(stack: tuple[str, dict[str, Any]]) -> None:
    _, content = stack
    for name, service in content["services"].items():
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", name
        if service["image"].startswith("ovi-serve"):
            assert service["read_only"] and service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name
            # Compose cannot put other secrets than files into a container whose file system is read-only.
            for secret in service.get("secrets", []):
                assert "file" in content["secrets"][secret["source"]], name
        else:
            assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+[\w.-]*", service["image"]), f"{name}: no pinned version"


def test_health_is_asked_for_where_the_service_listens(
    stack: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, content = stack
    for name, service in content["services"].items():
        if SERVICES.fullmatch(name):
            _, options = resolve(service["command"], monkeypatch, tmp_path)
            listen = getattr(options, "stage", options).listen
            assert service["healthcheck"]["test"] == ["CMD", "ovi", "health", f"127.0.0.1:{listen.port}"]
            grace = re.fullmatch(r"(\d+)m0s", service["stop_grace_period"])
            assert grace and int(grace[1]) * 60 > listen.grace_s, "a drain is not cut off"


def test_gpus_are_reserved_where_they_are_used() -> None:
    counts = {}
    for profile in PROFILES:
        content = json.loads(config(profile, **SECRETS).stdout)
        for name, service in content["services"].items():
            reserved = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
            if reserved:
                counts[name] = [device["count"] for device in reserved]
    one, every = [1], [-1]
    assert counts == {
        "text-encoder": one,
        "fusion": one,
        "vae": one,
        "text-encoder-gpus": one,
        "fusion-gpus": every,
        "vae-gpus": every,
    }


def test_a_file_puts_the_gateways_artifacts_into_a_bucket(tmp_path: Path) -> None:
    (tmp_path / "deploy" / "secrets").mkdir(parents=True)
    compose = shutil.copy(ROOT / "compose.yaml", tmp_path)
    without = json.loads(config("cpu", file=compose, **SECRETS).stdout)["services"]
    assert "OVI_ARTIFACTS_URL" not in without["gateway"]["environment"]
    example = shutil.copy(ROOT / "deploy" / "bucket.env.example", tmp_path / "deploy" / "secrets" / "bucket.env")
    services = json.loads(config("cpu", file=compose, **SECRETS).stdout)["services"]
    environment = services.pop("gateway")["environment"]
    assert checked_url(environment["OVI_ARTIFACTS_URL"]).startswith("s3://") and "AWS_REGION" in environment
    assert "OVI_DATABASE_URL" in environment, "the rest stays"
    assert not any("AWS" in name for service in services.values() for name in service.get("environment", {}))
    told = set(re.findall(r"^#?([A-Z_]+)=", Path(example).read_text(), re.MULTILINE))
    assert told <= set(re.findall(r"`([A-Z_]+)`", (ROOT / "docs" / "operations.md").read_text()))


def test_every_variable_is_explained() -> None:
    used = set(re.findall(r"\$\{(OVI_\w+)", (ROOT / "compose.yaml").read_text()))
    table = (ROOT / "docs" / "operations.md").read_text().partition("## Kubernetes")[0]
    assert used <= set(re.findall(r"`(OVI_\w+)`", table))


def test_passwords_are_made_once_and_are_closed_to_others(tmp_path: Path) -> None:
    script = tmp_path / "deploy" / "make_secrets.sh"
    script.parent.mkdir()
    shutil.copy(ROOT / "deploy" / "make_secrets.sh", script)
    subprocess.run([script], check=True, capture_output=True, timeout=30)
    made = {path: path.read_text() for path in (tmp_path / ".env", tmp_path / "deploy" / "secrets" / "admin_key")}
    lines = dict(line.split("=") for line in made[tmp_path / ".env"].splitlines())
    assert set(lines) == set(SECRETS) and all(re.fullmatch("[0-9a-f]{64}", value) for value in lines.values())
    assert len(set(lines.values())) == len(lines)
    assert (tmp_path / ".env").stat().st_mode & 0o077 == 0
    assert (tmp_path / "deploy" / "secrets").stat().st_mode & 0o077 == 0
    subprocess.run([script], check=True, capture_output=True, timeout=30)
    assert {path: path.read_text() for path in made} == made
