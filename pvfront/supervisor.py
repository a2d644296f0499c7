# SPDX-License-Identifier: BSD-2-Clause
"""What one supervisor service does: claims devices, runs a loop for each, answers questions.

Theory of operation
    One task per device runs `DeviceLoop`. Another follows the bus: a new id that is wanted gets a
    loop, one that is not wanted goes to the kernel as if we were not there. `Suspend` owns the
    suspend path and parks every loop before the domain sleeps.

    The end comes in two ways. *Stop* (SIGTERM, SIGINT): a disk that nobody holds is drained,
    closed and given back; one that is mounted, or held by swap, LVM, MD or dm, goes on being
    served by its worker, without us, until the next supervisor adopts it: stopping a service
    must not tear a file system from under its users. When the machine is switched off nobody
    comes after us: requests fail some seconds after the worker was ended too. *Death* (SIGKILL, a
    crash): every worker goes on, and the next supervisor adopts them all.

    Questions come through ``/run/pvfront/supervisor-<class>.sock`` (questions.py); the CLI is its
    client. What needs no answer stands in files: states (statefile.py), the timeline (trace.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from typing import Any

from .claim import CannotTake
from .device import DeviceLoop, Goal, Phase
from .deviceclass import DeviceClass
from .errors import PvfrontError
from .questions import answering
from .service import keep_watchdog, sd_notify, service_restarts, system_is_stopping
from .sharedwatch import Following
from .statefile import counters_of, save_state, state_of, write_json
from .states import XenbusState
from .suspend_device import SuspendedLoop
from .suspend_group import Participants, SuspendParticipant
from .suspend_shared import SharedSuspend
from .threads import in_daemon_thread
from .trace import SERVICE, Kind, Trace
from .xenbus import Bus, HandshakeTimeout, XenbusDevice
from .xenstore import Xenstore

log = logging.getLogger(__name__)

STOP_DEADLINE = 60.0
POWER_OFF_PATIENCE = 10.0
READY_DEADLINE = 30.0
UPGRADE_DEADLINE = 60.0
OTHERS_AFTER = (0.1, 0.9)
# The kernel may announce a device to us before it has made it.
TAKE_AGAIN_AFTER = (0.1, 0.4, 1.0, 2.0)
_NEVER = 1e9  # seconds
_SHOWN = 4  # devices that the unit's status names


class Served:
    """One device being served: its loop and the task that runs it."""

    def __init__(self, loop: DeviceLoop, task: asyncio.Task[None]) -> None:
        self.loop = loop
        self.task = task


def _is_gone(loop: DeviceLoop) -> bool:
    """Offline and closed: the toolstack removes the nodes, maybe after our last look."""
    view = loop.device.view
    return view.frontend is XenbusState.UNKNOWN or not view.online


class Supervisor:
    """Serves devices of one class until `stop`.

    `wanted` says which ids are ours; with `hot_plug` new ones are taken as they appear, else
    only those named at the start.
    """

    def __init__(
        self,
        store: Xenstore,
        klass: DeviceClass,
        wanted: Callable[[int], bool],
        *,
        named: Collection[int] = (),
        hot_plug: bool = False,
        force: bool = False,
        home: str = "",
        run_dir: Path,
        suspend: Callable[[Participants], SharedSuspend] | None = None,
    ) -> None:
        self.store = store
        self.klass = klass
        self.wanted = wanted
        self.named = sorted(named)
        self.hot_plug = hot_plug
        self.force = force
        self.home = home
        self.run_dir = run_dir
        self.served: dict[int, Served] = {}
        self.refused: dict[int, str] = {}
        self._trace: Trace  # of the service; from `run` on
        self._stop = asyncio.Event()
        self._failure: PvfrontError | None = None
        self._power_off = False  # the machine stops, not only we
        self._kept = False  # devices are left to their workers, used or not
        self._suspend = suspend(self._participants) if suspend is not None else None
        self._said = ""
        self._seen_ids: set[int] = set()
        self._beginning: dict[int, asyncio.Lock] = {}
        self._listed = asyncio.Event()
        self._first: set[asyncio.Task[None]] = set()  # begin the devices of the first list
        self._later: set[asyncio.Task[None]] = set()

    # -- life ------------------------------------------------------------------------------

    async def run(self, *, signals: bool = True) -> int:
        """Serves until `stop`, or (`signals`) SIGTERM or SIGINT; returns the exit status.

        Raises PvfrontError if a device named on the command line cannot be served at all.
        """
        self.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT) if signals else ():
            loop.add_signal_handler(number, self.stop)
        if signals:
            loop.add_signal_handler(signal.SIGHUP, self.reload)
        # First: a second supervisor must not change anything.
        async with answering(
            self.run_dir / f"supervisor-{self.klass.klass}.sock",
            self.klass.klass,
            {
                "list": self._do_list,
                "release": self._do_release,
                "upgrade": self._do_upgrade,
                "packets": self._do_packets,
                "statistics": self._do_statistics,
            },
        ):
            self._trace = Trace(self.run_dir, f"{SERVICE}{self.klass.klass}")
            self._trace.note(Kind.SERVICE, f"begins: pid {os.getpid()}", pid=os.getpid())
            self._show_refused()
            watchdog = asyncio.create_task(keep_watchdog(), name="watchdog")
            if self.hot_plug:
                self.klass.hold_hot_plug()
            else:
                self.klass.repair()
            try:
                await self._run()
            finally:
                watchdog.cancel()
                self.refused.clear()
                self._show_refused()
                self._trace.note(Kind.SERVICE, f"ends: pid {os.getpid()}", pid=os.getpid())
                self._trace.close()
                if self.hot_plug:
                    self.klass.release_hot_plug()
        return 1 if self._failure else 0

    async def _run(self) -> None:
        background: list[asyncio.Task[None]] = []
        try:
            try:
                for devid in self.named:
                    await self._begin(devid, strict=True)
            except (PvfrontError, OSError):
                await self._end(background)
                raise
            bus = Bus(self.store, self.klass.klass, home=self.home)
            background.append(asyncio.create_task(self._follow(bus), name="bus"))
            if self.hot_plug:
                background.append(asyncio.create_task(self._follow_others(), name="others"))
            if self._suspend is not None:
                background.append(asyncio.create_task(self._suspend.run(), name="suspend"))
                background.append(asyncio.create_task(self._show_suspend(self._suspend)))
            background.append(asyncio.create_task(self._announce(), name="announce"))
            stop = asyncio.create_task(self._stop.wait(), name="stop")
            done, _ = await asyncio.wait(
                {stop, *background[:-1]}, return_when=asyncio.FIRST_COMPLETED
            )
            if stop not in done:
                stop.cancel()
                for task in done:
                    task.result()  # a background task that ends has failed
            sd_notify("STOPPING=1")
            await self._end(background)
        finally:
            for task in (*background, *self._later):
                task.cancel()
            await asyncio.gather(*background, *self._later, return_exceptions=True)

    def stop(self) -> None:
        self._stop.set()

    def reload(self) -> None:
        """SIGHUP: workers of another program than the installed one are replaced."""
        self._spawn(self._reload(), "reload")

    async def _reload(self) -> None:
        for devid, served in sorted(self.served.items()):
            if served.task.done():
                continue
            if served.loop.phase is not Phase.CONNECTED:
                log.warning("%s: not connected: its worker stays", self.klass.label(devid))
            elif await in_daemon_thread("look at the program", served.loop.frontend.outdated):
                try:
                    await self._upgrade(devid)
                except (PvfrontError, OSError) as error:
                    log.warning("its worker stays: %s", error)

    async def _announce(self) -> None:
        """READY once every device has its first result, good or bad, or after a deadline."""
        await self._listed.wait()
        if self._first:
            await asyncio.wait(self._first, timeout=READY_DEADLINE)
        first = [s.loop for s in self.served.values()]
        with contextlib.suppress(TimeoutError, PvfrontError):
            await asyncio.gather(
                *(
                    loop.until_phase(
                        Phase.CONNECTED, Phase.FAILED, Phase.CLOSED, timeout=READY_DEADLINE
                    )
                    for loop in first
                )
            )
        self._said = self._status()
        sd_notify("READY=1", f"STATUS={self._said}")
        log.info("ready: %s", self._said)

    async def _end(self, background: Collection[asyncio.Task[None]]) -> None:
        # Hot plug and suspend stop first: nothing new may begin while we close.
        for task in (*background, *self._later):
            task.cancel()
        await asyncio.gather(*background, *self._later, return_exceptions=True)
        self._power_off = await system_is_stopping()
        self._kept = self.klass.kept_over_restart and await service_restarts()
        # What the toolstack took away long ago is at its end, and nobody's news any more.
        there = [d for d, s in self.served.items() if not (s.task.done() and _is_gone(s.loop))]
        await asyncio.gather(*(self._finish(devid) for devid in there))
        left = [s for s in self.served.values() if s.loop.phase is not Phase.CLOSED]
        if self._suspend is not None and not left:
            # No port of ours is bound any more; else the veto stands until the next supervisor.
            self._suspend.disarm()

    async def _finish(self, devid: int, *, even_if_busy: bool = False) -> str:
        """Closes one device and gives it back, or leaves it to its worker if it is in use."""
        served = self.served[devid]
        loop = served.loop
        name = self.klass.label(devid)
        if self._kept and loop.goal is not Goal.CLOSED:
            served.task.cancel()
            await asyncio.gather(served.task, return_exceptions=True)
            text = f"{name}: its worker goes on serving it until the service is back"
            log.info("%s", text)
            return text
        why = await asyncio.to_thread(loop.frontend.busy)
        if why is not None and not even_if_busy:
            served.task.cancel()
            await asyncio.gather(served.task, return_exceptions=True)
            left = "its worker goes on serving it without us"
            if loop.gave_up_at is not None:
                left = "its requests wait for the next supervisor"
            text = f"{name}: still in use ({why}): {left}"
            if self._power_off:
                # Whoever writes after the workers were ended must not hang the power-off.
                await loop.frontend.fail_after(POWER_OFF_PATIENCE)
                text += f"; when that has ended too, requests fail {POWER_OFF_PATIENCE:.0f} s later"
            log.warning("%s", text)
            return text
        loop.aim(Goal.CLOSED)
        await asyncio.wait({served.task}, timeout=STOP_DEADLINE)
        if not served.task.done():
            served.task.cancel()
            text = f"{name}: not closed within {STOP_DEADLINE:.0f} s ({loop.reason or loop.phase})"
            log.error("%s", text)
            self._failure = PvfrontError(text)
            return text
        if self._power_off and self.klass.kept_over_restart:
            text = f"{name}: closed, with the machine"  # the kernel has no use for it
        else:
            text = await self._given_back(devid)
        log.info("%s", text)
        return text

    async def _given_back(self, devid: int) -> str:
        try:
            device = await XenbusDevice.open(self.store, self.klass.klass, devid, home=self.home)
        except PvfrontError:
            self.klass.forget(f"{self.klass.klass}-{devid}")
            return f"{self.klass.label(devid)}: closed; the toolstack has removed it"
        try:
            return await self.klass.give_back(device)
        except (PvfrontError, OSError) as error:
            return f"{self.klass.label(devid)}: closed, but not given back: {error}"
        finally:
            await device.close()

    # -- devices ---------------------------------------------------------------------------

    async def _follow(self, bus: Bus) -> None:
        async for ids, touched in bus.changes():
            new = set(ids) - self._seen_ids
            self._seen_ids = set(ids)
            # Each in a task of its own: a driver that does not let go of one is nobody else's wait.
            begun = {self._spawn(self._met(devid), f"begin {devid}") for devid in sorted(new)}
            for devid in sorted(touched - new):
                self._spawn(self._again(devid), f"again {devid}")
            if not self._listed.is_set():
                self._first = begun
                self._listed.set()

    async def _met(self, devid: int) -> None:
        """An id that the list did not have before."""
        if devid in self.served and not self.served[devid].task.done():
            return
        if self.wanted(devid):
            await self._begin(devid, strict=False)
        elif not await self._no_more(devid):
            await self._pass_on(devid)

    async def _no_more(self, devid: int) -> bool:
        """Gives back what an earlier supervisor has left to its worker, and nobody wants now."""
        if not self.klass.kept_over_restart or not await asyncio.to_thread(
            self.klass.has, f"{self.klass.klass}-{devid}"
        ):
            return False
        log.info("%s: not to be served any more", self.klass.label(devid))
        await self._begin(devid, strict=False)
        if devid in self.served:
            await self._finish(devid)
            self.served.pop(devid, None)
        return True

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """A task that lives no longer than we do."""
        task = asyncio.create_task(work, name=name)
        self._later.add(task)
        task.add_done_callback(self._spawned_ended)
        return task

    def _spawned_ended(self, task: asyncio.Task[None]) -> None:
        self._later.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)

    async def _follow_others(self) -> None:
        """Hands devices of other classes to the kernel: hot plug is held for the whole bus."""
        ours = f"{self.home}device/{self.klass.klass}"
        root = f"{self.home}device"
        async with Following(self.store, root, root) as following:
            while True:
                fired = await following.news()
                if all(path == ours or path.startswith(ours + "/") for path in fired):
                    continue
                # The kernel makes the device when it gets the same event, maybe after us.
                for pause in OTHERS_AFTER:
                    await asyncio.sleep(pause)
                    try:
                        await asyncio.to_thread(self.klass.pass_on_others)
                    except (PvfrontError, OSError) as error:
                        log.warning("a device is not passed on to the kernel: %s", error)

    async def _pass_on(self, devid: int) -> None:
        """Lets the kernel have a device: while we hold hot plug it takes none by itself."""
        if not self.hot_plug:
            return
        try:
            await asyncio.to_thread(self.klass.pass_on, f"{self.klass.klass}-{devid}")
        except (PvfrontError, OSError) as error:
            log.warning("%s: not passed on to the kernel: %s", self.klass.label(devid), error)

    async def _begin(self, devid: int, *, strict: bool) -> None:
        # The list and `_again` may both have seen it.
        async with self._beginning.setdefault(devid, asyncio.Lock()):
            if devid in self.served and not self.served[devid].task.done():
                return
            await self._begin_one(devid, strict=strict)

    async def _begin_one(self, devid: int, *, strict: bool) -> None:
        name = self.klass.label(devid)
        try:
            device = await XenbusDevice.open(self.store, self.klass.klass, devid, home=self.home)
        except (PvfrontError, OSError) as error:
            await self._cannot(devid, error, strict)
            return
        try:
            await self._take(device, patient=not strict)
        except (PvfrontError, OSError) as error:
            await device.close()
            await self._cannot(devid, error, strict)
            return
        except BaseException:
            await device.close()
            raise
        if self.refused.pop(devid, None) is not None:
            self._show_refused()
        self._seen_ids.add(devid)
        frontend, trace = self.klass.frontend(device), Trace(self.run_dir, device.name)
        trace.generation = lambda: frontend.generation
        loop = DeviceLoop(
            device,
            frontend,
            on_change=self._phase_changed,
            may_bind=self._suspend.may_bind if self._suspend is not None else None,
            note=trace.note,
        )
        task = asyncio.create_task(self._serve(devid, loop, trace), name=f"serve {name}")
        self.served[devid] = Served(loop, task)
        if (patience := self.klass.patience(device.name)) is not None:
            self._spawn(self._connected_or_back(devid, loop, patience), f"first {name}")

    async def _connected_or_back(self, devid: int, loop: DeviceLoop, patience: float) -> None:
        """Gives a device back that does not become what the kernel had made of it."""
        while True:
            try:
                await loop.until_phase(Phase.CONNECTED, Phase.CLOSED, timeout=patience)
                return
            except HandshakeTimeout:
                if loop.goal is not Goal.PARKED:
                    break
        why = f"not connected within {patience:g} s: {loop.reason or loop.device.view}"
        log.warning("%s: %s: the kernel gets it back", self.klass.label(devid), why)
        await self._finish(devid)
        self.served.pop(devid, None)
        self.refused[devid] = why
        self._show_refused()

    async def _take(self, device: XenbusDevice, *, patient: bool) -> None:
        for pause in TAKE_AGAIN_AFTER if patient else ():
            try:
                await self.klass.take(device, force=self.force)
            except CannotTake:
                await asyncio.sleep(pause)
            else:
                return
        await self.klass.take(device, force=self.force)

    async def _cannot(self, devid: int, error: Exception, strict: bool) -> None:
        if strict:
            raise error
        if self.refused.get(devid) != str(error):
            self.refused[devid] = str(error)
            self._show_refused()
            log.warning("%s: not served: %s", self.klass.label(devid), error)
        await self._pass_on(devid)

    def _show_refused(self) -> None:
        """For `status`: why devices are not served, by number."""
        path = self.run_dir / f"refused-{self.klass.klass}.json"
        with contextlib.suppress(OSError):
            if self.refused:
                write_json(path, {str(devid): why for devid, why in sorted(self.refused.items())})
            else:
                path.unlink(missing_ok=True)

    async def _serve(self, devid: int, loop: DeviceLoop, trace: Trace) -> None:
        try:
            await loop.run()
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("%s: the device loop failed", loop.device.name)
            raise
        finally:
            await loop.device.close()
            trace.close()
        if _is_gone(loop):
            self.klass.forget(loop.device.name)
        # The id may be back already, attached again before the list was read once more.
        with contextlib.suppress(PvfrontError, OSError):
            ids = await Bus(self.store, self.klass.klass, home=self.home).ids()
            self._seen_ids &= set(ids) if loop.goal is Goal.CLOSED else set(ids) - {devid}
        if not self._stop.is_set() and loop.goal is not Goal.CLOSED:
            self._spawn(self._again(devid), f"again {devid}")

    async def _again(self, devid: int) -> None:
        """Serves an id again that was detached and is there once more, as the toolstack made it."""
        if devid in self.served and not self.served[devid].task.done():
            return  # its loop sees to it, and looks here when it ends
        try:
            path = f"{self.home}device/{self.klass.klass}/{devid}/state"
            if self.wanted(devid) and await self.store.read_opt(path) == "1":
                await self._begin(devid, strict=False)
        except (PvfrontError, OSError) as error:
            log.warning("%s: %s", self.klass.label(devid), error)

    def _participants(self) -> Collection[SuspendParticipant]:
        return [SuspendedLoop(s.loop) for s in self.served.values() if not s.task.done()]

    def _status(self) -> str:
        """For `systemctl status`: how many are served, and what is with some of the others."""
        loops = {d: s.loop for d, s in self.served.items() if s.loop.phase is not Phase.CLOSED}
        others = [d for d, loop in sorted(loops.items()) if loop.phase is not Phase.CONNECTED]
        text = f"serving {len(loops) - len(others)} of {len(loops)} devices"
        shown = [f"{self.klass.label(d)} {loops[d].phase.value}" for d in others[:_SHOWN]]
        if len(others) > _SHOWN:
            shown.append(f"{len(others) - _SHOWN} more")
        return f"{text}: {', '.join(shown)}" if shown else text

    def _phase_changed(self, loop: DeviceLoop) -> None:
        if (status := self._status()) != self._said:
            self._said = status
            sd_notify(f"STATUS={status}")
        try:
            save_state(self.run_dir, loop)
        except OSError as error:
            log.warning("%s: its state is not on record: %s", loop.device.name, error)

    async def _show_suspend(self, suspend: SharedSuspend) -> None:
        """Keeps ``/run/pvfront/suspend.json`` what `Suspend.status` says."""
        shown: dict[str, object] = {}
        while True:
            now = suspend.status()
            if not now:  # another service owns suspend, and tells of it
                shown = now
            elif now != shown:
                write_json(self.run_dir / "suspend.json", now)
                if now["stage"] != shown.get("stage"):
                    self._trace.note(Kind.SUSPEND, str(now["stage"]), armed=now["armed"])
                if now["last_refusal"] and now["last_refusal"] != shown.get("last_refusal"):
                    self._trace.note(Kind.SUSPEND, f"refused: {now['last_refusal']}")
                shown = now
            await suspend.until(lambda s: s.status() != shown, _NEVER)  # noqa: B023 - awaited

    # -- questions -------------------------------------------------------------------------

    async def _do_list(self, _: dict[str, Any]) -> dict[str, Any]:
        devices = [state_of(s.loop) for s in self.served.values() if not s.task.done()]
        return {"ok": True, "devices": devices, "refused": self.refused}

    async def _do_release(self, request: dict[str, Any]) -> dict[str, Any]:
        devid = request.get("id")
        if not isinstance(devid, int):
            raise PvfrontError('release wants the "id" of a device, a number')
        served = self.served.get(devid)
        if served is None or served.task.done():
            raise PvfrontError(f"{self.klass.label(devid)}: not served by this supervisor")
        why = await asyncio.to_thread(served.loop.frontend.busy)
        if why is not None:
            raise PvfrontError(
                f"{self.klass.label(devid)}: in use: {why}", hint="end that use first"
            )
        text = await self._finish(devid)
        if served.loop.phase is not Phase.CLOSED:
            raise PvfrontError(text)
        self.served.pop(devid, None)
        return {"ok": True, "text": text}

    async def _do_packets(self, request: dict[str, Any]) -> dict[str, Any]:
        devid = request.get("id")
        if not isinstance(devid, int):
            raise PvfrontError('packets wants the "id" of a device, a number')
        served = self.served.get(devid)
        if served is None or served.task.done() or served.loop.phase is not Phase.CONNECTED:
            raise PvfrontError(f"{self.klass.label(devid)}: it is not connected: no packets")
        return {"ok": True, **await served.loop.frontend.packets()}

    async def _do_statistics(self, request: dict[str, Any]) -> dict[str, Any]:
        served = self.served.get(request.get("id", -1))
        loop = None if served is None or served.task.done() else served.loop
        return {"ok": True, **counters_of(loop)}

    async def _do_upgrade(self, request: dict[str, Any]) -> dict[str, Any]:
        devid = request.get("id")
        if not isinstance(devid, int):
            raise PvfrontError('upgrade wants the "id" of a device, a number')
        return {"ok": True, "text": f"{self.klass.label(devid)}: {await self._upgrade(devid)}"}

    async def _upgrade(self, devid: int) -> str:
        """Replaces a device's worker without a reconnect; PvfrontError: the old one goes on."""
        served = self.served.get(devid)
        name = self.klass.label(devid)
        if served is None or served.task.done():
            raise PvfrontError(f"{name}: not served by this supervisor")
        if served.loop.phase is not Phase.CONNECTED:
            raise PvfrontError(
                f"{name}: only a connected device can be upgraded; it is {served.loop.phase.value}"
            )
        try:
            async with asyncio.timeout(UPGRADE_DEADLINE):
                text = await served.loop.frontend.upgrade()
        except TimeoutError:
            raise PvfrontError(
                f"{name}: not upgraded within {UPGRADE_DEADLINE:.0f} s; it is "
                f"{served.loop.phase.value}"
            ) from None
        self._phase_changed(served.loop)
        return text
