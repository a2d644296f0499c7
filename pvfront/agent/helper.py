# SPDX-License-Identifier: BSD-2-Clause
"""Programs that do what the agent itself may not: its unit lets it change nothing but the store.

systemd does it, which root may ask on its private socket, whatever the sandbox (systemd-run(1)).
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable, Mapping

WITHIN = 30.0  # seconds of one program

Command = Callable[..., Awaitable[str]]
"""Runs a program (its words); "" if it went well, else one line that says what is wrong."""


async def command(*words: str) -> str:
    """A `Command` as the agent's own child: systemctl and its like."""
    try:
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        return f"{words[0]}: {error.strerror}"
    try:
        _, said = await asyncio.wait_for(process.communicate(), WITHIN)
    except TimeoutError:
        return f"{words[0]}: not done within {WITHIN:g} s"
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()
    if process.returncode == 0:
        return ""
    lines = said.decode(errors="replace").strip().splitlines()
    return f"{words[0]}: {lines[-1] if lines else f'status {process.returncode}'}"


async def outside(
    *words: str, run: Command = command, environ: Mapping[str, str] | None = None
) -> str:
    """A `Command` that systemd runs, outside of the sandbox. "": it was begun."""
    given = [f"--setenv={name}={value}" for name, value in (environ or {}).items()]
    return await run("systemd-run", "--quiet", "--collect", "--no-block", *given, "--", *words)


async def pvfront_outside(
    *words: str, run: Command = command, environ: Mapping[str, str] | None = None
) -> str:
    """`outside` of this very program's command line."""
    return await outside(sys.executable, "-P", "-m", "pvfront", *words, run=run, environ=environ)


async def hooks_outside(
    moment: str, facts: Mapping[str, str] | None = None, *, run: Command = command
) -> str:
    """Has the hooks of `moment` run: the admin's programs are not to live in our sandbox."""
    environ = {f"PVFRONT_{name}": value for name, value in (facts or {}).items()}
    return await pvfront_outside("agent", "hooks", moment, run=run, environ=environ)
