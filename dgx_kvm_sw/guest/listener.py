"""A connection to libvirt that hears what happens to domains; only the watcher has one."""

from __future__ import annotations

import contextlib
import json
import threading
from queue import Empty, SimpleQueue
from typing import Any

import libvirt
import libvirt_qemu

from dgx_kvm_sw.guest.hypervisor import Hypervisor, explained
from dgx_kvm_sw.model.errors import HypervisorError
from dgx_kvm_sw.model.events import DomainEvent, EventKind


class Listener(Hypervisor):
    """A connection that also hears what happens to domains, from its beginning on.

    A thread of its own runs libvirt's event loop, for as long as the process lives: it also
    answers libvirtd when that asks whether we are still there.
    """

    def __init__(self, uri: str) -> None:
        libvirt.virEventRegisterDefaultImpl()  # libvirt wants it before the connection
        super().__init__(uri)
        self._heard: SimpleQueue[DomainEvent | None] = SimpleQueue()  # None: no connection more
        threading.Thread(target=self._run, name="libvirt events", daemon=True).start()
        with explained("tell what happens to its domains"):
            self._connection.registerCloseCallback(lambda *_: self._heard.put(None), None)
            # Not by libvirt's own events: none of them says why QEMU ends. To hear QEMU's does
            # not taint a domain, as to command its monitor would.
            libvirt_qemu.qemuMonitorEventRegister(
                self._connection, None, "SHUTDOWN", self._on_shutdown, None
            )
            self._connection.domainEventRegisterAny(
                None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle, None
            )

    def wait(self) -> tuple[DomainEvent, ...]:
        """Return what has been heard since the last time, in its order; wait for something.

        Raises HypervisorError when libvirt has ended.
        """
        heard = [self._heard.get()]
        with contextlib.suppress(Empty):
            while True:
                heard.append(self._heard.get_nowait())
        if None in heard:
            raise HypervisorError("libvirt has closed the connection")
        return tuple(event for event in heard if event)

    def _run(self) -> None:
        try:
            while True:
                libvirt.virEventRunDefaultImpl()
        finally:
            self._heard.put(None)

    def _on_shutdown(
        self, _c: Any, domain: Any, _e: str, _s: int, _us: int, details: str | None, _o: None
    ) -> None:
        try:
            reason = str(json.loads(details or "{}").get("reason", ""))
        except (ValueError, AttributeError):
            reason = ""
        self._put(EventKind.ENDING, domain, reason)

    def _on_lifecycle(self, _c: Any, domain: Any, event: int, detail: int, _o: None) -> None:
        if event == libvirt.VIR_DOMAIN_EVENT_STARTED:
            self._put(EventKind.STARTED, domain)
        elif event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            orderly = detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN
            self._put(EventKind.OFF, domain, "shutdown" if orderly else "")

    def _put(self, kind: EventKind, domain: Any, reason: str = "") -> None:
        self._heard.put(DomainEvent(kind, domain.name(), domain.UUIDString(), reason))
