"""What a batch asks for, request by request: rows of a table, and samples of a prompt with seeds counted up. Pure."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

from ovi.gateway.v1 import gateway_pb2 as pb
from shared.errors import FieldViolation, InvalidRequest
from shared.sampling_options import MAX_SEED, SamplingOptions

MAX_JOBS = 10_000
MAX_SAMPLES = 100
MAX_TABLE_BYTES = 3 << 20
MAX_VIOLATIONS = 100
"""Told of one batch; a table that is wrong is mostly wrong in every row."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")
_PROMPT, _IMAGE = "text_prompt", "image_path"


def parameters_of(request: pb.BatchCreateRequest) -> list[tuple[str, pb.GenerationParameters]]:
    """What each job makes, with the path of the field that says so.

    Raises:
        InvalidRequest: the table cannot be read, or numbers are out of range; the jobs themselves are not looked at.
    """
    violations = list(_wrong(request))
    if violations:
        raise InvalidRequest(violations)
    rows = list(_rows(request)) if request.table else _listed(request)
    samples = request.samples_per_prompt or 1
    if not 1 <= len(rows) * samples <= MAX_JOBS:
        what = f"got {len(rows)} with {samples} samples of each, allowed is 1 to {MAX_JOBS} jobs together"
        raise InvalidRequest.of("table" if request.table else "requests", what)
    return [one for path, wanted in rows for one in _samples(path, wanted, samples)]


def _wrong(request: pb.BatchCreateRequest) -> Iterator[FieldViolation]:
    if bool(request.table) == bool(request.requests):
        got = "both" if request.table else "neither"
        yield FieldViolation("requests", f"got {got} of requests and table, allowed is one of the two")
    if request.request_id and _REQUEST_ID.fullmatch(request.request_id) is None:
        what = f"got {request.request_id[:120]!r}, allowed is nothing or 1 to 100 characters of [A-Za-z0-9._-]"
        yield FieldViolation("request_id", what)
    if request.samples_per_prompt > MAX_SAMPLES:
        what = f"got {request.samples_per_prompt}, allowed is 1 to {MAX_SAMPLES}, or 0 for 1"
        yield FieldViolation("samples_per_prompt", what)
    if len(request.table) > MAX_TABLE_BYTES:
        yield FieldViolation("table", f"got {len(request.table)} bytes, allowed is at most {MAX_TABLE_BYTES}")
    if request.HasField("template"):
        for field in ("prompt", "image_id"):
            if getattr(request.template, field):
                yield FieldViolation(f"template.{field}", "is set, allowed is nothing: it comes from the table")
        if not request.table:
            yield FieldViolation("template", "is set without a table, allowed is with a table only")


def _listed(request: pb.BatchCreateRequest) -> list[tuple[str, pb.GenerationParameters]]:
    return [(f"requests[{index}]", wanted) for index, wanted in enumerate(request.requests)]


def _rows(request: pb.BatchCreateRequest) -> Iterator[tuple[str, pb.GenerationParameters]]:
    try:
        text = request.table.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest.of("table", f"is no UTF-8 (byte {error.start}), allowed is CSV or TSV in UTF-8") from None
    header = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in header else ",", strict=True)
    try:
        columns = [(name or "").strip() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        if _PROMPT not in columns or set(columns) - {_PROMPT, _IMAGE}:
            what = f"got the columns {', '.join(columns)[:200] or 'none'}, allowed are {_PROMPT} and {_IMAGE}"
            raise InvalidRequest.of("table", f"{what}, in the first line")
        for index, row in enumerate(reader):
            path = f"table[{index}]"
            if None in row or None in row.values():
                raise InvalidRequest.of(path, f"got another number of cells than the header's {len(columns)}")
            wanted = pb.GenerationParameters()
            wanted.CopyFrom(request.template)
            wanted.prompt, wanted.image_id = row[_PROMPT], (row.get(_IMAGE) or "").strip()
            yield path, wanted
    except csv.Error as error:
        raise InvalidRequest.of("table", f"line {reader.line_num} cannot be read: {error}") from None


def _samples(path: str, wanted: pb.GenerationParameters, samples: int) -> Iterator[tuple[str, pb.GenerationParameters]]:
    first = wanted.options.seed if wanted.options.HasField("seed") else SamplingOptions().seed
    if first + samples - 1 > MAX_SEED:
        what = f"got {first} and {samples} samples, allowed is a last seed of at most {MAX_SEED}"
        raise InvalidRequest.of(f"{path}.options.seed", what)
    for number in range(samples):
        one = pb.GenerationParameters()
        one.CopyFrom(wanted)
        one.options.seed = first + number
        yield path, one
