"""The gateway's own files: one owner of a data folder, a durable database, JSON in it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from services.gateway.database import DataDirInUse, DataDirLock, open_database
from services.gateway.pipeline.serializer import JsonSerializer
from shared.errors import ERRORS, FieldViolation, Internal, InvalidRequest, ReferenceLost


def test_data_folder_has_one_owner(tmp_path):
    folder = tmp_path / "new" / "data"
    with DataDirLock(folder):
        with pytest.raises(DataDirInUse, match=f"{folder} is in use by another gateway"):
            DataDirLock(folder)
        other = f"from services.gateway.database import *; import pathlib; DataDirLock(pathlib.Path({str(folder)!r}))"
        refused = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, timeout=60)
        assert refused.returncode == 1 and "DataDirInUse" in refused.stderr
    with DataDirLock(folder):
        pass


def test_database_is_durable_and_concurrent(tmp_path):
    database = open_database(tmp_path / "x.sqlite3")
    with database.connect() as connection:
        told = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "busy_timeout", "foreign_keys", "synchronous")
        }
    database.dispose()
    assert told == {"journal_mode": "wal", "busy_timeout": 30_000, "foreign_keys": 1, "synchronous": 2}


def test_serializer_keeps_values_and_errors_and_runs_nothing():
    serializer = JsonSerializer()
    for value in (None, 1.5, "x", {"args": [1, {"a": None}], "kwargs": {}}, [True]):
        assert serializer.deserialize(serializer.serialize(value)) == value
    for kind in ERRORS:
        if kind is InvalidRequest:
            continue
        back = serializer.deserialize(serializer.serialize(kind("what came")))
        assert type(back) is kind and back.message == "what came"
    wrong = InvalidRequest([FieldViolation("a", "b"), FieldViolation("c", "d")])
    assert serializer.deserialize(serializer.serialize(wrong)).violations == wrong.violations
    assert type(serializer.deserialize(serializer.serialize(ReferenceLost("gone")))) is ReferenceLost
    unknown = serializer.deserialize(serializer.serialize(KeyError("x")))
    assert type(unknown) is Internal and "KeyError" in unknown.message
    with pytest.raises(TypeError):
        serializer.serialize({"a": object()})
