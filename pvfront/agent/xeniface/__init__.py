# SPDX-License-Identifier: BSD-2-Clause
"""XENIFACE: the store, suspends, devices and shutdown events over D-Bus, for programs that are not
root too. docs/xeniface.md is for its users.

    policy     who may do what, and how much of it (pure)
    sessions   a caller's watches and transaction (no bus)
    bus        messages in, replies and signals out; what there is: org.pvfront.Xeniface1.xml
    component  all of it, as a part of the agent
"""
