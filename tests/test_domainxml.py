"""Domain XML: golden files, and what they must say; back to facts without loss."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from catalogues import add
from hosts import SimulatedHost

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.guest import domainxml
from dgx_kvm_sw.guest.domainxml import LibvirtFeatures
from dgx_kvm_sw.guest.templates import Templates
from dgx_kvm_sw.model.domain import DomainFacts, Hostdev
from dgx_kvm_sw.model.errors import BadFileError, HypervisorError
from dgx_kvm_sw.model.pci import CpuSet, PciAddress
from dgx_kvm_sw.model.spec import Firmware, NetworkKind

Host = Callable[..., SimulatedHost]

GOLDEN = Path(__file__).parent / "data" / "golden"
NEW = LibvirtFeatures(allocation_threads=True, maxphysaddr=True)
OLD = LibvirtFeatures(allocation_threads=False, maxphysaddr=False)
REST = "networks: [{bridge: br0}, {network: default}, {macvtap: eno1}]"
VF = "networks: [{vf: auto, vlan: 100}, {bridge: br0}, {vf: enp134s0f0}], pin: [8]"
SIZES = {"dgx2": (0, 1, 2, 4, 8, 16)}
CASES = [
    f"{name}-{size}"
    for name in ("dgx2", "dgx-a100", "dgx-h100", "dgx-h200", "dgx-b200")
    for size in SIZES.get(name, (0, 1, 2, 4, 8))
] + ["dgx-h100-bios", "dgx-h100-seed", "dgx2-vf"]

Facts = Callable[[str], DomainFacts]


@pytest.fixture
def facts(host: Host) -> Facts:
    """What a case's domain is to be."""

    def of(case: str) -> DomainFacts:
        name, _, size = case.rpartition("-")
        at = host(name, case)
        other = {"bios": "2, firmware: bios", "seed": "1, image: debian-12", "vf": "1"}
        rest = VF if size == "vf" else REST
        add(at.root, "debian-12")
        gpus = other.get(size, size)
        at.declare(
            f"name: vm, gpus: {gpus}, tenant: hr, disks: [{{name: data, size: 1GiB}}], {rest}",
            head="tenants: {hr: {}}\n",
        )
        at.plan()
        (want,) = at.situation.desired
        return want.facts

    return of


@pytest.fixture
def templates(tmp_path: Path) -> Templates:
    return Templates(Root(tmp_path / "nothing"))


