# SPDX-License-Identifier: BSD-2-Clause
"""The guest agent (XENIFACE): what toolstacks read and ask for. docs/agent.md."""
