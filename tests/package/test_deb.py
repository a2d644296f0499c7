# SPDX-License-Identifier: BSD-2-Clause
"""The Debian package: what is in it, and what installing and removing it does to a system."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from debianworld import DIST, ROOT, Debian

CONFIG = "/etc/pvfront/pvfront.toml"
UNITS = sorted(path.name for path in (ROOT / "systemd").glob("*.service"))


def fields(deb: Path) -> dict[str, str]:
    text = subprocess.run(
        ["dpkg-deb", "--field", str(deb)], capture_output=True, text=True, check=True
    ).stdout
    return dict(re.findall(r"^(\S+): (.*)$", text, re.M))


def test_lintian_finds_no_error_and_nothing_to_warn_of(deb: Path) -> None:
    both = [str(path) for path in DIST.glob("pvfront*.deb")]
    assert len(both) == 2, "the package, and its debugging symbols"
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on", "error,warning", *both],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_worker_has_its_symbols_in_the_other_package(deb: Path) -> None:
    (symbols,) = DIST.glob("pvfront-dbgsym_*.deb")
    assert fields(symbols)["Depends"] == f"pvfront (= {fields(deb)['Version']})"
    ids = set(fields(symbols)["Build-Ids"].split())
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE
    ) as archive:
        worker = subprocess.run(
            ["tar", "-xO", "--wildcards", "*/pvfront-worker"],
            stdin=archive.stdout, capture_output=True, check=True,
        ).stdout  # fmt: skip
    assert any(bytes.fromhex(one) in worker for one in ids)


def test_neither_programs_nor_symbols_tell_where_they_were_compiled(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    looked_at = 0
    for deb in DIST.glob("pvfront*.deb"):
        tree = tmp_path / deb.stem
        subprocess.run(["dpkg-deb", "-x", str(deb), str(tree)], check=True)
        for path in tree.rglob("*"):
            if path.is_symlink() or not path.is_file():
                continue
            with path.open("rb") as file:
                if file.read(4) != b"\x7fELF":
                    continue
            unpack = ["objcopy", "--decompress-debug-sections", str(path), str(plain)]
            subprocess.run(unpack, check=True)
            assert str(ROOT).encode() not in plain.read_bytes(), path.relative_to(tree)
            looked_at += 1
    assert looked_at > 10


def test_it_installs_works_and_after_a_purge_nothing_is_left(debian: Debian, deb: Path) -> None:
    before = debian.files()
    debian.install(deb)
    assert debian.run("pvfront", "--version").startswith("pvfront, version ")
    said = debian.run("pvfront", "list", ok=False)
    assert said.startswith("pvfront: "), "there is no Xen: an error of one line"
    assert said.count("\n") == 1
    assert debian.run("getent", "passwd", "pvfront")
    assert debian.has("/usr/share/man/man1/pvfront.1.gz")
    assert debian.run("bash", "-n", "/usr/share/bash-completion/completions/pvfront") == ""
    assert debian.run("/usr/share/pvfront/pvfront-channel", "--version").startswith("version ")
    debian.run("systemd-analyze", "verify", "--man=no", *UNITS)
    debian.run("sh", "-c", "mkdir -p /etc/pvfront/hooks.d && touch /etc/pvfront/hooks.d/mine")
    enabled = "/etc/systemd/system/multi-user.target.wants/pvfront-channel@x.service"
    debian.run("ln", "-s", "/lib/systemd/system/pvfront-channel@.service", enabled)
    debian.run("dpkg", "--purge", "pvfront")
    # The user stays, as everywhere in Debian: files may be its own.
    users = {f"/etc/{name}-" for name in ("passwd", "group", "shadow", "gshadow")}
    assert debian.files() - before <= users


def test_an_upgrade_keeps_what_the_administrator_wrote(debian: Debian, deb: Path) -> None:
    debian.install(deb)
    assert debian.run("pvfront", "config", "check") == f"{CONFIG}: nothing is wrong\n"
    debian.run("sh", "-c", f"echo '[disk]' >{CONFIG}")
    debian.install(deb)
    assert debian.run("cat", CONFIG) == "[disk]\n"
    debian.run("dpkg", "--remove", "pvfront")
    assert debian.run("cat", CONFIG) == "[disk]\n", "removed, but not purged"


def test_as_installed_it_names_no_device_of_the_kernels(debian: Debian, deb: Path) -> None:
    debian.install(deb)
    named = "import tomllib, json; print(json.dumps(tomllib.load(open('" + CONFIG + "', 'rb'))))"
    assert json.loads(debian.run("python3", "-c", named)) == {
        "disk": {"claim": []}, "vif": {"claim": []}, "console": {"claim": []},
    }  # fmt: skip
