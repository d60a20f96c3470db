"""The gateway's files: one owner of a data folder, whole artifacts or none, pictures by hash, JSON in the database."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys

import google_crc32c
import pytest
import torch
from PIL import Image

from services.gateway.artifacts import Artifacts, Latents
from services.gateway.database import DataDirInUse, DataDirLock, open_database
from services.gateway.images import ImageStore
from services.gateway.jobs.domain import new_job_id
from services.gateway.pipeline.serializer import JsonSerializer
from shared.errors import ERRORS, CorruptTensor, FieldViolation, Internal, InvalidRequest, NotFound, ReferenceLost


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


@pytest.fixture
def artifacts(tmp_path) -> Artifacts:
    return Artifacts(tmp_path / "artifacts")


def test_latents_come_back_bit_for_bit(artifacts):
    job_id = new_job_id()
    video = torch.randn(48, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    audio = torch.randn(157, 20, generator=torch.Generator().manual_seed(2))
    assert not artifacts.has_latents(job_id)
    artifacts.write_latents(job_id, Latents(video.transpose(2, 3), audio), {"seed": "1"})
    assert artifacts.has_latents(job_id)
    kept = artifacts.read_latents(job_id)
    assert torch.equal(kept.video_CFHW, video.transpose(2, 3)) and torch.equal(kept.audio_SC, audio)
    assert artifacts.read_latents_metadata(job_id) == {"seed": "1"}
    assert len(list((artifacts.video_path(job_id).parent).iterdir())) == 1, "nothing temporary is left"


def test_damaged_or_missing_latents_are_said(artifacts):
    job_id = new_job_id()
    with pytest.raises(NotFound, match=job_id):
        artifacts.read_latents(job_id)
    path = artifacts.video_path(job_id).parent / "latents.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(CorruptTensor, match="damaged"):
        artifacts.read_latents(job_id)


def test_clip_gets_its_name_only_when_it_is_whole(artifacts):
    job_id, clip = new_job_id(), bytes(range(256)) * 5000
    path = artifacts.video_path(job_id)
    for num_bytes, crc32c in ((len(clip) - 1, google_crc32c.value(clip)), (len(clip), google_crc32c.value(clip) ^ 1)):
        with artifacts.video_writer(job_id) as writer:
            writer.write(clip)
            with pytest.raises(CorruptTensor, match="did not arrive whole"):
                writer.finish(num_bytes=num_bytes, crc32c=crc32c)
        assert not list(path.parent.iterdir())
    with artifacts.video_writer(job_id) as writer:
        for start in range(0, len(clip), 1000):
            writer.write(clip[start : start + 1000])
        assert not path.exists()
        writer.finish(num_bytes=len(clip), crc32c=google_crc32c.value(clip))
    assert path.read_bytes() == clip and [p.name for p in path.parent.iterdir()] == ["video.mp4"]
    chunks = list(artifacts.video_chunks(job_id))
    assert b"".join(chunks) == clip and max(map(len, chunks)) < 1 << 20
    artifacts.delete(job_id)
    artifacts.delete(job_id)
    with pytest.raises(NotFound, match="gone"):
        next(artifacts.video_chunks(job_id))


@pytest.mark.parametrize("job_id", ["", "..", "../x", "/etc", "job_" + "I" * 26])
def test_only_job_ids_become_paths(artifacts, job_id):
    for use in (artifacts.video_path, artifacts.delete, artifacts.has_latents, artifacts.read_latents):
        with pytest.raises(NotFound, match="no job id"):
            use(job_id)


def png(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "blue").save(file, "PNG")
    return file.getvalue()


def test_pictures_are_kept_under_their_hash(tmp_path):
    images = ImageStore(tmp_path / "images")
    data = png((30, 20))
    kept = images.put(data)
    assert kept.id == hashlib.sha256(data).hexdigest() and (kept.height, kept.width) == (20, 30)
    assert images.put(data) == kept == images.find(kept.id) and images.read(kept.id) == data
    assert len(list((tmp_path / "images").iterdir())) == 2


def test_pictures_that_are_none_leave_nothing(tmp_path):
    images = ImageStore(tmp_path / "images")
    for data in (b"", b"hello", png((3, 3))[:40]):
        with pytest.raises(InvalidRequest, match="chunk"):
            images.put(data)
    assert not list((tmp_path / "images").iterdir())


@pytest.mark.parametrize("image_id", ["", ".", "..", "../ovi.sqlite3", "a" * 64, "A" * 64, "a" * 63 + "\n"])
def test_picture_ids_never_become_paths(tmp_path, image_id):
    (tmp_path / "ovi.sqlite3").write_bytes(b"secret")
    images = ImageStore(tmp_path / "images")
    assert images.find(image_id) is None
    with pytest.raises(NotFound):
        images.read(image_id)


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
