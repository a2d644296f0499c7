# SPDX-License-Identifier: BSD-2-Clause
"""What the suites on the embedded host share.

The suites of tests/guest run here too, against a hub in the place of a Xen guest's devices: one set
of tests, two hosts.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "guest")]
pytest.register_assert_rewrite("blkpeer", "hubclient", "test_event_channels", "test_grants")

import fuzzing  # noqa: E402, F401 (it registers the profile)
from hubclient import HUB, answers, dump  # noqa: E402
from hypothesis import settings  # noqa: E402
from waiting import PATIENCE, wait_for  # noqa: E402

from pvfront.host.handles import EmbeddedGrantMapper  # noqa: E402
from pvfront.platform import platform  # noqa: E402

settings.load_profile("steady")

EMPTY = {"ok": True, "ports": [], "grants": [], "deferred": 0}


@pytest.fixture(scope="module")
def hub_process(tmp_path_factory):
    """A hub for the tests of one file: its directory and process. Nothing is left at the end."""
    directory = tmp_path_factory.mktemp("hub")
    (directory / "limits.json").write_text('{"gntalloc": 1024}')
    with (directory / "log").open("w") as log:
        process = subprocess.Popen([*HUB, str(directory)], stderr=log)
    try:
        wait_for("the hub", lambda: answers(directory) or process.poll() is not None)
        yield directory, process
        assert process.poll() is None, (directory / "log").read_text()
        wait_for("nothing is left", lambda: dump(directory) == EMPTY, why=lambda: dump(directory))
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0, (directory / "log").read_text()
    assert "Traceback" not in (directory / "log").read_text()


@pytest.fixture
def hub(hub_process, monkeypatch):
    """The directory of a hub, which $PVFRONT_HOST names."""
    directory, _ = hub_process
    wait_for("the end of what the last test held", lambda: dump(directory) == EMPTY)
    monkeypatch.setenv("PVFRONT_HOST", str(directory))
    return directory


# -- what tests/guest/conftest.py has for a guest ----------------------------------------------


@pytest.fixture
def domid():
    return 1


@pytest.fixture
def channels(hub):
    with platform().event_channels() as opened:
        yield opened


@pytest.fixture
def allocator(hub):
    with platform().grant_allocator() as opened:
        yield opened


@pytest.fixture
def mapper(hub, domid):
    with EmbeddedGrantMapper.open(own_domid=domid) as opened:
        yield opened


class Limit:
    def __init__(self, path):
        self.path = str(path)
        self.for_ever = self.path

    def get(self):
        return int(json.loads(Path(self.path).read_text())["gntalloc"])

    def set(self, pages):
        Path(self.path).write_text(json.dumps({"gntalloc": pages}))


@pytest.fixture
def limit(hub):
    found = Limit(hub / "limits.json")
    before = found.get()
    yield found
    found.set(before)


@pytest.fixture
def memory_name():
    return "/memfd:pvfront-arena-"
