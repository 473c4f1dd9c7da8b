"""What vms.yaml says about a guest's first boot: keys, addresses, mounts, user data, and mistakes.

Nothing here repeats what a file holds: a key may be the wrong half, user data may be secret.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.guest.document import Document, Path
from dgx_kvm_sw.guest.speccheck import vm_entries
from dgx_kvm_sw.guest.yamlsource import LOADER, MAX_BYTES
from dgx_kvm_sw.model.errors import Problem
from dgx_kvm_sw.model.spec import Addressing, FirstBoot, NetworkKind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ipaddress import IPv4Interface, IPv6Interface

MIME = re.compile(r"(content-type|mime-version)\s*:", re.IGNORECASE)
CLOUD_CONFIG = "#cloud-config"

_MAX_DEPTH = 100  # of a cloud-config

# Users and groups that a guest has before its first boot: useradd would refuse to make them, and
# nobody could log in. The first are those of Debian's base-passwd, which Ubuntu has as well; then
# come those of the packages in images.
_SYSTEM_NAMES = """
    _apt adm audio backup bin cdrom daemon dialout dip disk fax floppy games irc kmem list lp mail
    man news nobody nogroup operator plugdev proxy sasl shadow src staff sudo sync sys tape tty
    users utmp uucp video voice www-data
    _ssh crontab docker input kvm lxd messagebus netdev nvidia-persistenced polkitd render sgx sshd
    ssl-cert syslog uuidd
