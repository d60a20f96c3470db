"""deploy/backup.sh and deploy/restore.sh: a backup of a gateway at work gives its jobs and clips to a new one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovi.gateway.v1 import gateway_pb2 as pb
from tests.grpc.gateway_client import WAIT_S, running_gateway
from tests.grpc.scripted_stages import ScriptedStages, clip_of, scripted_stages
from tests.postgres import PostgresUnderTest, running_postgres

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture
def stages() -> Iterator[ScriptedStages]:
    with scripted_stages() as stages:
        yield stages


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresUnderTest]:
    with running_postgres() as server:
        yield server


def script(name: str, *folders: Path, database: str = "", programs: str = "") -> subprocess.CompletedProcess[str]:
    """Args: name, folders, URL, and where pg_dump and pg_restore of the server's version are."""
    environment = os.environ | {"OVI_DATABASE_URL": database, "PATH": f"{programs}:{os.environ['PATH']}"}
    command = [str(DEPLOY / name), *map(str, folders)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_backup_of_a_gateway_at_work_is_taken_up_by_a_new_one(kind, stages, request, tmp_path) -> None:
    old_database = new_database = programs = ""
    if kind == "postgresql":
        server = request.getfixturevalue("postgres")
        old_database, new_database = server.new_database(), server.new_database()
        programs = str(server.programs)
    backup, new = tmp_path / "backup", tmp_path / "new"
    with running_gateway(tmp_path / "old", *stages.flags, "--database-url", old_database) as gateway:
        done = gateway.end_of(gateway.create(seed=1).id)
        stages.fusion.next_call()  # that of the finished job
        stages.fusion.automatic = False
        running = gateway.create(seed=2)
        stages.fusion.next_call().step()
        gateway.until(running.id, lambda job: job.progress.done == 1)
        made = script("backup.sh", gateway.data_dir, backup, database=old_database, programs=programs)
        assert made.returncode == 0, made.stderr
        gateway.service.process.kill()
        gateway.service.process.wait(WAIT_S)
    stages.fusion.automatic = True
    restored = script("restore.sh", backup, new, database=new_database, programs=programs)
    assert restored.returncode == 0, restored.stderr
    with running_gateway(new, *stages.flags, "--database-url", new_database) as gateway:
        assert gateway.get(done.id) == done
        assert gateway.download(done.id) == clip_of(1)
        end = gateway.end_of(running.id)
        assert end.state == pb.JOB_STATE_COMPLETED, end
        assert gateway.download(running.id) == clip_of(2)
    again = script("restore.sh", backup, new, database=new_database)
    assert again.returncode == 1 and "is not empty" in again.stderr


def test_a_backup_that_cannot_be_made_says_so(tmp_path) -> None:
    failed = script("backup.sh", tmp_path / "nothing", tmp_path / "backup")
    assert failed.returncode != 0 and "unable to open database file" in failed.stderr
