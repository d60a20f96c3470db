"""Certificate files, and what may listen without any."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.gateway.auth.options import security_options
from shared.service_main import stage_options, stage_parser
from shared.tls import PLAIN, Tls, common_name, is_loopback, require_protection
from tests.certificates import Authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"), "right")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "::1", "[::1]"])
def test_the_loopback_needs_no_protection(host):
    assert is_loopback(host)
    require_protection("--host", host, PLAIN, insecure=False)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "[::]", "10.0.0.7", "192.168.1.4", "gpu-7", "localhost.example.com", ""]
)
def test_anything_else_needs_tls_or_the_word_insecure(host, authority):
    assert not is_loopback(host)
    with pytest.raises(ValueError, match=r"--host .*add --tls-cert FILE and --tls-key FILE, or --insecure"):
        require_protection("--host", host, PLAIN, insecure=False)
    require_protection("--host", host, PLAIN, insecure=True)
    pair = authority.issue("localhost")
    require_protection("--host", host, Tls(pair.cert, pair.key), insecure=False)


def test_files_that_do_not_fit_are_refused_by_their_flags(authority, tmp_path):
    pair, other = authority.issue("localhost"), authority.issue("127.0.0.1")
    text = tmp_path / "notes.txt"
    text.write_text("no certificate")
    missing = tmp_path / "missing.pem"
    for arguments, expected in (
        ({"cert": pair.cert}, "--tls-cert needs --tls-key"),
        ({"key": pair.key}, "--tls-key needs --tls-cert"),
        ({"client_ca": authority.file}, "--tls-client-ca needs --tls-cert"),
        ({"cert": pair.cert, "key": other.key}, "is not the unencrypted PEM key of --tls-cert"),
        ({"cert": pair.cert, "key": text}, "is not the unencrypted PEM key of --tls-cert"),
        ({"cert": text, "key": pair.key}, "--tls-cert .*holds no certificate"),
        ({"cert": missing, "key": pair.key}, "--tls-cert .*cannot be read"),
        ({"cert": pair.cert, "key": missing}, "--tls-key .*cannot be read"),
        ({"ca": missing}, "--tls-ca .*cannot be read"),
        ({"ca": text}, "--tls-ca .*holds no certificate"),
    ):
        with pytest.raises(ValueError, match=expected):
            Tls(**arguments)


def test_an_ended_certificate_is_refused(tmp_path):
    from datetime import UTC, datetime, timedelta

    import trustme

    issued = trustme.CA().issue_cert("localhost", not_after=datetime.now(UTC) - timedelta(days=1))
    cert, key = tmp_path / "old.pem", tmp_path / "old.key"
    cert.write_bytes(issued.cert_chain_pems[0].bytes())
    issued.private_key_pem.write_to_path(key)
    with pytest.raises(ValueError, match=r"--tls-cert .*ended on .*renew it"):
        Tls(cert, key)


def test_the_name_that_a_certificate_is_for(authority):
    assert common_name(authority.issue("gateway.example.com", "10.0.0.7").cert) == "gateway.example.com"
    assert common_name(authority.issue("127.0.0.1").cert) == "127.0.0.1"


def stage_arguments(*flags: str):
    return stage_parser("fusion", 0).parse_args(["--checkpoints", "nowhere", "--device", "cpu", *flags])


def test_a_stage_does_not_listen_everywhere_in_plain_text(authority):
    with pytest.raises(SystemExit, match=r"--host 0\.0\.0\.0: .*--tls-cert"):
        stage_options(stage_arguments("--host", "0.0.0.0"))
    assert not stage_options(stage_arguments("--host", "0.0.0.0", "--insecure")).listen.tls.serves
    pair = authority.issue("localhost")
    files = ["--tls-cert", str(pair.cert), "--tls-key", str(pair.key)]
    assert stage_options(stage_arguments("--host", "0.0.0.0", *files)).listen.tls.serves


def gateway_arguments(*flags: str):
    import argparse

    from services.gateway.auth.options import add_security_flags

    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--data-host", default="127.0.0.1")
    add_security_flags(parser)
    return parser.parse_args(flags)


def test_the_gateway_protects_its_ports_and_the_data_port(authority, tmp_path):
    pair = authority.issue("localhost")
    own = ["--tls-cert", str(pair.cert), "--tls-key", str(pair.key)]
    with pytest.raises(ValueError, match="--host"):
        security_options(gateway_arguments("--host", "0.0.0.0"))
    with pytest.raises(ValueError, match=r"--data-host 0\.0\.0\.0: .*--stage-tls-cert"):
        security_options(gateway_arguments("--data-host", "0.0.0.0", *own))
    with pytest.raises(ValueError, match="--stage-tls-ca needs"):
        security_options(gateway_arguments("--stage-tls-ca", str(authority.file)))
    with pytest.raises(ValueError, match="need --stage-tls-ca"):
        security_options(gateway_arguments("--stage-tls-cert", str(pair.cert)))
    good = security_options(gateway_arguments("--data-host", "0.0.0.0", *own, "--stage-tls-ca", str(authority.file)))
    assert good.stage_tls.serves and good.stage_tls.connects and good.stage_tls.client_ca == authority.file
    assert not good.tls.connects


def test_keys_are_required_as_soon_as_others_can_connect(authority):
    assert not security_options(gateway_arguments()).auth.required
    assert security_options(gateway_arguments("--auth", "required")).auth.required
    assert security_options(gateway_arguments("--host", "0.0.0.0", "--insecure")).auth.required


@pytest.mark.parametrize("content", ["short", "x" * 300, "white space " * 5, "ü" * 40, ""])
def test_a_bad_admin_key_is_refused_without_being_told(content, tmp_path: Path):
    file = tmp_path / "key"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"--admin-key-file .*32 to 256 printable") as caught:
        security_options(gateway_arguments("--admin-key-file", str(file)))
    assert not content or content not in str(caught.value)