"""
_SYSTEM_PREFIX = "systemd-"

_STARTS = (CLOUD_CONFIG, "#!", "#include", "#cloud-boothook", "#part-handler", "## template: jinja")
_PRIVATE = "PRIVATE KEY--"
_KEY = re.compile(
    r"(?:^|\s)(ssh-(?:ed25519|rsa)|ecdsa-sha2-nistp(?:256|384|521)"
    r"|sk-(?:ssh-ed25519|ecdsa-sha2-nistp256)@openssh\.com)\s+([A-Za-z0-9+/]+={0,2})(?:\s|$)"
)


class Files:
    """The files that vms.yaml names, each read once."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._read: dict[str, str] = {}
        self._checked: dict[str, tuple[Problem, ...]] = {}
        self.faults: dict[str, str] = {}  # why one cannot be used
        self.withheld: set[str] = set()  # those that are not for who runs us

    def text(self, path: str) -> str:
        """Return a file's text; "" for one that cannot be used."""
        if path not in self._read:
            self._read[path] = ""
            try:
                self._read[path] = self._contents(path)
            except PermissionError:
                self.withheld.add(path)  # who only looks need not see it
            except UnicodeDecodeError:
                self.faults[path] = "is not UTF-8 text"
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                self.faults[path] = f"cannot be read: {reason.lower()}"
        return self._read[path]

    def config_problems(self, path: str) -> tuple[Problem, ...]:
        """What is wrong with the cloud-config in a file: many VMs may name a large one."""
        if path not in self._checked:
            self._checked[path] = tuple(_bad_cloud_config(path, self.text(path)))
        return self._checked[path]

    def _contents(self, path: str) -> str:
        # A pipe that nobody writes to would be waited for without end.
        descriptor = os.open(self._root.path(path), os.O_RDONLY | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            self.faults[path] = "is not a regular file"
            return ""
        with open(descriptor, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            self.faults[path] = f"is larger than {MAX_BYTES >> 20} MiB"
            return ""
        return data.decode("utf-8-sig")  # as editors on Windows begin a file


def first_boot(settings: Mapping[str, Any], files: Files) -> FirstBoot:
    """Return what a VM's settings, known to be right, say about its first boot."""
    keys: list[str] = []
    for entry in settings["ssh_keys"]:
        keys += [line for _, line in _lines(files.text(entry))] if _is_path(entry) else [entry]
    path = settings["user_data"]
    return FirstBoot(
        user=settings["user"],
        ssh_keys=tuple(dict.fromkeys(key.strip() for key in keys)),
        addressing=tuple(_addressing(network) for network in settings["networks"]),
        user_data=files.text(path) if path else "",
        complete=not files.withheld & {path, *settings["ssh_keys"]},
    )


def _addressing(network: Mapping[str, Any]) -> Addressing:
    address = network.get("address", "dhcp")
    addresses = () if address == "dhcp" else _listed(address)
    return Addressing(addresses, _listed(network.get("gateway")), _listed(network.get("dns")))


def _listed(value: Any) -> tuple[str, ...]:
    """A value or a list of values, as a tuple of what is text in it."""
    values = value if isinstance(value, list) else [value]
    return tuple(each for each in values if isinstance(each, str))


# -- mistakes -----------------------------------------------------------------------------------


def mistakes(documents: Sequence[Document], files: Files) -> Iterator[Problem]:
    """Yield every mistake in what is said about first boots; trusts no value's type."""
    sections: list[tuple[Document, Path]] = [(documents[0], ("defaults",))]
    for document in documents:
        count = len(document.sequence("vms"))
        sections += [(document, ("vms", index)) for index in range(count)]
    for document, path in sections:
        yield from _bad_user(document, path)
        yield from _bad_keys(document, path, files)
        yield from _bad_user_data(document, path, files)
        for index in range(len(document.sequence(*path, "networks"))):
            yield from _bad_network(document, (*path, "networks", index))
    yield from _repeated_addresses(documents)


def _bad_user(document: Document, path: Path) -> Iterator[Problem]:
    user = document.get(*path, "user")
    if isinstance(user, str) and (user in _SYSTEM_NAMES.split() or user.startswith(_SYSTEM_PREFIX)):
        message = f"{user} is a user or group of the system's own"
        yield document.problem((*path, "user"), message, "choose another, like dgx")


def _bad_keys(document: Document, path: Path, files: Files) -> Iterator[Problem]:
    for index, entry in enumerate(document.sequence(*path, "ssh_keys")):
        if not isinstance(entry, str):
            continue
        place = (*path, "ssh_keys", index)
        if not _is_path(entry):
            if fault := _key_fault(entry):
                yield document.problem(place, *fault)
            continue
        text = files.text(entry)
        if entry in files.faults:
            yield document.problem(place, f"{entry} {files.faults[entry]}")
        elif _PRIVATE in text:
            yield document.problem(place, f"{entry} {_key_fault(text)[0]}", _key_fault(text)[1])
        elif not any(_lines(text)) and entry not in files.withheld:
            yield document.problem(place, f"{entry} holds no key")
        else:
            for number, line in _lines(text):
                if fault := _key_fault(line):
                    yield Problem(entry, number, 1, number, 2, "", *fault)


def _key_fault(text: str) -> tuple[str, ...]:
    """Say what is wrong with a public key and what to do; () for one that is right."""
    if _PRIVATE in text:
        return "is a private key, which stays with its owner", "give the file that ends in .pub"
    found = _KEY.search(text)
    if not found or len(text.strip().splitlines()) > 1:
        return "is not a public key of SSH", "one looks like: ssh-ed25519 AAAA... name@host"
    try:
        blob = base64.b64decode(found[2], validate=True)
    except binascii.Error:
        blob = b""
    if not _is_whole(blob, found[1].encode()):
        return "is a public key that was cut off or changed", "copy the whole line again"
    return ()


def _is_whole(blob: bytes, kind: bytes) -> bool:
    """A key is a sequence of fields, each after its length; the first names its kind."""
    fields, rest = [], blob
    while len(rest) >= 4:
        length = int.from_bytes(rest[:4], "big")
        fields.append(rest[4 : 4 + length])
        if len(fields[-1]) != length:
            return False
        rest = rest[4 + length :]
    return not rest and len(fields) > 1 and fields[0] == kind


def _bad_user_data(document: Document, path: Path, files: Files) -> Iterator[Problem]:
    name = document.get(*path, "user_data")
    if not (isinstance(name, str) and _is_path(name)):
        return
    place = (*path, "user_data")
    text = files.text(name)
    if name in files.faults:
        yield document.problem(place, f"{name} {files.faults[name]}")
    elif name in files.withheld or MIME.match(text):
        pass
    elif not text.startswith(_STARTS):
        message = f"{name} does not begin as user data does"
        yield document.problem(place, message, f"its first line is {CLOUD_CONFIG} or #!/bin/sh")
    elif text.split(maxsplit=1)[0] == CLOUD_CONFIG:  # not #cloud-config-archive, which is a list
        yield from files.config_problems(name)


def _bad_cloud_config(name: str, text: str) -> Iterator[Problem]:
    import yaml

    try:
        if _is_deep(text):  # else the loader would end the whole process
            yield Problem(name, 0, 0, 0, 0, "", "is nested too deeply")
            return
        value = yaml.load(text, LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        yield Problem(name, line, column, line, column + 1, "", "is not YAML")
    except (yaml.YAMLError, ValueError):
        yield Problem(name, 0, 0, 0, 0, "", "is not YAML")
    else:
        if not isinstance(value, dict):
            yield Problem(name, 0, 0, 0, 0, "", "is not a mapping, as cloud-config is")


def _is_deep(text: str) -> bool:
    import yaml

    depth = 0
    for event in yaml.parse(text, LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            return True
    return False


def _bad_network(document: Document, path: Path) -> Iterator[Problem]:
    """Addresses that are none, and gateways that are out of reach."""
    import ipaddress

    network = document.mapping(*path)
    own = {key: _listed(network.get(key)) for key in ("address", "gateway", "dns")}
    interfaces = []
    for text in own["address"]:
        if text == "dhcp":
            continue
        try:
            interfaces.append(ipaddress.ip_interface(text))
        except ValueError:
            yield document.problem((*path, "address"), f"{text} is not an address")
            continue
        if not _is_for_a_host(interfaces[-1]):
            message = f"{text} is an address that no machine can have"
            yield document.problem((*path, "address"), message, "give one of a host in its network")
    for key in ("gateway", "dns"):
        for text in own[key]:
            try:
                address = ipaddress.ip_address(text)
            except ValueError:
                yield document.problem((*path, key), f"{text} is not an IP address")
                continue
            if key == "gateway" and not any(address in each.network for each in interfaces):
                hint = "give an `address` in its network; DHCP brings its own gateway"
                yield document.problem((*path, key), f"{text} is in no network of this VM", hint)
            elif key == "gateway" and any(address == each.ip for each in interfaces):
                yield document.problem((*path, key), f"{text} is the VM's own address")


def _is_for_a_host(interface: IPv4Interface | IPv6Interface) -> bool:
    """Whether it is not that of a network itself, of all or many in it, or of every machine."""
    address, network = interface.ip, interface.network
    if address.is_multicast or address.is_unspecified or address.is_loopback:
        return False
    return network.num_addresses <= 2 or address not in (
        network.network_address,
        network.broadcast_address if address.version == 4 else None,
    )


def _repeated_addresses(documents: Sequence[Document]) -> Iterator[Problem]:
    """Addresses that two interfaces would have in one network."""
    taken: dict[tuple[str, ...], str] = {}
    told: set[Path] = set()  # a line of the defaults is told once, however many VMs inherit it
    for vm in vm_entries(documents):
        own = "networks" in vm.own
        document, path = (vm.document, vm.path) if own else (documents[0], ("defaults",))
        for index in range(len(document.sequence(*path, "networks"))):
            place = (*path, "networks", index, "address")
            for text, where in _claims(document.mapping(*place[:-1]), vm.tenant):
                if where not in taken:
                    taken[where] = vm.name
                elif own or taken[where] == vm.name:
                    message = f"{text} is already an address of {taken[where]} in this network"
                    yield document.problem(place, message)
                elif place not in told:
                    told.add(place)
                    message = f"{text} would be an address of {taken[where]} and of {vm.name}"
                    hint = "give each VM `networks` of its own"
                    yield document.problem(place, message, hint)


def _claims(network: Mapping[str, Any], tenant: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A network's addresses, each with what nobody else may have: itself, in that network."""
    import ipaddress

    for kind in (kind for kind in NetworkKind if kind in network):
        whose = tenant if kind in (NetworkKind.NAT, NetworkKind.ISOLATED) else ""
        for text in _listed(network.get("address")):
            try:
                address = ipaddress.ip_interface(text).ip
            except ValueError:
                continue
            vlan = str(network.get("vlan", ""))
            yield text, (str(kind), str(network[kind]), vlan, whose, str(address))


def _is_path(entry: str) -> bool:
    return entry.startswith("/")


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a file of keys, with their numbers, without comments."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line