@pytest.mark.parametrize("case", CASES)
def test_golden(
    facts: Facts, templates: Templates, request: pytest.FixtureRequest, case: str
) -> None:
    """Nobody reads assertions about XML; a reviewer reads the diff of these files."""
    wanted = facts(case)
    definition = domainxml.render(templates, wanted, NEW)
    xml = definition.xml.replace(wanted.owner.template_digest if wanted.owner else "", "DIGEST")
    file = GOLDEN / f"{case}.xml"
    if request.config.getoption("--regenerate-output"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(xml + "\n", encoding="utf-8")
    assert xml + "\n" == file.read_text(encoding="utf-8")


def source(hostdev: Hostdev) -> PciAddress:
    return hostdev.source


@pytest.mark.parametrize("features", [NEW, OLD])
@pytest.mark.parametrize("case", CASES)
def test_facts_survive_xml(
    facts: Facts, templates: Templates, case: str, features: LibvirtFeatures
) -> None:
    wanted = facts(case)
    definition = domainxml.render(templates, wanted, features)
    assert definition.facts == replace(wanted, hostdevs=tuple(sorted(wanted.hostdevs, key=source)))


@pytest.mark.parametrize("case", CASES)
def test_libvirt_takes_and_keeps_it(facts: Facts, host: Host, case: str) -> None:
    """Defined with VALIDATE and started in libvirt's test driver: the facts come back the same."""
    wanted = facts(case)
    at = host("dgx2", "other")
    definition = domainxml.render(Templates(at.root), wanted, NEW)
    with at.hypervisor() as hypervisor:
        hypervisor.define("vm", definition.xml)
        hypervisor.start("vm", wanted.uuid)
        held = hypervisor.domain("vm")
    assert domainxml.parse(held.inactive) == definition.facts
    assert held.live is not None and domainxml.parse(held.live) == definition.facts


@pytest.mark.commands
@pytest.mark.skipif(
    not (shutil.which("virt-xml-validate") and shutil.which("xmllint")),
    reason="libvirt-clients and libxml2-utils not installed",
)
@pytest.mark.parametrize(
    "case", ["dgx2-16", "dgx2-vf", "dgx-a100-1", "dgx-h100-seed", "dgx-h100-bios"]
)
def test_golden_files_follow_libvirts_schema(case: str) -> None:
    done = subprocess.run(
        ["virt-xml-validate", GOLDEN / f"{case}.xml", "domain"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# -- what the files must say ------------------------------------------------------------------


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest) -> Element:
    return ElementTree.parse(GOLDEN / f"{request.param}.xml").getroot()


def texts(domain: Element, *paths: str) -> list[str | None]:
    return [domain.findtext(path) for path in paths]


def test_nothing_starts_or_survives_by_itself(golden: Element) -> None:
    """Both would start a guest past the preparation of its devices."""
    assert texts(golden, "on_poweroff", "on_reboot", "on_crash") == ["destroy"] * 3
    assert [e.get("enabled") for e in golden.iterfind("pm/*")] == ["no", "no"]


def test_there_is_no_device_that_nobody_needs(golden: Element) -> None:
    tags = {element.tag for element in golden.iterfind("devices/*")}
    allowed = {"disk", "controller", "hostdev", "interface", "serial", "channel", "memballoon"}
    assert tags <= allowed
    assert [e.get("model") for e in golden.iterfind("devices/memballoon")] == ["none"]
    usb = golden.findall("devices/controller[@type='usb']")
    assert [e.get("model") for e in usb] == ["none"]


def test_devices_are_handed_over_by_nobody_but_us(golden: Element) -> None:
    for hostdev in golden.iterfind("devices/hostdev"):
        assert (hostdev.get("mode"), hostdev.get("managed")) == ("subsystem", "no")
        rom, driver = hostdev.find("rom"), hostdev.find("driver")
        assert rom is not None and rom.get("bar") == "off"
        assert driver is not None and driver.get("name") == "vfio"


def test_virtual_functions_are_libvirts_to_set_up() -> None:
    """It sets MAC address and VLAN by the NIC, for which it must be the one that detaches them."""
    golden = ElementTree.parse(GOLDEN / "dgx2-vf.xml").getroot()
    vfs = golden.findall("devices/interface[@type='hostdev']")
    assert [vf.get("managed") for vf in vfs] == ["yes"] * 2
    assert [vf.find("mac") is not None and vf.find("model") is None for vf in vfs] == [True] * 2
    assert [tag.get("id") for vf in vfs for tag in vf.iterfind("vlan/tag")] == ["100"]
    kinds = [interface.get("type") for interface in golden.iterfind("devices/interface")]
    assert kinds == ["hostdev", "bridge", "hostdev"]  # as in the file: MAC addresses go by place


def test_every_vcpu_has_one_cpu_of_its_own(golden: Element) -> None:
    vcpus = int(golden.findtext("vcpu", "0"))
    pins = [pin.get("cpuset", "") for pin in golden.iterfind("cputune/vcpupin")]
    assert len(pins) == len(set(pins)) == vcpus
    assert all(pin.isdecimal() for pin in pins)
    helpers = {pin.get("cpuset") for pin in golden.iterfind("cputune/iothreadpin")}
    helpers |= {pin.get("cpuset") for pin in golden.iterfind("cputune/emulatorpin")}
    (shared,) = helpers
    assert not CpuSet.parse(shared or "").cpus & {int(pin) for pin in pins}
    count = int(golden.findtext("iothreads", "0"))
    assert len(golden.findall("cputune/iothreadpin")) == count >= 1


def test_guest_cores_are_host_cores(golden: Element) -> None:
    """vCPUs 2n and 2n+1 are siblings in the guest; their CPUs are on the host: n and n + half."""
    topology = golden.find("cpu/topology")
    assert topology is not None and topology.get("threads") == "2"
    pins = [int(pin.get("cpuset", "")) for pin in golden.iterfind("cputune/vcpupin")]
    apart = {second - first for first, second in zip(pins[::2], pins[1::2], strict=True)}
    assert len(apart) == 1 and apart <= {48, 112, 128}


def test_memory_is_bound_strictly_cell_by_cell(golden: Element) -> None:
    cells = golden.findall("cpu/numa/cell")
    nodes = golden.findall("numatune/memnode")
    assert [node.get("cellid") for node in nodes] == [cell.get("id") for cell in cells]
    assert {node.get("mode") for node in golden.iterfind("numatune/*")} == {"strict"}
    bound = [node.get("nodeset") for node in nodes]
    whole = golden.find("numatune/memory")
    assert whole is not None and whole.get("nodeset") == ",".join(str(b) for b in bound)
    memory = golden.findtext("memory", "")
    assert sum(int(cell.get("memory", "0")) for cell in cells) == int(memory)
    vcpus = [cpu for cell in cells for cpu in CpuSet.parse(cell.get("cpus", ""))]
    assert vcpus == list(range(int(golden.findtext("vcpu", "0"))))
    if len(cells) > 1:
        assert all(len(cell.findall("distances/sibling")) == len(cells) for cell in cells)


@pytest.mark.parametrize(
    ("case", "queues"),
    [("dgx2-1", 4), ("dgx2-16", 32), ("dgx-h100-1", 8), ("dgx-h100-8", 24), ("dgx-b200-0", 2)],
)
def test_queues_are_one_for_each_vcpu_up_to_the_cap(case: str, queues: int) -> None:
    facts = domainxml.parse((GOLDEN / f"{case}.xml").read_text(encoding="utf-8"))
    found = [disk.queues for disk in facts.disks]
    assert set(found + [interface.queues for interface in facts.interfaces]) == {queues}


def test_a_window_is_opened_for_devices_in_both_places(golden: Element) -> None:
    """pcihole64 is for the tables that QEMU makes, the fw_cfg variable for UEFI's own mind."""
    hole = golden.findtext("devices/controller[@model='pcie-root']/pcihole64")
    qemu = "{http://libvirt.org/schemas/domain/qemu/1.0}"
    arguments = [e.get("value", "") for e in golden.iterfind(f"{qemu}commandline/{qemu}arg")]
    told = [a for a in arguments if "X-PciMmio64Mb" in a]
    os = golden.find("os")
    uefi = os is not None and os.get("firmware") == "efi"
    assert (hole is not None) is (golden.find("devices/hostdev") is not None)
    assert len(told) == (1 if hole and uefi else 0)
    if told and hole:
        assert told[0].endswith(f"string={int(hole) // 1024}")


def test_an_admin_can_reach_the_guest(golden: Element) -> None:
    log, channel = golden.find("devices/serial/log"), golden.find("devices/channel/target")
    assert log is not None and log.get("file") == "/var/log/libvirt/qemu/vm.console.log"
    assert log.get("append") == "on"
    assert channel is not None and channel.get("name") == "org.qemu.guest_agent.0"


def test_no_secret_and_no_host_path_is_in_it(golden: Element) -> None:
    xml = ElementTree.tostring(golden, encoding="unicode")
    assert not re.search(r"passw|secret|/etc/|/home/|/root/|\bkey", xml, re.IGNORECASE)
    files = {e.get("file", "") for e in golden.iter() if e.get("file")}
    ours = ("/var/lib/dgx-kvm/images/", "/var/lib/dgx-kvm/bases/", "/var/log/libvirt/")
    assert all(file.startswith(ours) for file in files)


def test_firmware_is_as_declared() -> None:
    for case, firmware in (("dgx-h100-bios", Firmware.BIOS), ("dgx-h100-2", Firmware.UEFI)):
        xml = (GOLDEN / f"{case}.xml").read_text(encoding="utf-8")
        assert domainxml.parse(xml).firmware is firmware
    assert "secure-boot" in (GOLDEN / "dgx-h100-2.xml").read_text(encoding="utf-8")


def test_an_old_libvirt_is_not_asked_for_what_it_lacks(facts: Facts, templates: Templates) -> None:
    xml = domainxml.render(templates, facts("dgx-h100-1"), OLD).xml
    assert "<maxphysaddr" not in xml
    assert '<allocation mode="immediate"/>' in xml


@pytest.mark.parametrize(
    ("version", "threads", "address"),
    [(8_001_999, False, False), (8_002_000, True, False), (8_007_000, True, True)],
)
def test_what_libvirt_knows_follows_its_version(version: int, threads: bool, address: bool) -> None:
    assert LibvirtFeatures.of(version) == LibvirtFeatures(threads, address)


# -- reading what others wrote ----------------------------------------------------------------


def parsed(inside: str, devices: str = "") -> DomainFacts:
    return domainxml.parse(
        f"<domain type='kvm'><name>x</name><uuid>u</uuid>{inside}<devices>{devices}</devices>"
        "</domain>"
    )


def test_a_bare_domain_has_facts() -> None:
    facts = parsed("")
    assert (facts.owner, facts.vcpus, facts.cells, facts.on_reboot) == (None, 1, (), "restart")
    assert facts.vcpu_pins == (CpuSet.of(()),)


@pytest.mark.parametrize(
    ("unit", "number", "mib"),
    [("KiB", 2048, 2), ("k", 2048, 2), ("MiB", 3, 3), ("GiB", 1, 1024), ("b", 1 << 20, 1),
     ("bytes", 1 << 20, 1), ("MB", 1000, 953), ("TiB", 1, 1 << 20)],
)  # fmt: skip
def test_sizes_have_many_units(unit: str, number: int, mib: int) -> None:
    assert parsed(f"<memory unit='{unit}'>{number}</memory>").memory_mib == mib


def test_huge_pages_without_a_size_are_the_kernels_default() -> None:
    assert parsed("<memoryBacking><hugepages/></memoryBacking>").hugepage_kib == 2048


@pytest.mark.parametrize(
    ("devices", "extra"),
    [
        ("<graphics type='vnc'/>", ("graphics vnc",)),
        ("<hostdev mode='subsystem' type='usb'/>", ("hostdev usb",)),
        ("<input type='mouse' bus='ps2'/><input type='tablet' bus='usb'/>", ("input tablet",)),
        ("<controller type='usb' model='qemu-xhci'/>", ("controller usb",)),
        ("<controller type='usb' model='none'/><memballoon model='none'/>", ()),
        ("<memballoon model='virtio'/>", ("memballoon virtio",)),
        ("<serial type='pty'/><serial type='pty'/>", ("serial pty",)),
    ],
)
def test_devices_that_we_never_print_are_seen(devices: str, extra: tuple[str, ...]) -> None:
    assert parsed("", devices).extra_devices == extra


def test_unbound_cells_and_several_nodes_are_not_taken_for_one() -> None:
    cells = "<cpu><numa><cell id='0' cpus='0' memory='1024'/></numa></cpu>"
    tune = "<numatune><memnode cellid='0' mode='{}' nodeset='{}'/></numatune>"
    assert parsed(cells).cells[0].host_node is None
    assert parsed(cells + tune.format("strict", "0-1")).cells[0].host_node is None
    assert parsed(cells + tune.format("preferred", "1")).cells[0].host_node is None
    assert parsed(cells + tune.format("strict", "1")).cells[0].host_node == 1


@pytest.mark.parametrize(
    ("element", "kind", "source"),
    [
        ("<interface type='bridge'><source bridge='br0'/></interface>", "bridge", "br0"),
        ("<interface type='network'><source network='n'/></interface>", "network", "n"),
        ("<interface type='direct'><source dev='e1'/></interface>", "macvtap", "e1"),
        (
            "<interface type='hostdev'><source><address type='pci' domain='0x0000' bus='0x86'"
            " slot='0x00' function='0x2'/></source></interface>",
            "vf",
            "0000:86:00.2",
        ),
    ],
)
def test_networks_are_read(element: str, kind: str, source: str) -> None:
    (interface,) = parsed("", element).interfaces
    assert (interface.network.kind, interface.network.source) == (NetworkKind(kind), source)


# -- templates of a site ----------------------------------------------------------------------

SITE = '{#- template_api: 1 -#}\n{% extends "dist/domain.xml.j2" %}\n'
RNG = '<rng model="virtio"><backend model="random">/dev/urandom</backend></rng>'


def extra(devices: str) -> str:
    return f"{SITE}{{% block extra_devices %}}{devices}{{% endblock %}}\n"


def test_a_site_may_add_a_device_and_it_is_no_drift(host: Host) -> None:
    at = host("dgx-h100")
    at.template("site.xml.j2", extra(RNG))
    at.declare("name: a, gpus: 1, template: site.xml.j2")
    at.settle()
    assert at.domain("a").facts.extra_devices == ("rng virtio",)
    assert not at.plan().pending


def test_a_site_may_override_a_value_and_it_is_no_drift(host: Host) -> None:
    at = host("dgx-h100")
    at.template("site.xml.j2", SITE + '{% block cpu_model %}mode="host-model"{% endblock %}\n')
    at.declare("name: a, gpus: 1, template: site.xml.j2")
    at.settle()
    assert not at.plan().pending


def test_an_edit_of_a_template_is_a_change_of_its_vms(host: Host) -> None:
    at = host("dgx-h100")
    at.template("site.xml.j2", extra(RNG))
    at.declare("name: a, gpus: 1, template: site.xml.j2", "name: b, gpus: 1")
    at.settle()
    at.template("site.xml.j2", extra(RNG + RNG))
    (row,) = at.plan().vms
    assert row.vm == "a" and {"template", "extra devices"} <= {c.field for c in row.changes}


def test_a_device_that_somebody_added_is_drift(host: Host) -> None:
    at = host("dgx-h100")
    at.declare("name: a, gpus: 1, state: stopped")
    at.settle()
    with at.hypervisor() as hypervisor:
        xml = hypervisor.domain("a").inactive.replace("</devices>", f"{RNG}</devices>")
        hypervisor.define("a", xml)
    (row,) = at.plan().vms
    assert [(c.field, c.old) for c in row.changes] == [("extra devices", "rng virtio")]
    at.settle()
    assert at.domain("a").facts.extra_devices == ()


def test_a_misspelt_element_is_refused_by_libvirt(host: Host) -> None:
    at = host("dgx-h100")
    at.template("site.xml.j2", extra("<grahpics type='vnc'/>"))
    at.declare("name: a, gpus: 1, template: site.xml.j2", "name: b, gpus: 1")
    (failure,) = at.apply().failures
    assert isinstance(failure[1], HypervisorError)
    assert "failed to validate against schema" in failure[1].message
    assert at.state().domain("a") is None and at.domain("b").running


@pytest.mark.parametrize(
    ("text", "words", "line"),
    [
        (SITE + "{% block extra_devices %}\n{{ domain.nmae }}{% endblock %}\n", "nmae", 4),
        (SITE + "{{ lost }}\n{% block extra_devices %}{{ lost }}{% endblock %}", "lost", 4),
        (SITE + "{% block extra_devices %}\n{% if %}{% endif %}{% endblock %}", "Expected", 4),
        (SITE + "{% block extra_devices %}{{ 1 | nofilter }}{% endblock %}", "nofilter", 3),
        (SITE + "{% block extra_devices %}{{ 1 // 0 }}{% endblock %}", "zero", 3),
        (SITE + "{% block extra_devices %}{{ domain.name.foo() }}{% endblock %}", "foo", 3),
        (SITE.replace("domain.xml", "nothing"), "it needs dist/nothing.j2, which is not there", 2),
        (
            SITE + '{% block extra_devices %}{% include ("a" ~ 1) %}{% endblock %}',
            "it needs a1, which is not",
            0,
        ),
        ('{% extends "dist/domain.xml.j2" %}\n', "template_api", 1),
        (SITE.replace("api: 1", "api: 2"), "written for template_api 2, this is 1", 1),
        ("", "template_api", 1),
    ],
)
def test_a_mistake_in_a_template_has_a_file_and_a_line(
    host: Host, text: str, words: str, line: int
) -> None:
    at = host("dgx-h100")
    at.template("site.xml.j2", text)
    at.declare("name: b, gpus: 1", "name: a, gpus: 1, template: site.xml.j2")
    before = at.files()
    with pytest.raises(BadFileError) as caught:
        at.apply()
    (problem,) = caught.value.problems
    assert problem.file == str(at.root.path("/etc/dgx-kvm/templates/site.xml.j2"))
    assert words in problem.message
    assert problem.line == line
    assert at.files() == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (extra("<open>"), "its output is not XML: mismatched tag"),
        (extra("&nbsp;"), "its output is not XML"),
        ('{#- template_api: 1 -#}\n<domain><name>x</name></domain>', "does not print the name"),
        ("{#- template_api: 1 -#}\n<domain/>", "does not print the name"),
        ("{#- template_api: 1 -#}\n", "its output is not XML"),
        (extra("<hostdev type='pci'><address bus='x'/></hostdev>"), "not a domain"),
        ('{#- template_api: 1 -#}\n{% extends "site.xml.j2" %}', "itself"),
    ],
)  # fmt: skip
def test_a_template_that_makes_no_domain_is_named(host: Host, text: str, words: str) -> None:
    at = host("dgx-h100")
    at.template("site.xml.j2", text)
    at.declare("name: a, gpus: 1, template: site.xml.j2")
    before = at.files()
    with pytest.raises(BadFileError) as caught:
        at.apply()
    assert words in caught.value.message
    assert str(at.root.path("/etc/dgx-kvm/templates/site.xml.j2")) in caught.value.message
    assert at.files() == before


def test_what_the_admin_writes_is_escaped(facts: Facts, templates: Templates) -> None:
    odd = replace(facts("dgx-b200-0"), disks=())
    assert odd.owner is not None
    odd = replace(odd, owner=replace(odd.owner, tenant="a<b>&\"c'"))
    assert domainxml.render(templates, odd, NEW).facts == odd


def test_metadata_is_what_the_template_prints(facts: Facts, templates: Templates) -> None:
    wanted = facts("dgx-b200-0")
    assert wanted.owner is not None
    element, prefix, namespace = domainxml.metadata(wanted.owner)
    wrapped = element.replace("<vm", f'<vm xmlns="{namespace}"')
    assert parsed(f"<metadata>{wrapped}</metadata>").owner == wanted.owner
    assert prefix == "dgx-kvm"
