"""Roles, keys, buckets and links by themselves."""

from __future__ import annotations

import re

import pytest

from services.gateway.auth import buckets
from services.gateway.auth.buckets import Buckets
from services.gateway.auth.caller import LOCAL, Action, Caller, KeyLimits, Role, acting_as, current_caller
from services.gateway.auth.gate import credentials_of
from services.gateway.auth.keys import hash_of, id_of, new_key
from services.gateway.auth.links import LIFETIME_S, Links
from services.gateway.auth.policy import is_open
from shared.errors import InvalidRequest, NotFound, PermissionDenied, RateLimited
from shared.group.ranks import Ranks, require_protected_group

PATH = "/api/videos/job_0.mp4"


@pytest.mark.parametrize(
    ("role", "allowed"),
    [
        (Role.VIEWER, {Action.READ}),
        (Role.USER, {Action.READ, Action.MAKE}),
        (Role.WORKER, {Action.REGISTER}),
        (Role.ADMIN, set(Action)),
    ],
)
def test_what_each_role_may(role, allowed):
    caller = Caller(role, "key_a", "A")
    for action in Action:
        if action in allowed:
            caller.require(action)
        else:
            with pytest.raises(PermissionDenied, match=f"role {role.value}; this call needs"):
                caller.require(action)


def test_whose_jobs_each_role_sees():
    for role, others in ((Role.VIEWER, True), (Role.USER, False), (Role.WORKER, False), (Role.ADMIN, True)):
        caller = Caller(role, "key_a")
        assert caller.sees("job_1", "key_a")
        assert caller.sees("job_1", "key_b") == caller.sees("job_1", "") == others
        assert (caller.key_filter is None) == others
    with pytest.raises(NotFound, match="there is no job 'job_1'"):
        Caller(Role.USER, "key_a").require_job("job_1", "key_b")


def test_a_link_shows_its_job_and_changes_nothing():
    caller = Caller(Role.VIEWER, only_job="job_1")
    assert caller.sees("job_1", "key_b") and not caller.sees("job_2", "key_b")
    with pytest.raises(PermissionDenied):
        caller.require(Action.MAKE)


def test_nobody_is_nobody():
    with pytest.raises(LookupError):
        current_caller()
    with acting_as(LOCAL):
        assert current_caller() is LOCAL
    with pytest.raises(LookupError):
        current_caller()


@pytest.mark.parametrize("value", [0, -1, 1_000_000_001])
@pytest.mark.parametrize("name", ["max_concurrent_jobs", "max_daily_jobs", "requests_per_minute"])
def test_limits_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}"):
        KeyLimits(**{name: value})


def test_a_key_is_recognised_and_nothing_like_it():
    key, secret = new_key("A", Role.USER, KeyLimits())
    assert re.fullmatch(r"ovi_[a-z2-9]{8}_[A-Za-z0-9_-]{43}", secret)
    assert id_of(secret) == key.id and key.is_of(secret) and secret.startswith(key.prefix)
    assert secret not in repr(key) and key.hash == hash_of(secret)
    for wrong in (secret[:-1], secret + "a", secret.swapcase(), f" {secret}", "", "ovi_", key.hash, key.id):
        assert not key.is_of(wrong)
    assert id_of(secret[:-1]) is None and id_of(secret + "\n") is None
    others = {new_key("A", Role.USER, KeyLimits())[1] for _ in range(100)}
    assert len(others) == 100 and secret not in others


@pytest.mark.parametrize("name", ["", "x" * 81, "a\nb", "a\x1b[31m", "\u202egnp"])
def test_names_of_keys_are_printable(name):
    with pytest.raises(InvalidRequest, match="name"):
        new_key(name, Role.USER, KeyLimits())


def test_a_bucket_empties_at_once_and_fills_evenly():
    now = [1000.0]
    calls = Buckets("calls", clock=lambda: now[0])
    for _ in range(6):
        calls.take("a", 6)
    with pytest.raises(RateLimited) as caught:
        calls.take("a", 6)
    assert caught.value.retry_after_s == pytest.approx(10.0)
    calls.take("b", 6)
    now[0] += 9.9
    with pytest.raises(RateLimited):
        calls.take("a", 6)
    now[0] += 0.2
    calls.take("a", 6)
    with pytest.raises(RateLimited):
        calls.take("a", 6)
    now[0] += 3600.0
    for _ in range(6):
        calls.take("a", 6)
    with pytest.raises(RateLimited):
        calls.take("a", 6)
    for _ in range(100):
        calls.take("unlimited", 0)


def test_buckets_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(buckets, "MAX_BUCKETS", 3)
    calls = Buckets("calls", clock=lambda: 0.0)
    calls.take("a", 1)
    for name in "bcd":
        calls.take(name, 1)
    # It was not used for longest, and was forgotten.
    calls.take("a", 1)
    with pytest.raises(RateLimited):
        calls.take("d", 1)


def query_of(url: str) -> dict[str, str]:
    return dict(part.split("=") for part in url.partition("?")[2].split("&"))


def test_a_link_is_for_one_path_one_secret_and_a_day(monkeypatch):
    links = Links(b"a" * 32)
    query = query_of(links.sign(PATH))
    assert links.opens(PATH, query)
    assert not links.opens(PATH + "x", query) and not Links(b"b" * 32).opens(PATH, query)
    assert not links.opens(PATH, {"expires": query["expires"]}) and not links.opens(PATH, {})
    now_s = int(query["expires"]) - LIFETIME_S
    monkeypatch.setattr("services.gateway.auth.links.time.time", lambda: now_s + LIFETIME_S - 1)
    assert links.opens(PATH, query)
    monkeypatch.setattr("services.gateway.auth.links.time.time", lambda: now_s + LIFETIME_S + 1)
    assert not links.opens(PATH, query)


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({"authorization": "Bearer abc"}, "abc"),
        ({"authorization": "bearer   abc "}, "abc"),
        ({"x-api-key": " abc "}, "abc"),
        ({"authorization": "Basic abc", "x-api-key": "def"}, "def"),
        ({"authorization": "Bearer"}, ""),
        ({"authorization": "abc"}, ""),
        ({}, ""),
    ],
)
def test_where_a_key_is_looked_for(headers, key):
    assert credentials_of(headers) == key


def test_what_is_open_to_everybody():
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json", "/", "/assets/app.js"):
        assert is_open("GET", path) and not is_open("POST", path)
    for path in ("/metrics", "/v1/jobs", "/v1/videos", "/api/jobs", "/api/health", "/assetsx", "/healthz/../v1/jobs"):
        assert not is_open("GET", path)


def ranks(**changed: object) -> Ranks:
    usual = {
        "rank": 0,
        "local_rank": 0,
        "world_size": 2,
        "store_host": "127.0.0.1",
        "store_port": 1,
        "agent_serves_store": False,
        "num_hosts": 1,
    }
    return Ranks(**{**usual, **changed})


def test_ranks_meet_on_the_loopback_or_say_that_they_do_not():
    require_protected_group(ranks(), insecure=False)
    require_protected_group(ranks(world_size=1, store_host="gpu-7"), insecure=False)
    for open_one in (ranks(store_host="gpu-7"), ranks(agent_serves_store=True), ranks(num_hosts=2)):
        with pytest.raises(ValueError, match=r"shared\.group\.launch.*--insecure"):
            require_protected_group(open_one, insecure=False)
        require_protected_group(open_one, insecure=True)
