# SPDX-License-Identifier: BSD-2-Clause
"""The guest agent (XENIFACE): what toolstacks read and ask for. docs/agent.md."""

SOCKET = "agent.sock"
"""In the directory of run files: who asks there is told what the agent says of itself."""
QUOTA = ("ENOSPC", "EDQUOT")
"""Why keys are refused (`agent status`) when the store has no room for more of this guest's."""
