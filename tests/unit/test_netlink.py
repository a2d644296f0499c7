# SPDX-License-Identifier: BSD-2-Clause
"""pyroute2 is imported as far as it is needed, and is whole for who asks it for more."""

import subprocess
import sys


def run(code: str) -> str:
    """In an interpreter that has imported nothing yet."""
    return subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=100
    ).stdout.strip()


def test_netlink_brings_no_more_than_netlink() -> None:
    count = "import sys, pvfront.netlink; print(sum(m.startswith('pyroute2') for m in sys.modules))"
    assert int(run(count)) < 40


def test_the_package_is_whole_for_who_asks_it_for_more() -> None:
    code = (
        "import pvfront.netlink, pyroute2\n"
        "assert pyroute2.netlink.genlmsg is pvfront.netlink.genlmsg\n"
        "from pyroute2 import IPRoute\n"
        "assert issubclass(pyroute2.NetlinkError, pvfront.netlink.NetlinkError)\n"
        "print(IPRoute.__module__, pyroute2.__version__ != '')"
    )
    assert run(code) == "pyroute2.iproute.linux True"


def test_a_name_that_it_does_not_have_is_an_error_as_ever() -> None:
    code = (
        "import pvfront.netlink, pyroute2\n"
        "try:\n    pyroute2.no_such_thing\n"
        "except AttributeError as error:\n    print(error)\n"
    )
    assert "no_such_thing" in run(code)


def test_whoever_had_imported_it_keeps_what_it_has() -> None:
    code = "import pyroute2 as p, pvfront.netlink, sys; print(sys.modules['pyroute2'] is p)"
    assert run(code) == "True"


def test_rtnetlink_works_without_the_rest() -> None:
    code = (
        "import sys\n"
        "from pvfront.rtnetlink import IPRoute\n"
        "with IPRoute() as ipr:\n"
        "    (index,) = ipr.link_lookup(ifname='lo')\n"
        "print('pyroute2.ndb' in sys.modules, index > 0)"
    )
    assert run(code) == "False True"
