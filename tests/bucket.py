"""A real S3 server for tests: a process of its own that checks keys, behind a door that can be shut."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import boto3

_BUCKET = "clips"
_STARTED = re.compile(r"Running on http://127\.0\.0\.1:(\d+)")
_SETTING_UP = "4"
"""Calls that are let in before keys are asked for: those that make the user, its rights, its keys and the bucket."""


class Door:
    """A port through which a server is reached. Shut, it refuses connections and cuts those that are open."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self.port = 0
        self._listener: socket.socket | None = None
        self._passing: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.open()

    def open(self) -> None:
        """Let connections in."""
        listener = self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        threading.Thread(target=self._serve, args=(listener,), daemon=True).start()

    def shut(self) -> None:
        """As a server that is away."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        # Only this wakes the thread that waits for connections.
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        with self._lock:
            for one in self._passing:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pass, args=(client,), daemon=True).start()

    def _pass(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._server_port)) as server:
            with self._lock:
                self._passing |= {client, server}
            other = {client: server, server: client}
            with contextlib.suppress(OSError):
                while True:
                    for one in select.select([client, server], [], [])[0]:
                        data = one.recv(1 << 16)
                        if not data:
                            return
                        other[one].sendall(data)
            with self._lock:
                self._passing -= {client, server}


class BucketUnderTest:
    """A bucket on a running server; every prefix in it belongs to one test."""

    def __init__(self, server_port: int) -> None:
        self.door = Door(server_port)
        self._prefixes = 0
        made = {"endpoint_url": f"http://127.0.0.1:{server_port}", "region_name": "us-east-1"}
        nobody = {"aws_access_key_id": "nobody", "aws_secret_access_key": "nothing", **made}
        iam = boto3.client("iam", **nobody)
        iam.create_user(UserName="gateway")
        rights = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [rights]})
        iam.put_user_policy(UserName="gateway", PolicyName="all", PolicyDocument=policy)
        keys = iam.create_access_key(UserName="gateway")["AccessKey"]
        boto3.client("s3", **nobody).create_bucket(Bucket=_BUCKET)
        self.environment = {
            "AWS_ACCESS_KEY_ID": keys["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": keys["SecretAccessKey"],
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.door.port}",
            "AWS_ALLOW_HTTP": "true",
        }
        own = {"aws_access_key_id": keys["AccessKeyId"], "aws_secret_access_key": keys["SecretAccessKey"]}
        self.client: Any = boto3.client("s3", **made, **own)

    def new_url(self) -> str:
        """A fresh place, as `--artifacts-url` takes it."""
        self._prefixes += 1
        return f"s3://{_BUCKET}/test/{self._prefixes}"

    def names(self, url: str, folder: str = "") -> list[str]:
        """What is kept there."""
        prefix = url.removeprefix(f"s3://{_BUCKET}/") + "/"
        found = self.client.list_objects_v2(Bucket=_BUCKET, Prefix=prefix + folder).get("Contents", [])
        return sorted(entry["Key"].removeprefix(prefix) for entry in found)


@contextlib.contextmanager
def running_bucket() -> Iterator[BucketUnderTest]:
    """A server with an empty bucket; meanwhile it is what the environment of this process and of its services names."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    environment = os.environ | {"INITIAL_NO_AUTH_ACTION_COUNT": _SETTING_UP, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stderr is not None
            started = next(found for line in server.stderr if (found := _STARTED.search(line)))
            threading.Thread(target=server.stderr.read, daemon=True).start()
            bucket = BucketUnderTest(int(started[1]))
            with mock.patch.dict(os.environ, bucket.environment):
                yield bucket
            bucket.door.shut()
        finally:
            server.kill()
