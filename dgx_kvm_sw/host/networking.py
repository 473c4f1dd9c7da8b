"""The host's own network, as far as virtual ones must mind it."""

from __future__ import annotations

from dgx_kvm_sw.access.files import Root


def routes(root: Root) -> tuple[str, ...]:
    """IPv4 destinations of the main table, "10.0.0.0/8"; not the default route."""
    found = []
    for line in root.read("/proc/net/route", "").splitlines()[1:]:
        fields = line.split()
        destination, mask = bytes.fromhex(fields[1]), bytes.fromhex(fields[7])
        bits = sum(byte.bit_count() for byte in mask)
        if bits:  # the kernel prints both in the byte order of the machine
            found.append(f"{'.'.join(str(byte) for byte in reversed(destination))}/{bits}")
    return tuple(found)


def filtering_bridges(root: Root) -> tuple[str, ...]:
    """Bridges that keep VLANs apart by themselves."""
    return tuple(
        name
        for name in root.names("/sys/class/net")
        if root.read(f"/sys/class/net/{name}/bridge/vlan_filtering", "0") == "1"
    )
