"""Every example of docs/clients.md, run as it stands there, with the gateway's ports put in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.grpc.gateway_client import GatewayUnderTest
from tests.http.clips import tiny_clip
from tests.http.node import MODULES, ROOT, node

PAGE = (ROOT / "docs" / "clients.md").read_text()
EXAMPLES = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SIZES = {"720x720": "64x64"}
"""The scripted model's frames are small."""
GRPCURL = """#!/bin/sh
# grpcurl's arguments as the page has them, for buf curl
[ "$1" = -plaintext ] && [ "$2" = -d ] && [ $# = 5 ] || exit 64
exec {bin}/buf curl --protocol grpc --http2-prior-knowledge -d "$3" "http://$4/$5"
"""


def test_the_page_has_examples_of_every_kind():
    assert {kind for kind, _ in EXAMPLES} == {"sh", "python", "js"} and len(EXAMPLES) >= 10


@pytest.mark.parametrize(
    ("kind", "text"), EXAMPLES, ids=[f"{number}-{kind}" for number, (kind, _) in enumerate(EXAMPLES)]
)
def test_example(kind: str, text: str, gateway: GatewayUnderTest, tmp_path: Path) -> None:
    for placeholder, value in {
        "http://127.0.0.1:8000": gateway.http_url,
        "127.0.0.1:50050": gateway.service.address,
        **SIZES,
    }.items():
        text = text.replace(placeholder, value)
    programs = Path(sys.executable).parent
    tools = tmp_path / "bin"
    tools.mkdir()
    shim = tools / "grpcurl"
    shim.write_text(GRPCURL.replace("{bin}", str(programs)))
    shim.chmod(0o755)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(tools), str(programs), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore::DeprecationWarning",
    }
    if kind == "sh":
        command = ["bash", "-euo", "pipefail", "-c", text]
    elif kind == "python":
        command = [sys.executable, "-c", text]
    else:
        (tmp_path / "node_modules").symlink_to(MODULES)
        (tmp_path / "example.mjs").write_text(text)
        command = [node(), "example.mjs"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
    if "bell.mp4" in text:
        assert (tmp_path / "bell.mp4").read_bytes() == tiny_clip()
