"""A host that claims to have more CPUs than the test machine, and a template that owns up to it.

Sixteen VMs without over-commitment need more cores than a test machine has. So the tool is shown
cores that are not there, and a site template pins every guest CPU to a CPU that is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.decide.plan import Intent
from dgx_kvm_sw.execute import Outcome, Power, execute, locked_site
from dgx_kvm_sw.model.actions import Plan
from dgx_kvm_sw.reconcile import SPEC_FILE, Site, gather
from integration.private_libvirtd import BRIDGE, Libvirtd

CORES = 24  # of two threads each
TEMPLATE = "test.xml.j2"

# Pulls the plug at once: guests without an OS hear no ACPI.
PULL_THE_PLUG = Power(timeout=0, force=True)

# A domain as shipped, but for what the test machine cannot do: no KVM, no vhost. Sibling threads
# become the real CPUs 0 and 1, and all helper threads CPU 0, which shows that they are pinned.
_TEMPLATE = """\
{#- template_api: 1 -#}
{% extends "dist/domain.xml.j2" %}
{% block type %}qemu{% endblock %}
{% block features %}{% endblock %}
{% block cpu_model %}mode="maximum"{% endblock %}
{% block cpu_details %}{% endblock %}
{% block network_backend %}{% endblock %}
{% block cputune %}
{%- for pin in domain.vcpu_pins %}
    <vcpupin vcpu="{{ loop.index0 }}" cpuset="{{ (pin | first) % 2 }}"/>
{%- endfor %}
    <emulatorpin cpuset="0"/>
{%- for pin in domain.iothread_pins %}
    <iothreadpin iothread="{{ loop.index }}" cpuset="0"/>
{%- endfor %}
{%- endblock %}
"""

_HOST_AND_DEFAULTS = f"""\
version: 1
host:
  reserve: {{cpus: 2, memory: 1GiB}}
defaults:
  template: {TEMPLATE}
  memory: 256MiB
  os_disk: 1GiB
  networks: [{{bridge: {BRIDGE}}}]
vms:
"""


def claim(root: Root) -> None:
    """Lay out the host below `root`: one NUMA node, no PCI devices."""
    cpus = range(2 * CORES)
    memory_kib = 64 << 20
    files = {
        "/etc/machine-id": "0123456789abcdef0123456789abcdef",
        f"/etc/dgx-kvm/templates/{TEMPLATE}": _TEMPLATE,
        "/proc/cmdline": "dgx_kvm.mode=kvm",
        "/sys/devices/system/node/node0/cpulist": f"0-{cpus[-1]}",
        "/sys/devices/system/node/node0/distance": "10",
        "/sys/devices/system/node/node0/meminfo": f"Node 0 MemTotal: {memory_kib} kB",
    }
    for cpu in cpus:
        folder = f"/sys/devices/system/cpu/cpu{cpu}/topology"
        files[f"{folder}/thread_siblings_list"] = f"{cpu & ~1},{cpu | 1}"
    for path, text in files.items():
        root.write(path, f"{text}\n", sync=False)


@dataclass(frozen=True)
class ClaimedHost:
    """What an operator does on it: edit the file, look, apply."""

    libvirtd: Libvirtd

    @property
    def site(self) -> Site:
        return Site(self.libvirtd.root, uri=self.libvirtd.uri)

    def declare(self, vms: Iterable[str]) -> None:
        """Write vms.yaml; each of `vms` is the inside of a mapping: "name: a, gpus: 0"."""
        lines = "".join(f"- {{gpus: 0, {vm}}}\n" for vm in vms)
        self.site.root.write(SPEC_FILE, _HOST_AND_DEFAULTS + lines)

    @staticmethod
    def intent(*flags: str) -> Intent:
        known = {"--restart": "restart", "--prune": "prune", "--delete-disks": "delete_disks"}
        return Intent(**{known[flag]: True for flag in flags})

    def plan(self, *flags: str) -> Plan:
        intent = self.intent(*flags)
        with self.site.hypervisor() as hypervisor:
            return gather(self.site, hypervisor, intent).plan(intent)

    def apply(self, *flags: str) -> Outcome:
        """Do what `dgx-kvm apply FLAGS` does; the test fails when an action does."""
        intent = self.intent(*flags)
        with locked_site(self.site, "apply"), self.site.hypervisor() as hypervisor:
            found = gather(self.site, hypervisor, intent)
            plan = found.plan(intent)
            assert not plan.unplaceable, plan.unplaceable
            outcome = execute(
                self.site,
                hypervisor,
                found.platform,
                plan.actions,
                found.definitions,
                found.seeds,
                power=PULL_THE_PLUG,
            )
        assert not outcome.failures, [error.message for _, error in outcome.failures]
        return outcome

    def reach(self, *vms: str) -> None:
        """Declare exactly these VMs and make it so, whatever an earlier test has left."""
        self.declare(vms)
        self.apply("--restart", "--prune", "--delete-disks")
        assert not self.plan().actions
