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
pytest.register_assert_rewrite("hubclient", "test_event_channels", "test_grants")

from hubclient import HUB, PATIENCE, answers, dump, eventually  # noqa: E402

from pvfront.host.handles import EmbeddedGrantMapper  # noqa: E402
from pvfront.platform import platform  # noqa: E402


@pytest.fixture(scope="module")
def hub_process(tmp_path_factory):
    """A hub for the tests of one file: its directory and process. Nothing is left at the end."""
    directory = tmp_path_factory.mktemp("hub")
    (directory / "limits.json").write_text('{"gntalloc": 1024}')
    with (directory / "log").open("w") as log:
        process = subprocess.Popen([*HUB, str(directory)], stderr=log)
    try:
        eventually(lambda: answers(directory) or process.poll() is not None, "the hub")
        yield directory, process
        assert process.poll() is None, (directory / "log").read_text()
        empty = {"ok": True, "ports": [], "grants": [], "deferred": 0}
        eventually(lambda: dump(directory) == empty, f"nothing is left: {dump(directory)}")
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0, (directory / "log").read_text()
    assert "Traceback" not in (directory / "log").read_text()


@pytest.fixture
def hub(hub_process, monkeypatch):
    """The directory of a hub, which $PVFRONT_HOST names."""
    directory, _ = hub_process
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
