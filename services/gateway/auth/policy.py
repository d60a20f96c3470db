"""What each way in does: which action a call is. What is not listed here is for administrators."""

from __future__ import annotations

from services.gateway.auth.caller import Action

_JOBS = "/ovi.gateway.v1.JobService/"
_WORKERS = "/ovi.gateway.v1.WorkerService/"
_SYSTEM = "/ovi.common.v1.SystemService/"
_READ = {
    *(_JOBS + name for name in ("GetJob", "ListJobs", "WatchJob", "DownloadVideo", "QueueStats")),
    *(_SYSTEM + name for name in ("GetDevices", "WatchDevices", "GetPlan", "ListWorkers")),
    "/ovi.gateway.v1.ModelService/ListModels",
}
_MAKE = {
    _JOBS + name
    for name in (
        "CreateJob",
        "BatchCreate",
        "CancelJob",
        "DeleteJob",
        "PauseJob",
        "ResumeJob",
        "UploadImage",
    )
}
_REGISTER = {_WORKERS + name for name in ("RegisterWorker", "UnregisterWorker")}
_ADMINISTER = {_SYSTEM + "SetMode"}
WATCHES = frozenset({_JOBS + "WatchJob", _SYSTEM + "WatchDevices"})
"""Calls that last as long as the caller likes."""

_OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/docs", "/openapi.json", "/favicon.ico"})
_OPEN_PREFIXES = ("/assets/",)
METRICS_PATH = "/metrics"
SOCKET_PREFIX = "/socket.io/"
_READING = frozenset({"GET", "HEAD", "OPTIONS"})


def action_of_rpc(method: str) -> Action:
    """What a gRPC method does.

    Args:
        method: as on the wire, "/package.Service/Method".
    """
    if method in _READ:
        return Action.READ
    if method in _REGISTER:
        return Action.REGISTER
    return Action.MAKE if method in _MAKE else Action.ADMINISTER


def action_of_http(method: str) -> Action:
    """What an HTTP request does; nothing under HTTP administers."""
    return Action.READ if method in _READING else Action.MAKE


def is_open(method: str, path: str) -> bool:
    """True for what everybody may see: probes, the API's description, the studio's files."""
    return method in _READING and (path in _OPEN_PATHS or path.startswith(_OPEN_PREFIXES))


def listed_rpcs() -> frozenset[str]:
    """Every method that was decided about."""
    return frozenset(_READ | _MAKE | _REGISTER | _ADMINISTER)
