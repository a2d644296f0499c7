# SPDX-License-Identifier: BSD-2-Clause
"""Who may do what on XENIFACE, and how much."""

from __future__ import annotations

import pytest

from pvfront.agent.xeniface.policy import (
    PATH_MAX,
    Caller,
    Limits,
    Policy,
    Refused,
    Settings,
    Usage,
    Usages,
)

POLICY = Policy(Settings(write_group="xen", write_paths=("data/app", "attr")))
ROOT = Caller(":1.1", 0)
USER = Caller(":1.2", 1000)
MEMBER = Caller(":1.3", 1001, may_write=True)


def refusal(call, *arguments) -> tuple[str, str]:
    with pytest.raises(Refused) as caught:
        call(*arguments)
    return caught.value.name, str(caught.value)


@pytest.mark.parametrize("caller", [ROOT, USER, MEMBER])
@pytest.mark.parametrize("path", ["", "domid", "device/vbd/51728/state", "data/a-b_c@d"])
def test_everybody_may_read_what_is_in_the_guests_own_directory(caller, path):
    assert POLICY.readable(caller, path) == path


@pytest.mark.parametrize("path", ["vm-data", "vm-data/password"])
def test_what_is_hidden_is_roots_alone(path):
    assert POLICY.readable(ROOT, path) == path
    for caller in (USER, MEMBER):
        name, said = refusal(POLICY.readable, caller, path)
        assert (name, said) == ("AccessDenied", f"{path}: only root may read what is in vm-data")


def test_a_path_that_only_begins_like_a_hidden_one_is_not_hidden():
    assert POLICY.readable(USER, "vm-database") == "vm-database"


def test_absolute_paths_are_roots_alone():
    path = "/local/domain/0/backend/vbd/1/51728/state"
    assert POLICY.readable(ROOT, path) == POLICY.writable(ROOT, path) == path
    for caller in (USER, MEMBER):
        assert refusal(POLICY.readable, caller, path)[0] == "AccessDenied"
        assert refusal(POLICY.writable, caller, path)[0] == "AccessDenied"


def test_root_may_write_everywhere_and_a_user_nowhere():
    assert POLICY.writable(ROOT, "control/shutdown") == "control/shutdown"
    name, said = refusal(POLICY.writable, USER, "data/app/x")
    assert (name, said) == ("AccessDenied", "only root may write, and members of the group xen")


def test_a_member_of_the_group_may_write_below_the_paths_for_it_and_not_these_themselves():
    assert POLICY.writable(MEMBER, "data/app/x") == "data/app/x"
    assert POLICY.writable(MEMBER, "attr/x/y") == "attr/x/y"
    for path in ("data/app", "data/x", "data/apple/x", "control/shutdown", "attr"):
        name, said = refusal(POLICY.writable, MEMBER, path)
        assert name == "AccessDenied"
        assert said == f"{path}: only root may write there; you may below data/app, attr"


def test_without_a_group_the_refusal_names_none():
    assert refusal(Policy().writable, USER, "data/x")[1] == "only root may write"


def test_only_root_says_which_domains_may_do_what():
    POLICY.owner(ROOT)
    assert refusal(POLICY.owner, MEMBER) == ("AccessDenied", "only root may set permissions")


@pytest.mark.parametrize("caller", [ROOT, USER])
@pytest.mark.parametrize(
    "path",
    ["a\nb", "a\x1b[2Jb", "a\0", "data/../x", "a//b", "data/", "/", "ä", "a b", "@x\n",
     "a" * (PATH_MAX + 1)],
)  # fmt: skip
def test_what_can_be_no_path_is_refused_and_shown_without_control_characters(caller, path):
    name, said = refusal(POLICY.readable, caller, path)
    assert name == "InvalidArgs"
    assert said.isprintable()
    assert len(said) < 300
    assert refusal(POLICY.writable, caller, path)[0] == "InvalidArgs"


def test_a_value_beyond_the_stores_own_limit_is_refused():
    assert POLICY.value(bytes(2048)) == bytes(2048)
    name, said = refusal(POLICY.value, bytes(2049))
    assert (name, said) == ("LimitsExceeded", "a value has at most 2048 bytes, not 2049")


def test_a_user_has_so_many_sessions_and_watches_and_no_more():
    usage = Usage(Limits(sessions=2, watches=1), 0.0)
    usage.session()
    usage.session()
    usage.watch()
    assert refusal(usage.session)[1] == "a user may have 2 sessions at a time"
    assert refusal(usage.watch)[1] == "a user may have 1 watches at a time"
    usage.sessions -= 1
    usage.session()


def test_requests_are_answered_in_bursts_and_then_at_their_rate():
    usage = Usage(Limits(per_second=10, burst=5), 100.0)
    for _ in range(5):
        usage.request(100.0)
    name, said = refusal(usage.request, 100.0)
    assert (name, said) == ("LimitsExceeded", "too many requests: 10 a second are answered")
    assert refusal(usage.request, 100.09)[0] == "LimitsExceeded"
    usage.request(100.11)
    assert refusal(usage.request, 100.12)[0] == "LimitsExceeded"
    for _ in range(5):
        usage.request(1000.0)
    assert refusal(usage.request, 1000.0)[0] == "LimitsExceeded"


def test_a_request_that_costs_more_counts_for_more():
    usage = Usage(Limits(per_second=10, burst=25), 0.0)
    usage.request(0.0, 20)
    assert refusal(usage.request, 0.0, 20)[0] == "LimitsExceeded"
    usage.request(1.5, 20)


def test_another_connection_of_the_same_user_has_no_requests_of_its_own_and_root_is_not_counted():
    usages = Usages(Limits(per_second=1, burst=2))
    usages.request(Caller(":1.7", 1000), 0.0)
    usages.request(Caller(":1.8", 1000), 0.0)
    assert refusal(usages.request, Caller(":1.9", 1000), 0.0)[0] == "LimitsExceeded"
    usages.request(Caller(":1.9", 1001), 0.0)
    for _ in range(10):
        usages.request(ROOT, 0.0)


def test_users_that_want_nothing_any_more_are_forgotten_and_those_that_have_something_are_not():
    usages = Usages(Limits(per_second=1, burst=1))
    usages.of(1, 0.0).session()
    for uid in range(2, 2 * Usages.MANY):
        usages.of(uid, 1000.0 + uid)
    assert usages.of(1, 5000.0).sessions == 1
    assert len(usages._of) <= Usages.MANY + 1
