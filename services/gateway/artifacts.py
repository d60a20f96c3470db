"""Files that jobs leave behind, in the artifact store: a name that is there is whole."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

import google_crc32c
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from services.gateway.jobs.domain import JOB_ID_PATTERN
from services.gateway.objects import ObjectInfo, Store
from shared.errors import CorruptTensor, NotFound

VIDEO = "video.mp4"
_LATENTS = "latents.safetensors"
_CHECKPOINT = "denoise.safetensors"
_HEADER_BYTES = 64 << 10
"""More than the header of a checkpoint has."""
_PART_BYTES = 1 << 20
"""Read of a clip at once, and held in memory for each client that downloads."""
_PIECE_BYTES = 512 << 10
"""Given to a client at once."""
_MAX_CLIP_BYTES = 1 << 30
"""Far above the largest: 10 s of noise at 960 x 960 are some 100 MB."""
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
    """The files of all jobs, a folder a job. Thread-safe; calls block, but for `pieces`.

    Every call raises ArtifactsAway if the store cannot be reached.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def find(self, job_id: str, file_name: str = VIDEO) -> ObjectInfo | None:
        """A file of a job, which is whole if it is there."""
        return self._store.find(_name(job_id, file_name))

    def found_video(self, job_id: str) -> ObjectInfo:
        """A finished clip.

        Raises:
            NotFound: the file is not there.
        """
        info = self.find(job_id)
        if info is None:
            raise NotFound(f"the video of {job_id} is gone; create the job again")
        return info

    def read(self, job_id: str, file_name: str = VIDEO) -> bytes:
        """A file as a whole.

        Raises:
            NotFound: the file is not there.
        """
        content = self._store.get(_name(job_id, file_name))
        if content is None:
            raise NotFound(f"{file_name} of {job_id} is gone; create the job again")
        return content

    def write(self, job_id: str, file_name: str, content: bytes) -> None:
        """Keep a file, in the place of what was kept before."""
        self._store.put(_name(job_id, file_name), content)

    async def pieces(self, job_id: str, file_name: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Bytes of a file from `start` up to `stop`, in pieces below 1 MiB, read as they are wanted.

        Raises:
            NotFound: the file is not there any more.
        """
        name = _name(job_id, file_name)
        for begin in range(start, stop, _PART_BYTES):
            part = await asyncio.to_thread(self._store.get_part, name, begin, min(begin + _PART_BYTES, stop))
            if part is None:
                raise NotFound(f"{file_name} of {job_id} was deleted")
            for at in range(0, len(part), _PIECE_BYTES):
                yield part[at : at + _PIECE_BYTES]

    def has_latents(self, job_id: str) -> bool:
        """Whether the denoise was finished."""
        return self.find(job_id, _LATENTS) is not None

    def write_latents(self, job_id: str, latents: Latents, metadata: dict[str, str]) -> None:
        """Keep the result of a denoise."""
        tensors = {"video_latent": latents.video_CFHW.contiguous(), "audio_latent": latents.audio_SC.contiguous()}
        self.write(job_id, _LATENTS, save(tensors, metadata=metadata))

    def read_latents(self, job_id: str) -> tuple[Latents, dict[str, str]]:
        """What `write_latents` kept.

        Raises:
            CorruptTensor: the file is damaged.
            NotFound: there is none.
        """
        content = self.read(job_id, _LATENTS)
        try:
            tensors = load(content)
            return Latents(tensors["video_latent"], tensors["audio_latent"]), _metadata(content)
        except (SafetensorError, KeyError, ValueError) as error:
            raise CorruptTensor(f"the kept latents of {job_id} are damaged ({error}); create the job again") from None

    def write_checkpoint(self, job_id: str, file: torch.Tensor) -> None:
        """Keep where a denoise is, in the place of what was kept before.

        Args:
            job_id: of the job.
            file: a safetensors file as bytes, uint8.
        """
        self._store.put(_name(job_id, _CHECKPOINT), memoryview(file.numpy()))  # type: ignore[arg-type]

    def read_checkpoint(self, job_id: str) -> torch.Tensor | None:
        """What `write_checkpoint` kept, damaged or not; None if there is nothing."""
        content = self._store.get(_name(job_id, _CHECKPOINT))
        return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else None

    def checkpoint_steps(self, job_id: str) -> int:
        """How many steps the kept checkpoint saves; 0 if there is none, or it cannot be read."""
        header = self._store.get_part(_name(job_id, _CHECKPOINT), 0, _HEADER_BYTES)
        try:
            return int(_metadata(header).get("steps_done", 0)) if header else 0
        except ValueError:
            return 0

    def delete_checkpoint(self, job_id: str) -> None:
        """Forget where a denoise was."""
        self._store.delete(_name(job_id, _CHECKPOINT))

    def tidy(self, job_id: str) -> int:
        """Remove what killed gateways left half-written of a job that has ended; bytes of the files that stay."""
        return self._store.tidy(_folder(job_id))

    def delete(self, job_id: str) -> None:
        """Remove a job's files; none being there is no error."""
        self._store.delete_folder(_folder(job_id))


class ClipCollector:
    """A clip on its way from the VAE service, in memory: nothing half-made is ever anywhere else."""

    def __init__(self) -> None:
        self._content = bytearray()

    def add(self, chunk: bytes) -> None:
        """The next bytes.

        Raises:
            CorruptTensor: no clip is that long.
        """
        self._content += chunk
        if len(self._content) > _MAX_CLIP_BYTES:
            raise CorruptTensor(f"a clip came that has over {_MAX_CLIP_BYTES} bytes")

    def whole(self, *, num_bytes: int, crc32c: int) -> bytes:
        """The clip.

        Raises:
            CorruptTensor: it is not what was announced.
        """
        content = bytes(self._content)
        received, checksum = len(content), google_crc32c.value(content)
        if (received, checksum) != (num_bytes, crc32c):
            what = f"{received} bytes with checksum {checksum:08x}, announced were {num_bytes} with {crc32c:08x}"
            raise CorruptTensor(f"the clip did not arrive whole: {what}")
        return content


def _metadata(file: bytes) -> dict[str, str]:
    """Of a safetensors file, or of its first bytes: eight of them tell how long the header is, which is JSON.

    Raises:
        ValueError: it is none.
    """
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    return dict(header.get("__metadata__", {}))


def _name(job_id: str, file_name: str) -> str:
    return f"{_folder(job_id)}/{file_name}"


def _folder(job_id: str) -> str:
    if not is_job_id(job_id):
        raise NotFound(f"{job_id[:64]!r} is no job id")
    return f"artifacts/{job_id}"
