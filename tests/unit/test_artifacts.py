"""The artifact store: whole objects or none, in a folder and in a bucket alike; what jobs and pictures keep in it."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import io
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import google_crc32c
import pytest
import torch
from PIL import Image

from services.gateway.artifacts import VIDEO, Artifacts, ClipCollector, Latents
from services.gateway.database import CannotStart
from services.gateway.http.file_answer import wanted_part
from services.gateway.images import ImageStore
from services.gateway.jobs.domain import new_job_id
from services.gateway.objects import ArtifactsAway, Store, checked_url, open_store
from shared.errors import CorruptTensor, InvalidRequest, NotFound
from tests.bucket import BucketUnderTest, running_bucket
from tests.certificates import Authority


@pytest.fixture(scope="module")
def bucket() -> Iterator[BucketUnderTest]:
    with running_bucket() as bucket:
        yield bucket


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path) -> Store:
    url = request.getfixturevalue("bucket").new_url() if request.param == "bucket" else ""
    store = open_store(url, tmp_path / "data")
    store.check()
    return store


@pytest.fixture
def artifacts(store) -> Artifacts:
    return Artifacts(store)


@pytest.fixture
def images(store) -> ImageStore:
    return ImageStore(store)


def test_an_object_comes_back_whole_and_in_parts(store):
    content = bytes(range(256)) * 40_000
    assert store.find("artifacts/a/x") is store.get("artifacts/a/x") is store.get_part("artifacts/a/x", 0, 5) is None
    store.put("artifacts/a/x", content)
    assert store.get("artifacts/a/x") == content
    for start, stop in ((0, 10), (1_000_000, 5_000_000), (len(content) - 7, len(content)), (10, len(content) + 99)):
        assert store.get_part("artifacts/a/x", start, stop) == content[start:stop]
    info = store.find("artifacts/a/x")
    assert info.num_bytes == len(content) and info.etag.startswith('"') and info.etag.endswith('"')
    assert info == store.find("artifacts/a/x"), "whoever asks is told the same"
    store.put("artifacts/a/x", memoryview(b"other"))
    assert store.get("artifacts/a/x") == b"other" and store.find("artifacts/a/x").etag != info.etag


def test_a_folder_goes_as_a_whole_and_alone(store):
    for name in ("artifacts/a/x", "artifacts/a/y", "artifacts/ab/x"):
        store.put(name, b"12345")
    assert store.tidy("artifacts/a") == 10 and store.tidy("artifacts/none") == 0
    store.delete("artifacts/a/y")
    store.delete("artifacts/a/y")
    assert store.tidy("artifacts/a") == 5
    store.delete_folder("artifacts/a")
    store.delete_folder("artifacts/a")
    assert store.get("artifacts/a/x") is None and store.get("artifacts/ab/x") == b"12345"


def test_readers_see_one_whole_object_while_others_write(store):
    contents = [bytes([number]) * 300_000 for number in range(8)]
    store.put("artifacts/a/x", contents[0])
    with ThreadPoolExecutor(4) as threads:
        writing = [threads.submit(store.put, "artifacts/a/x", content) for content in contents]
        while not all(one.done() for one in writing):
            assert store.get("artifacts/a/x") in contents
        for one in writing:
            one.result()
    assert store.tidy("artifacts/a") == 300_000


def test_what_a_killed_gateway_left_half_written_in_a_folder_goes(tmp_path):
    store = open_store(f"file://{tmp_path}/with%20space", tmp_path / "data")
    store.check()
    store.put("artifacts/a/x", b"12345")
    (tmp_path / "with space/artifacts/a/x.0123abcd.part").write_bytes(b"123")
    assert store.tidy("artifacts/a") == 5
    assert [path.name for path in (tmp_path / "with space/artifacts/a").iterdir()] == ["x"]


def test_a_bucket_that_is_away_is_said_at_once_and_found_again(bucket):
    store = open_store(bucket.new_url(), Path("unused"))
    store.put("artifacts/a/x", b"12345")
    bucket.door.shut()
    try:
        for use in (
            store.check,
            lambda: store.put("artifacts/a/y", b""),
            lambda: store.get("artifacts/a/x"),
            lambda: store.get_part("artifacts/a/x", 0, 1),
            lambda: store.find("artifacts/a/x"),
            lambda: store.delete("artifacts/a/x"),
            lambda: store.delete_folder("artifacts/a"),
            lambda: store.tidy("artifacts/a"),
        ):
            with pytest.raises(ArtifactsAway, match=r"s3://clips/test.* cannot be used now .*try again soon") as away:
                use()
            assert "\n" not in away.value.message and "AWS4" not in away.value.message
    finally:
        bucket.door.open()
    assert store.get("artifacts/a/x") == b"12345"


def test_a_bucket_that_can_never_be_used_is_refused_by_its_flag(bucket):
    missing = open_store("s3://no-such-bucket", Path("unused"))
    with pytest.raises(CannotStart, match=r"--artifacts-url s3://no-such-bucket cannot be used: .*404.*has to exist"):
        missing.check()
    with mock.patch.dict(os.environ, {"AWS_SECRET_ACCESS_KEY": "wrong"}):
        refused = open_store(bucket.new_url(), Path("unused"))
    with pytest.raises(CannotStart, match=r"--artifacts-url s3://clips.*403.*AWS_ACCESS_KEY_ID"):
        refused.check()
    with mock.patch.dict(os.environ, {"AWS_ALLOW_HTTP": ""}), pytest.raises(CannotStart, match="AWS_ALLOW_HTTP=true"):
        open_store(bucket.new_url(), Path("unused"))
    with (
        mock.patch.dict(os.environ, {"AWS_CA_BUNDLE": "/nowhere.pem"}),
        pytest.raises(CannotStart, match=r"--artifacts-url s3://clips.*/nowhere.pem"),
    ):
        open_store(bucket.new_url(), Path("unused"))


def test_a_bucket_that_hangs_is_not_waited_for_long(bucket):
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        mock.patch.dict(os.environ, {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}),
        mock.patch.multiple("services.gateway.objects.bucket", _SMALL_S=0.3, _LARGE_S=0.5, _RETRY_S=0.1),
    ):
        store = open_store(bucket.new_url(), Path("unused"))
        for use in (lambda: store.find("a/x"), lambda: store.get("a/x"), lambda: store.put("a/x", bytes(1 << 20))):
            with pytest.raises(ArtifactsAway, match="cannot be used now"):
                use()


def test_an_authority_of_ones_own_is_named_as_aws_names_it(bucket, tmp_path):
    authority = Authority(tmp_path, "own")
    shown = authority.issue("localhost")
    server = http.server.HTTPServer(("localhost", 0), http.server.BaseHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(shown.cert, shown.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with mock.patch.dict(os.environ, {"AWS_ENDPOINT_URL": f"https://localhost:{server.server_port}"}):
            with pytest.raises(ArtifactsAway):
                open_store(bucket.new_url(), Path("unused")).find("a/x")
            with mock.patch.dict(os.environ, {"AWS_CA_BUNDLE": str(authority.file)}):
                known = open_store(bucket.new_url(), Path("unused"))
            with pytest.raises(ArtifactsAway, match="501"):
                known.find("a/x")
    finally:
        server.shutdown()
        server.server_close()


def test_a_folder_that_cannot_be_made_is_refused_by_its_flag(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CannotStart, match=r"--artifacts-url: the folder .*/file/data cannot be made"):
        open_store(f"file://{tmp_path}/file/data", tmp_path).check()


@pytest.mark.parametrize("text", ["", "file:///mnt/clips", "s3://bucket", "s3://bucket/a/b", "gs://bucket/a"])
def test_urls_that_name_a_place(text):
    assert checked_url(text) == text


@pytest.mark.parametrize("text", ["clips", "/mnt", "file:clips", "file://host/x", "s3://", "ftp://host/x", "s3:bucket"])
def test_urls_that_name_none_are_refused(text):
    with pytest.raises(ValueError, match=r"--artifacts-url: got .*allowed is file:///FOLDER, s3://BUCKET/PREFIX"):
        checked_url(text)


@pytest.mark.parametrize("text", ["s3://key:secret@bucket", "s3://bucket?secret=1", "s3://bucket#secret"])
def test_keys_do_not_belong_into_a_url(text):
    with pytest.raises(ValueError, match="keys come from the environment") as refused:
        checked_url(text)
    assert "secret" not in str(refused.value)


def test_latents_come_back_bit_for_bit(artifacts):
    job_id = new_job_id()
    video = torch.randn(48, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    audio = torch.randn(157, 20, generator=torch.Generator().manual_seed(2))
    assert not artifacts.has_latents(job_id)
    artifacts.write_latents(job_id, Latents(video.transpose(2, 3), audio), {"seed": "1"})
    assert artifacts.has_latents(job_id)
    kept, metadata = artifacts.read_latents(job_id)
    assert torch.equal(kept.video_CFHW, video.transpose(2, 3)) and torch.equal(kept.audio_SC, audio)
    assert metadata == {"seed": "1"}
    artifacts.delete(job_id)
    with pytest.raises(NotFound, match=job_id):
        artifacts.read_latents(job_id)


@pytest.mark.parametrize("content", [b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{}", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_damaged_latents_are_said(tmp_path, content):
    artifacts, job_id = Artifacts(open_store("", tmp_path)), new_job_id()
    artifacts.write(job_id, "latents.safetensors", content)
    with pytest.raises(CorruptTensor, match="damaged"):
        artifacts.read_latents(job_id)


def test_a_checkpoint_comes_back_and_tells_its_steps_by_its_first_bytes(artifacts):
    from tests.grpc.scripted_stages import checkpoint_of

    job_id = new_job_id()
    assert artifacts.read_checkpoint(job_id) is None and artifacts.checkpoint_steps(job_id) == 0
    for steps in (10, 20):
        artifacts.write_checkpoint(job_id, checkpoint_of(steps))
        assert artifacts.checkpoint_steps(job_id) == steps
        assert torch.equal(artifacts.read_checkpoint(job_id), checkpoint_of(steps))
    artifacts.write(job_id, "denoise.safetensors", b"\x05\x00\x00\x00\x00\x00\x00\x00{]{]{")
    assert artifacts.checkpoint_steps(job_id) == 0 and artifacts.read_checkpoint(job_id).numel() == 13
    artifacts.delete_checkpoint(job_id)
    assert artifacts.read_checkpoint(job_id) is None


def test_a_clip_is_taken_only_if_it_is_whole():
    clip = bytes(range(256)) * 5000
    collector = ClipCollector()
    for start in range(0, len(clip), 1000):
        collector.add(clip[start : start + 1000])
    for num_bytes, crc32c in ((len(clip) - 1, google_crc32c.value(clip)), (len(clip), google_crc32c.value(clip) ^ 1)):
        with pytest.raises(CorruptTensor, match="did not arrive whole"):
            collector.whole(num_bytes=num_bytes, crc32c=crc32c)
    assert collector.whole(num_bytes=len(clip), crc32c=google_crc32c.value(clip)) == clip


def test_a_clip_is_given_in_pieces(artifacts):
    job_id, clip = new_job_id(), bytes(range(251)) * 50_000

    async def pieces(start: int, stop: int) -> list[bytes]:
        return [piece async for piece in artifacts.pieces(job_id, VIDEO, start, stop)]

    with pytest.raises(NotFound, match="gone"):
        artifacts.found_video(job_id)
    artifacts.write(job_id, VIDEO, clip)
    assert artifacts.found_video(job_id).num_bytes == len(clip)
    for start, stop in ((0, len(clip)), (3, 4), (5_000_000, 9_000_001)):
        given = asyncio.run(pieces(start, stop))
        assert b"".join(given) == clip[start:stop] and max(map(len, given)) < 1 << 20
    artifacts.delete(job_id)
    with pytest.raises(NotFound, match="deleted"):
        asyncio.run(pieces(0, 5))


@pytest.mark.parametrize("job_id", ["", "..", "../x", "/etc", "job_" + "I" * 26])
def test_only_job_ids_become_names(tmp_path, job_id):
    artifacts = Artifacts(open_store("", tmp_path))
    for use in (artifacts.find, artifacts.delete, artifacts.has_latents, artifacts.read_latents, artifacts.tidy):
        with pytest.raises(NotFound, match="no job id"):
            use(job_id)


def png(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "blue").save(file, "PNG")
    return file.getvalue()


def test_pictures_are_kept_under_their_hash(images, store):
    data = png((30, 20))
    kept = images.put(data)
    assert kept.id == hashlib.sha256(data).hexdigest() and (kept.height, kept.width) == (20, 30)
    assert images.put(data) == kept == images.find(kept.id) and images.read(kept.id) == data
    assert store.tidy("images") > len(data)


def test_pictures_that_are_none_leave_nothing(images, store):
    for data in (b"", b"hello", png((3, 3))[:40]):
        with pytest.raises(InvalidRequest, match="chunk"):
            images.put(data)
    assert store.tidy("images") == 0


@pytest.mark.parametrize("image_id", ["", ".", "..", "../ovi.sqlite3", "a" * 64, "A" * 64, "a" * 63 + "\n"])
def test_picture_ids_never_become_paths(tmp_path, image_id):
    (tmp_path / "ovi.sqlite3").write_bytes(b"secret")
    images = ImageStore(open_store("", tmp_path))
    assert images.find(image_id) is None
    with pytest.raises(NotFound):
        images.read(image_id)


@pytest.mark.parametrize(
    ("header", "part"),
    [
        (None, (0, 100)),
        ("bytes=0-0", (0, 1)),
        ("bytes=10-19", (10, 20)),
        ("bytes=10-", (10, 100)),
        ("bytes=90-500", (90, 100)),
        ("bytes=-7", (93, 100)),
        ("bytes=-700", (0, 100)),
        ("bytes=100-", None),
        ("bytes=-0", None),
        ("bytes=99999999999999999-", None),
        ("bytes=9-3", (0, 100)),
        ("bytes=-", (0, 100)),
        ("bytes=0-1,5-6", (0, 100)),
        ("bytes=" + "9" * 5000 + "-", (0, 100)),
        ("pieces=1-2", (0, 100)),
        ("bytes=٣-٤", (0, 100)),
    ],
)
def test_which_part_a_range_names(header, part):
    assert wanted_part(header, 100) == part
