# SPDX-License-Identifier: BSD-2-Clause
"""What an engine has of the hub (docs/host.md): connections that stand for open device nodes."""

from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path
from typing import Any

from pvfront.errors import PvfrontError

HUB_SECONDS = 60.0


class EngineError(PvfrontError):
    """The engine or the hub refused; `errno` says why."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.errno = code


class HubDevice:
    """A connection, standing for one open device node of a domain.

    Raises EngineError.
    """

    def __init__(self, host: Path, device: str, domid: int) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(HUB_SECONDS)
        try:
            self.sock.connect(os.fspath(host / "hub.sock"))
            self.ask(do="open", device=device, domid=domid)
        except OSError as exc:
            self.sock.close()
            raise EngineError(
                f"no {device} from the hub of {host}: {exc}", exc.errno or errno.EIO
            ) from exc
        except BaseException:
            self.sock.close()
            raise

    def ask(self, **request: Any) -> tuple[dict[str, Any], list[int]]:
        self.sock.send(json.dumps(request).encode())
        data, fds, _, _ = socket.recv_fds(self.sock, 1 << 16, 4)
        answer = json.loads(data) if data else {"ok": False, "errno": "EPIPE", "text": "hub gone"}
        if not answer["ok"]:
            for fd in fds:
                os.close(fd)
            code = getattr(errno, str(answer["errno"]), errno.EIO)
            raise EngineError(f"{request['do']}: {answer['errno']} ({answer['text']})", code)
        return answer, fds

    def close(self) -> None:
        self.sock.close()
