# SPDX-License-Identifier: BSD-2-Clause
"""docs/security.md names, for each rule, tests and files that exist, and mutations show them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RULES = range(1, 29)


def rows() -> dict[int, list[str]]:
    """Rule: the cells of its row."""
    text = (ROOT / "docs" / "security.md").read_text()
    found = re.findall(r"^\| (\d+) \|(.*)\|$", text, re.MULTILINE)
    return {int(number): cells.split(" | ") for number, cells in found}


def test_each_rule_has_a_row_with_an_existing_test_of_its_number() -> None:
    files = Path(__file__).parent.glob("test_*.py")
    defined = set(re.findall(r"def (test_\w+)", "".join(p.read_text() for p in files)))
    table = rows()
    assert sorted(table) == [*RULES]
    for rule, cells in table.items():
        named = re.findall(r"`(test_\w+)`", cells[-1])
        assert any(name.startswith(f"test_rule_{rule:02}_") for name in named), rule
        assert set(named) <= defined, set(named) - defined


def test_each_file_that_enforces_a_rule_exists() -> None:
    for rule, cells in rows().items():
        for path in re.findall(r"`((?:native|pvfront)/[\w/.]+)`", " ".join(cells)):
            assert (ROOT / path).is_file(), f"rule {rule}: {path}"


def mutations() -> list[dict[str, Any]]:
    with (ROOT / "tools" / "mutations.toml").open("rb") as file:
        entries: list[dict[str, Any]] = tomllib.load(file)["mutation"]
    return entries


def test_each_rule_that_has_a_check_has_a_mutation() -> None:
    assert {entry["rule"] for entry in mutations()} == set(RULES) - {22}


def test_each_mutation_finds_the_check_that_it_removes() -> None:
    """A run of the tests tries two of them: the others would be found stale later, one by one."""
    for entry in mutations():
        for edit in (entry, *entry.get("also", ())):
            found = (ROOT / edit["file"]).read_text().count(edit["old"])
            assert found == 1, f"{entry['name']}: {edit['file']} has {found} times\n{edit['old']}"
