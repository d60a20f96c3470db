"""Files that jobs leave behind. Written under a temporary name, synced, then renamed: a name that is there is whole."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import google_crc32c
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from services.gateway.jobs.domain import JOB_ID_PATTERN
from shared.errors import CorruptTensor, NotFound

_DOWNLOAD_CHUNK_BYTES = 512 << 10
_JOB_ID = re.compile(JOB_ID_PATTERN)


def is_job_id(text: str) -> bool:
    """Whether a text has the form of a job id; only then may it name a file."""
    return _JOB_ID.fullmatch(text) is not None


@dataclass(frozen=True)
class Latents:
    """Both latents of a finished denoise: (48, F, h, w) and (S, 20), float32, on the CPU."""

    video_CFHW: torch.Tensor
    audio_SC: torch.Tensor


class Artifacts:
    """The files of all jobs, a folder a job."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def video_path(self, job_id: str) -> Path:
        """Where a finished clip is, whether it is there or not."""
        return self._folder(job_id) / "video.mp4"

    def has_latents(self, job_id: str) -> bool:
        """Whether the denoise was finished."""
        return self._latents_path(job_id).is_file()

    def write_latents(self, job_id: str, latents: Latents, metadata: dict[str, str]) -> None:
        """Keep the result of a denoise."""
        path = self._latents_path(job_id)
        path.parent.mkdir(exist_ok=True)
        temporary = _temporary(path)
        tensors = {"video_latent": latents.video_CFHW.contiguous(), "audio_latent": latents.audio_SC.contiguous()}
        try:
            save_file(tensors, temporary, metadata=metadata)
            settle(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def read_latents(self, job_id: str) -> Latents:
        """What `write_latents` kept.

        Raises:
            CorruptTensor: the file is damaged.
            NotFound: there is none.
        """
        with self._open_latents(job_id) as file:
            return Latents(file.get_tensor("video_latent"), file.get_tensor("audio_latent"))

    def read_latents_metadata(self, job_id: str) -> dict[str, str]:
        """The metadata that `write_latents` kept.

        Raises:
            CorruptTensor: the file is damaged.
            NotFound: there is none.
        """
        with self._open_latents(job_id) as file:
            return dict(file.metadata() or {})

    def write_checkpoint(self, job_id: str, file: torch.Tensor) -> None:
        """Keep where a denoise is, in the place of what was kept before.

        Args:
            job_id: of the job.
            file: a safetensors file as bytes, uint8.
        """
        path = self._checkpoint_path(job_id)
        path.parent.mkdir(exist_ok=True)
        temporary = _temporary(path)
        try:
            temporary.write_bytes(memoryview(file.numpy()))  # type: ignore[arg-type]
            settle(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def read_checkpoint(self, job_id: str) -> torch.Tensor | None:
        """What `write_checkpoint` kept, damaged or not; None if there is nothing."""
        path = self._checkpoint_path(job_id)
        return torch.from_numpy(np.fromfile(path, dtype=np.uint8)) if path.is_file() else None

    def checkpoint_steps(self, job_id: str) -> int:
        """How many steps the kept checkpoint saves; 0 if there is none, or it cannot be read."""
        try:
            with safe_open(self._checkpoint_path(job_id), framework="pt") as file:
                return int((file.metadata() or {}).get("steps_done", 0))
        except (SafetensorError, OSError, ValueError):
            return 0

    def delete_checkpoint(self, job_id: str) -> None:
        """Forget where a denoise was, and what killed gateways left half-written."""
        path = self._checkpoint_path(job_id)
        for file in (path, *path.parent.glob(f"{path.stem}.*.part")):
            file.unlink(missing_ok=True)

    def video_writer(self, job_id: str) -> VideoWriter:
        """A writer for the clip."""
        path = self.video_path(job_id)
        path.parent.mkdir(exist_ok=True)
        return VideoWriter(path)

    def video_chunks(self, job_id: str) -> Iterator[bytes]:
        """A finished clip in pieces below 1 MiB.

        Raises:
            NotFound: the file is not there.
        """
        path = self.video_path(job_id)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise NotFound(f"the video of {job_id} is gone from the data folder; create the job again") from None
        with file:
            while chunk := file.read(_DOWNLOAD_CHUNK_BYTES):
                yield chunk

    def tidy(self, job_id: str) -> int:
        """Remove what killed gateways left half-written of a job that has ended; bytes of the files that stay."""
        folder = self._folder(job_id)
        for file in folder.glob("*.part"):
            file.unlink(missing_ok=True)
        total = 0
        # A job that is cancelled at its end loses its files meanwhile.
        with suppress(FileNotFoundError):
            for file in folder.iterdir():
                total += file.stat().st_size
        return total

    def delete(self, job_id: str) -> None:
        """Remove a job's files; none being there is no error."""
        folder = self._folder(job_id)
        while folder.is_dir():
            # Two may be at it: who cancels a job, and who notices that it was cancelled.
            with suppress(FileNotFoundError):
                shutil.rmtree(folder)

    @contextmanager
    def _open_latents(self, job_id: str) -> Iterator[Any]:
        path = self._latents_path(job_id)
        if not path.is_file():
            raise NotFound(f"the latents of {job_id} are gone from the data folder; create the job again")
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise CorruptTensor(f"the kept latents of {job_id} are damaged ({error}); create the job again") from None

    def _latents_path(self, job_id: str) -> Path:
        return self._folder(job_id) / "latents.safetensors"

    def _checkpoint_path(self, job_id: str) -> Path:
        return self._folder(job_id) / "denoise.safetensors"

    def _folder(self, job_id: str) -> Path:
        if not is_job_id(job_id):
            raise NotFound(f"{job_id[:64]!r} is no job id")
        return self._root / job_id


class VideoWriter:
    """Collects a clip under a temporary name; the real name appears only when size and checksum are right."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = _temporary(path)
        self._file = self._temporary.open("wb")
        self._checksum = google_crc32c.Checksum()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def write(self, chunk: bytes) -> None:
        """Append the next bytes."""
        self._file.write(chunk)
        self._checksum.update(chunk)

    def finish(self, *, num_bytes: int, crc32c: int) -> None:
        """Give the file its name.

        Raises:
            CorruptTensor: it is not what was announced.
        """
        received, checksum = self._file.tell(), int.from_bytes(self._checksum.digest(), "big")
        if (received, checksum) != (num_bytes, crc32c):
            what = f"{received} bytes with checksum {checksum:08x}, announced were {num_bytes} with {crc32c:08x}"
            raise CorruptTensor(f"the clip did not arrive whole: {what}")
        self._file.close()
        settle(self._temporary, self._path)


def _temporary(path: Path) -> Path:
    """A name of its own for a file in the making: a gateway that was held to be gone may come back to its own."""
    return path.with_suffix(f".{secrets.token_hex(4)}.part")


def settle(temporary: Path, path: Path) -> None:
    """Rename a finished file so that neither a crash nor a power cut leaves half of it under its name."""
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
