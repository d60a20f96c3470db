"""Ids of jobs in paths and queries. What has not their form is no job, and reaches neither a table nor a path."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path
from pydantic import AfterValidator

from services.gateway.artifacts import is_job_id
from services.gateway.auth.caller import no_such_job
from services.gateway.jobs.domain import JOB_ID_PATTERN


def _formed(text: str) -> str:
    if not is_job_id(text):
        raise no_such_job(text)
    return text


JobId = Annotated[
    str,
    Path(description="Id of a job, as its creation gave it.", json_schema_extra={"pattern": f"^{JOB_ID_PATTERN}$"}),
    AfterValidator(_formed),
]
"""A path's job id. Raises NotFound where it cannot be one."""
