"""The picture of the boards: which VM holds which GPU, NVSwitch, NIC, drive, CPU and memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dgx_kvm_sw.cli.faults import kept_by_host
from dgx_kvm_sw.cli.holders import FOREIGN, FREE, Held, Holders, NodeUse
from dgx_kvm_sw.cli.output import counted
from dgx_kvm_sw.cli.picture import BLANK, GAP, Line, Span, bar, beside, flowed, line
from dgx_kvm_sw.decide.devices import distance
from dgx_kvm_sw.model.health import DeviceState
from dgx_kvm_sw.model.pci import PciDevice
from dgx_kvm_sw.model.topology import Gpu
from dgx_kvm_sw.reconcile import Situation

SIGN_FREE, SIGN_HOST, SIGN_BAD, SIGN_SLOW = "·", "▒", "!", "~"
_LABEL = 9  # columns of the words at the left: "NVSwitch "
_FREE_TEXT = 13  # columns of the words right of a bar: "1024 GiB free"
_SHORTEST_BAR = 12
_SAME_SWITCH = 2  # PCIe hops between two devices of one switch
_ROWS = (
    "title", "gpu", "cell", "nic", "NVSwitch", "NICs", "VFs", "drives", "host", "CPUs", "memory"
)  # fmt: skip


@dataclass(frozen=True)
class _Group:
    """GPUs of one PCIe switch and the NICs that are nearest to them."""

    gpus: tuple[Gpu, ...]
    nics: tuple[PciDevice, ...]


@dataclass(frozen=True)
class _Panel:
    """One NUMA node as it will be drawn."""

    title: str
    use: NodeUse
    groups: tuple[_Group, ...]
    switches: tuple[PciDevice, ...]
    nics: tuple[PciDevice, ...]  # that are near no GPU
    vfs: tuple[PciDevice, ...]
    drives: tuple[PciDevice, ...]
    host: str  # what the host keeps, in words


@dataclass(frozen=True)
class Signs:
    """How holders and states are written in a picture."""

    situation: Situation
    holders: Holders

    def of(self, held: Held | None) -> Span:
        """The sign of a holder: the host, nobody, or a VM's letter, small while not in use."""
        if held is None:
            return Span(SIGN_HOST, "quiet")
        if held == FREE:
            return Span(SIGN_FREE, "quiet")
        letter = self.holders.letter(held.vm)
        if letter == FOREIGN:
            return Span(letter, "foreign")
        number = list(self.holders.letters).index(held.vm)
        if held.in_use:
            return Span(letter, f"vm{number}")
        return Span(letter.lower(), f"off{number}")

    def device(self, pci: PciDevice) -> Span:
        held = self.holders.devices.get(pci.address)
        if held is None and _kept(self.situation, pci):
            return self.of(None)
        if held is None and not self.situation.health.usable(pci.address):
            return Span(SIGN_BAD, "bad")
        return self.of(held or FREE)

    def remark(self, pci: PciDevice) -> Span:
        """What is said besides the holder: out of use, or slower than it should be."""
        state = self.situation.health.of(pci.address).state
        if state is DeviceState.OK or self.device(pci).text in (SIGN_BAD, SIGN_HOST):
            return Span(" ")
        slow = state is DeviceState.DEGRADED
        return Span(SIGN_SLOW, "warn") if slow else Span(SIGN_BAD, "bad")


def boards(situation: Situation, held: Holders, width: int) -> list[Line]:
    """Draw all NUMA nodes, as many side by side as `width` allows, then what the signs mean."""
    signs = Signs(situation, held)
    panels = [_panel(situation, use) for use in _in_gpu_order(situation, held.nodes)]
    if not panels:
        return []
    with_gpus = [panel for panel in panels if panel.groups]
    cell, columns = _layout(with_gpus or panels, width)
    room = (width - GAP * (columns - 1)) // columns
    widths = min(room, max(_widest(panel, cell) for panel in panels))
    lines: list[Line] = []
    for part in (with_gpus, [panel for panel in panels if not panel.groups]):
        for start in range(0, len(part), columns):
            drawn = [_drawn(panel, signs, cell, widths) for panel in part[start : start + columns]]
            lines += [*([BLANK] if lines else []), *beside(_aligned(drawn), widths)]
        if part is with_gpus:
            lines += _shared_switches(situation, signs)
    return [*lines, BLANK, *_legend(lines, width)]


def _kept(situation: Situation, pci: PciDevice) -> bool:
    return kept_by_host(situation.topology, situation.platform, situation.health, pci)


def _in_gpu_order(situation: Situation, nodes: Iterable[NodeUse]) -> list[NodeUse]:
    """Nodes in the order of their first GPU, those without GPUs last."""
    first: dict[int, int] = {}
    for gpu in situation.topology.gpus:
        first.setdefault(situation.topology.node(gpu.pci.numa_node).id, gpu.index)
    last = len(situation.topology.gpus)
    return sorted(nodes, key=lambda use: (first.get(use.node.id, last), use.node.id))


