"""A host that claims to have more CPUs than the test machine, and a template that owns up to it.

Sixteen VMs without over-commitment need more cores than a test machine has. So the tool is shown
cores that are not there, and a site template pins every guest CPU to a CPU that is.
"""

from __future__ import annotations

from pathlib import Path

from dgx_kvm_sw.access.files import Root

CORES = 24  # of two threads each
TEMPLATE = "test.xml.j2"

# Everything about the domain is as shipped but for what the test machine cannot do: no KVM, no
# vhost. Sibling threads n and n+1 become the real CPUs 0 and 1.
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
    <emulatorpin cpuset="{{ (domain.emulator_pin | first) % 2 }}"/>
{%- for pin in domain.iothread_pins %}
    <iothreadpin iothread="{{ loop.index }}" cpuset="{{ (pin | first) % 2 }}"/>
{%- endfor %}
{%- endblock %}
"""

HOST_AND_DEFAULTS = f"""\
version: 1
host:
  reserve: {{cpus: 2, memory: 1GiB}}
defaults:
  template: {TEMPLATE}
  memory: 256MiB
  os_disk: 1GiB
"""


def claim(directory: Path) -> Root:
    """Lay out the host below `directory`: one NUMA node, no PCI devices."""
    root = Root(directory)
    cpus = range(2 * CORES)
    memory_kib = 64 << 20
    root.write("/etc/machine-id", "0123456789abcdef0123456789abcdef\n")
    root.write("/etc/dgx-kvm/templates/" + TEMPLATE, _TEMPLATE)
    root.write("/proc/cmdline", "dgx_kvm.mode=kvm\n")
    root.write("/proc/meminfo", f"MemTotal: {memory_kib} kB\n")
    root.write("/proc/cpuinfo", "".join(f"processor\t: {n}\nmodel name\t: test\n\n" for n in cpus))
    root.write("/sys/devices/system/cpu/online", f"0-{cpus[-1]}\n")
    for cpu in cpus:
        siblings = f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        root.write(siblings, f"{cpu - cpu % 2},{cpu - cpu % 2 + 1}\n")
    node = "/sys/devices/system/node/node0"
    root.write(f"{node}/cpulist", f"0-{cpus[-1]}\n")
    root.write(f"{node}/distance", "10\n")
    root.write(f"{node}/meminfo", f"Node 0 MemTotal: {memory_kib} kB\n")
    return root