def _layout(panels: list[_Panel], width: int) -> tuple[int, int]:
    """Choose the columns of a GPU's cell and the number of panels side by side."""
    choices = []
    for cell in (3, 2):
        need = max(_LABEL + max(_groups_width(p, cell), _bar_width(0)) for p in panels)
        fitting = max(1, min(len(panels), (width + GAP) // (need + GAP)))
        rows = -(-len(panels) // fitting)
        choices.append((need > width, rows, -cell, -(-len(panels) // rows)))
    _, _, cell, columns = min(choices)
    return -cell, columns


def _widest(panel: _Panel, cell: int) -> int:
    return _LABEL + max(_groups_width(panel, cell), _bar_width(len(panel.use.node.cores)))


def _bar_width(cells: int) -> int:
    return max(cells, _SHORTEST_BAR) + 1 + _FREE_TEXT


# -- what is on a node -------------------------------------------------------------------------


def _panel(situation: Situation, use: NodeUse) -> _Panel:
    topology = situation.topology

    def here(pci: PciDevice) -> bool:
        return topology.node(pci.numa_node).id == use.node.id

    gpus = [gpu for gpu in topology.gpus if here(gpu.pci)]
    nics = [nic.pci for nic in topology.nics if here(nic.pci)]
    drives = [drive.pci for drive in topology.drives if here(drive.pci)]
    free_nics = [pci for pci in nics if not _kept(situation, pci)]
    free_drives = [pci for pci in drives if not _kept(situation, pci)]
    groups = _groups(situation, gpus, free_nics)
    grouped = {nic.address for group in groups for nic in group.nics}
    counts = ((len(drives) - len(free_drives), "drive"), (len(nics) - len(free_nics), "NIC"))
    return _Panel(
        title=_title(situation, use, gpus),
        use=use,
        groups=groups,
        switches=tuple(
            switch.pci
            for switch in topology.nvswitches
            if _node_of_board(situation, switch.board) == use.node.id
        ),
        nics=tuple(pci for pci in free_nics if pci.address not in grouped),
        vfs=tuple(vf.pci for vf in topology.vfs if here(vf.pci)),
        drives=tuple(free_drives),
        host=", ".join(counted(count, kind) for count, kind in counts if count),
    )


def _title(situation: Situation, use: NodeUse, gpus: list[Gpu]) -> str:
    title = f"NUMA node {use.node.id}"
    found = {gpu.board for gpu in gpus}
    if situation.platform.boards > 1 and len(found) == 1:
        return f"board {found.pop()}, {title}"
    if not gpus and use.serves is not None:
        return f"{title}, serves node {use.serves}"
    return title


def _node_of_board(situation: Situation, board: int) -> int | None:
    """The node of all GPUs of a board; None where they are on several."""
    topology = situation.topology
    nodes = {topology.node(gpu.pci.numa_node).id for gpu in topology.gpus if gpu.board == board}
    return nodes.pop() if len(nodes) == 1 else None


def _groups(situation: Situation, gpus: list[Gpu], nics: list[PciDevice]) -> tuple[_Group, ...]:
    def hops(one: PciDevice, other: PciDevice) -> int:
        return distance(situation.topology, one, other)

    together: list[list[Gpu]] = []
    for gpu in gpus:
        if together and hops(together[-1][0].pci, gpu.pci) <= _SAME_SWITCH:
            together[-1].append(gpu)
        else:
            together.append([gpu])
    beside_group: list[list[PciDevice]] = [[] for _ in together]
    for nic in nics:
        far = [min(hops(gpu.pci, nic) for gpu in group) for group in together]
        # Of groups that are equally near, each gets its NIC before one gets a second.
        best = min(range(len(far)), key=lambda i: (far[i], len(beside_group[i])), default=None)
        if best is not None and any(_share_bridge(gpu.pci, nic) for gpu in together[best]):
            beside_group[best].append(nic)
    pairs = zip(together, beside_group, strict=True)
    return tuple(_Group(tuple(group), tuple(near)) for group, near in pairs)


def _share_bridge(one: PciDevice, other: PciDevice) -> bool:
    return bool(one.upstream and other.upstream and one.upstream[0] == other.upstream[0])


# -- drawing -----------------------------------------------------------------------------------


def _drawn(panel: _Panel, signs: Signs, cell: int, width: int) -> dict[str, Line]:
    """The lines of a panel by what they are, so that neighbours can be aligned."""
    rows: dict[str, Line] = {}
    title = f"── {panel.title} "
    rows["title"] = line(Span(title + "─" * (width - len(title)), "heading"))
    if panel.groups:
        gap = " " if cell > 2 else ""
        drawn = [_drawn_group(group, signs, cell) for group in panel.groups]
        for number, (key, label) in enumerate((("gpu", "GPU"), ("cell", ""), ("nic", "NIC"))):
            row = line(f"{label:{_LABEL}}")
            for position, group in enumerate(drawn):
                row = row + (gap if position else "") + group[number]
            rows[key] = row
    devices = {
        "NVSwitch": panel.switches,
        "NICs": panel.nics,
        "VFs": panel.vfs,
        "drives": panel.drives,
    }
    for label, pcis in devices.items():
        if pcis:
            rows[label] = line(f"{label:{_LABEL}}", _signs_of(pcis, signs))
    if panel.host:
        rows["host"] = line(f"{'host':{_LABEL}}", Span(panel.host, "quiet"))
    use = panel.use
    cells = width - _LABEL - _FREE_TEXT - 1
    rows["CPUs"] = _bar("CPUs", use.threads, f"{use.free_threads} free", signs, cells)
    free = f"{use.free_memory_mib // 1024} GiB free"
    rows["memory"] = _bar("memory", use.memory_mib, free, signs, cells)
    return rows


def _bar(
    label: str,
    parts: tuple[tuple[Held | None, int], ...],
    free: str,
    signs: Signs,
    cells: int,
) -> Line:
    spans = [(signs.of(held), amount) for held, amount in parts]
    drawn = bar([(span.text, span.style, amount) for span, amount in spans], cells)
    return line(f"{label:{_LABEL}}", drawn, " ", free)


def _signs_of(devices: Iterable[PciDevice], signs: Signs) -> Line:
    row = BLANK
    for number, pci in enumerate(devices):
        remark = signs.remark(pci)
        row = row + (" " if number else "") + signs.device(pci)
        row = row + remark if remark.text.strip() else row
    return row


def _groups_width(panel: _Panel, cell: int) -> int:
    gap = 1 if cell > 2 else 0
    widths = [len(group.gpus) * (cell + 1) + 1 for group in panel.groups]
    return sum(widths) + gap * (len(widths) - 1)


def _drawn_group(group: _Group, signs: Signs, cell: int) -> tuple[Line, Line, Line]:
    """A PCIe switch as a box: GPU numbers on top, their holders inside, its NICs below."""
    side = "─" if cell > 2 else ""
    numbers = "┬".join(f"{side}{gpu.index}".ljust(cell, "─") for gpu in group.gpus)
    inside = line(Span("│", "quiet"))
    for gpu in group.gpus:
        sign, remark = signs.device(gpu.pci), signs.remark(gpu.pci)
        start = Span(" " * (cell - 2), sign.style if sign.style.startswith("vm") else "")
        end = remark if remark.text.strip() else Span(" ", start.style)
        inside = inside + start + sign + end + Span("│", "quiet")
    room = len(numbers)
    nics = _signs_of(group.nics, signs)
    if nics.width + 2 <= room:
        nics = line(" ", nics, " ") if group.nics else nics
    left = (room - nics.width) // 2
    right = room - nics.width - left
    bottom = line(Span("└" + "─" * left, "quiet"), nics.cut(room), Span("─" * right + "┘", "quiet"))
    return line(Span(f"┌{numbers}┐", "quiet")), inside, bottom


def _aligned(panels: list[dict[str, Line]]) -> list[list[Line]]:
    """Give all panels of a row the same lines, so that equal things stand side by side."""
    used = [key for key in _ROWS if any(key in panel for panel in panels)]
    return [[panel.get(key, BLANK) for key in used] for panel in panels]


def _shared_switches(situation: Situation, signs: Signs) -> list[Line]:
    """NVSwitches of boards whose GPUs are on several NUMA nodes."""
    lines = []
    boards = sorted({switch.board for switch in situation.topology.nvswitches})
    for board in (each for each in boards if _node_of_board(situation, each) is None):
        switches = [s.pci for s in situation.topology.nvswitches if s.board == board]
        label = f"NVSwitches of board {board} " if len(boards) > 1 else f"{'NVSwitch':{_LABEL}}"
        lines.append(line(label, _signs_of(switches, signs)))
    return [BLANK, *lines] if lines else []


def _legend(lines: list[Line], width: int) -> list[Line]:
    spans = [span for each in lines for span in each.spans]
    styles = {span.style for span in spans}
    waiting = next((span.text[0] for span in spans if span.style.startswith("off")), "")
    meanings = (
        (SIGN_FREE, "free", True),
        (SIGN_HOST, "host", True),
        (waiting, f"kept for {waiting.upper()}'s next start", bool(waiting)),
        (FOREIGN, "not ours", "foreign" in styles),
        (SIGN_BAD, "out of use", "bad" in styles),
        (SIGN_SLOW, "degraded", "warn" in styles),
    )
    # Lines break between the meanings, not inside them.
    words = [(f"{sign} {meaning}", "quiet") for sign, meaning, used in meanings if used]
    return flowed(words, width)
