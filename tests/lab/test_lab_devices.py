"""The emulated devices, by way of a vfio-user client: what QEMU would see."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from lab import control, shape
from lab.conftest import Lab
from lab.control import ControlError
from lab.endpoint import CONFIG, Endpoint
from lab.journal import Journal
from lab.models import MODELS
from lab.pci import (
    CORRECTABLE,
    DEVICE_CONTROL,
    DEVICE_STATUS,
    LINK_STATUS,
    SERIAL,
    UNCORRECTABLE,
)
from lab.vfio_client import Client, Failed
from lab.vfio_user import ACCESS, HEADER, MOST, REGION_INFO, UNMAP, Command

PREPARE = ((0x12004C, 0x4), (0x122204, 0x2), (0x200, 0x02000000))
CLOSE = 0xA00148
COMMAND = 0x04


def closed(gpu: Client, links: int = 0x3F) -> None:
    for register, value in PREPARE:
        gpu.write(0, register, value)
    gpu.write(0, CLOSE, links << 16)


def capabilities(device: Client) -> dict[int, int]:
    """The chains of capabilities, extended ones with 0x10000 added: id to place."""
    found: dict[int, int] = {}
    place = device.read(CONFIG, 0x34, 1)
    while place:
        found[device.read(CONFIG, place, 1)] = place
        place = device.read(CONFIG, place + 1, 1)
    place = 0x100
    while place:
        header = device.read(CONFIG, place)
        found[0x10000 | header & 0xFFFF] = place
        place = header >> 20
    return found


def size_of_bar(device: Client, index: int, wide: bool) -> int:
    """Size a BAR as firmware does: the address bits that cannot be set."""
    place, width = 0x10 + 4 * index, 8 if wide else 4
    device.write(CONFIG, place, (1 << 8 * width) - 1, width)
    value = device.read(CONFIG, place, width) & ~0xF
    return (1 << 8 * width) - value


def test_a_v100_is_what_it_says(lab: Lab) -> None:
    gpu = lab.client("gpu0")
    assert gpu.read(CONFIG, 0) == 0x1DB810DE
    assert gpu.read(CONFIG, 8) == 0x030200A1
    assert set(capabilities(gpu)) == {0x01, 0x05, 0x10, 0x10001, 0x10003}
    sizes = [size_of_bar(gpu, index, wide=index > 0) >> 20 for index in (0, 1, 3)]
    assert sizes == [16, 256, 32]
    gpu.write(CONFIG, 0x30, 0xFFFFF801)
    assert gpu.read(CONFIG, 0x30) == 0  # no ROM
    assert gpu.read(CONFIG, LINK_STATUS, 2) & 0x3FF == 16 << 4 | 3
    assert gpu.read(0, 0) == 0x140000A1


def test_an_nvswitch_is_what_it_says(lab: Lab) -> None:
    switch = lab.client("nvswitch0")
    assert switch.read(CONFIG, 0) == 0x1AC210DE
    assert switch.read(CONFIG, 8) == 0x068000A1
    assert size_of_bar(switch, 0, wide=True) == 32 << 20


def test_no_reset_but_that_of_the_bus_on_a_v100(lab: Lab) -> None:
    gpu = lab.client("gpu0")
    at = capabilities(gpu)
    assert not gpu.read(CONFIG, at[0x10] + 4) >> 28 & 1  # function level reset
    assert gpu.read(CONFIG, at[0x01] + 4) & 8  # D3hot resets nothing
    gpu.write(CONFIG, DEVICE_CONTROL, 0x8000, 2)
    assert lab.control.devices()["gpu0"]["resets"] == 0


@pytest.mark.parametrize(("model", "resets"), [
    ("v100-sxm3", 0), ("a100-sxm4", 1), ("h100-sxm5", 1), ("nvswitch-v100", 0),
])  # fmt: skip
def test_a_function_level_reset_is_had_by_gpus_since_the_a100(model: str, resets: int) -> None:
    device = Endpoint("device", MODELS[model], 0, Journal())
    device.connect()
    device.write(CONFIG, COMMAND, b"\x06\0")
    device.write(CONFIG, DEVICE_CONTROL, b"\x10\xa9")
    assert device.resets == resets
    assert device.read(CONFIG, COMMAND, 2) == (b"\0\0" if resets else b"\x06\0")
    assert device.read(CONFIG, DEVICE_CONTROL, 2) == b"\x10\x29"


def test_power_states_and_msi_are_kept_as_they_are_written(lab: Lab) -> None:
    gpu = lab.client("gpu0")
    power, msi = (capabilities(gpu)[number] for number in (0x01, 0x05))
    gpu.write(CONFIG, power + 4, 0xFFFF, 2)
    assert gpu.read(CONFIG, power + 4, 2) == 0x000B  # D3hot
    assert gpu.read(CONFIG, msi + 2, 2) == 0x0080  # one message, 64-bit addresses, off
    gpu.write(CONFIG, msi + 2, 1, 2)
    gpu.write(CONFIG, msi + 4, 0x1_FEE0_0000, 8)
    gpu.write(CONFIG, msi + 12, 0x4021, 2)
    kept = [gpu.read(CONFIG, msi + place, size) for place, size in ((2, 2), (4, 8), (12, 2))]
    assert kept == [0x0081, 0x1_FEE0_0000, 0x4021]


def test_regions_and_interrupts(lab: Lab) -> None:
    gpu = lab.client("gpu0")
    assert struct.unpack("<IIII", gpu.ask(Command.GET_INFO, bytes(16))) == (16, 3, 9, 5)
    sizes = []
    for region in range(9):
        body = REGION_INFO.pack(32, 0, region, 0, 0, 0)
        sizes.append(REGION_INFO.unpack(gpu.ask(Command.GET_REGION_INFO, body))[4])
    assert sizes == [16 << 20, 256 << 20, 0, 32 << 20, 0, 0, 0, 4096, 0]
    counts = [
        struct.unpack("<IIII", gpu.ask(Command.GET_IRQ_INFO, struct.pack("<IIII", 16, 0, i, 0)))[3]
        for i in range(5)
    ]
    assert counts == [1, 1, 0, 0, 0]


def test_memory_is_sparse_and_starts_as_zeros(lab: Lab) -> None:
    gpu = lab.client("gpu0")
    assert gpu.read(1, 0xFFF_FFF8, 8) == 0
    gpu.write(1, 4094, 0x1122334455667788, 8)  # across two pages
    assert gpu.read(1, 4094, 8) == 0x1122334455667788
    assert gpu.read(1, 4096, 2) == 0x5566
    assert lab.control.journal(device="gpu0", what="write") == []


def test_closed_links_stay_closed_until_a_reset(lab: Lab) -> None:
    gpu = lab.client("gpu0")
    closed(gpu, 0b000011)
    gpu.write(0, CLOSE, 0b100000 << 16)
    gpu.write(0, CLOSE, 0)
    assert gpu.read(0, CLOSE) == 0b100011 << 16
    assert lab.control.devices()["gpu0"]["closed_links"] == [0, 1, 5]
    gpu.reset()
    assert gpu.read(0, CLOSE) == 0
    resets = lab.control.journal(device="gpu0", what="reset")
    assert [(reset["how"], reset["opened"]) for reset in resets] == [("bus", [0, 1, 5])]


@pytest.mark.parametrize("left_out", range(3))
def test_links_close_only_after_the_whole_preparation(lab: Lab, left_out: int) -> None:
    gpu = lab.client("gpu0")
    for register, value in PREPARE[:left_out] + PREPARE[left_out + 1 :]:
        gpu.write(0, register, value)
    gpu.write(0, CLOSE, 0x3F0000)
    assert gpu.read(0, CLOSE) == 0


def test_a_reset_returns_the_device_to_power_on(lab: Lab) -> None:
    gpu = lab.client("gpu0")
    gpu.write(CONFIG, COMMAND, 0x6, 2)
    gpu.write(CONFIG, 0x10, 0xF0000000)
    gpu.write(0, 0x1234, 5)
    gpu.write(1, 0, 5)
    gpu.reset()
    state = [gpu.read(CONFIG, COMMAND, 2), gpu.read(CONFIG, 0x10), gpu.read(0, 0x1234)]
    assert [*state, gpu.read(1, 0)] == [0, 0, 0, 0]
    assert lab.control.devices()["gpu0"]["resets"] == 1


def test_a_new_connection_finds_the_device_as_at_power_on(lab: Lab) -> None:
    gpu = lab.client("gpu0")
    gpu.reset()
    gpu.write(CONFIG, 0x10, 0xF0000000)
    gpu.write(1, 0, 5)
    closed(gpu)
    gpu.close()
    again = lab.client("gpu0")
    assert [again.read(CONFIG, 0x10), again.read(0, CLOSE), again.read(1, 0)] == [0, 0, 0]
    assert lab.control.devices()["gpu0"]["resets"] == 0
    assert lab.what("gpu0") == ["connect", "reset", "disconnect", "connect"]


def test_register_writes_are_in_the_journal_in_order(lab: Lab) -> None:
    gpu, other = lab.client("gpu0"), lab.client("gpu1")
    start = lab.control.last()
    gpu.write(0, 0x100, 0xABCD)
    other.write(CONFIG, COMMAND, 2, 2)
    entries = lab.control.journal(since=start)
    assert [(e["device"], e["region"], e["offset"], e["value"]) for e in entries] == [
        ("gpu0", "bar0", 0x100, 0xABCD),
        ("gpu1", "config", COMMAND, 2),
    ]
    assert [e["sequence"] for e in entries] == [start + 1, start + 2]


def test_a_long_journal_is_read_to_its_end(lab: Lab) -> None:
    gpu = lab.client("gpu0")
    for value in range(2100):
        gpu.post(0, 0x100, value)
    gpu.read(0, 0)
    entries = lab.control.journal(device="gpu0", what="write")
    assert [entry["value"] for entry in entries] == list(range(2100))


def test_serial_numbers_differ_and_stay(lab: Lab) -> None:
    known = {name: device["serial"] for name, device in lab.control.devices().items()}
    assert len(set(known.values())) == len(known)
    for name, serial in known.items():
        assert f"{lab.client(name).read(CONFIG, SERIAL + 4, 8):016x}" == serial
    assert known["gpu0"].startswith("00044b")


# Faults -------------------------------------------------------------------------------------------


def test_a_gpu_that_is_gone_reads_as_ones_until_it_is_mended(lab: Lab) -> None:
    gpu = lab.client("gpu0")
    gpu.write(0, 0x100, 7)
    lab.control.fault("gpu0", "gone")
    gpu.write(0, 0x100, 8)
    assert (gpu.read(CONFIG, 0), gpu.read(0, 0x100)) == (0xFFFFFFFF, 0xFFFFFFFF)
    gpu.reset()
    assert gpu.read(CONFIG, 0) == 0xFFFFFFFF
    assert lab.control.journal(what="write")[-1]["lost"]
    lab.control.clear("gpu0")
    assert (gpu.read(CONFIG, 0), gpu.read(0, 0x100)) == (0x1DB810DE, 0)


def test_only_the_configuration_space_of_a_gpu_may_be_lost(lab: Lab) -> None:
    gpu = lab.client("gpu0")
    lab.control.fault("gpu0", "config")
    assert (gpu.read(CONFIG, 0), gpu.read(0, 0)) == (0xFFFFFFFF, 0x140000A1)


def test_a_link_that_trained_badly_stays_so_over_resets(lab: Lab) -> None:
    lab.control.fault("gpu0", "link", lanes=8)
    gpu = lab.client("gpu0")
    assert gpu.read(CONFIG, LINK_STATUS, 2) & 0x3FF == 8 << 4 | 3
    gpu.reset()
    assert gpu.read(CONFIG, LINK_STATUS, 2) & 0x3FF == 8 << 4 | 3
    lab.control.clear("gpu0")
    assert gpu.read(CONFIG, LINK_STATUS, 2) & 0x3FF == 16 << 4 | 3


def test_errors_are_logged_and_cleared_by_writing_ones(lab: Lab) -> None:
    gpu = lab.client("gpu0")
    at = capabilities(gpu)[0x10001]
    lab.control.fault("gpu0", "errors", uncorrectable=1 << 18, correctable=1 << 6 | 1)
    assert (gpu.read(CONFIG, at + 4), gpu.read(CONFIG, at + 16)) == (1 << 18, 1 << 6 | 1)
    gpu.write(CONFIG, at + 16, 1)
    assert gpu.read(CONFIG, at + 16) == 1 << 6
    lab.control.clear("gpu0")
    assert (gpu.read(CONFIG, at + 4), gpu.read(CONFIG, at + 16)) == (0, 0)


def test_errors_are_sticky_over_resets_and_gone_without_power() -> None:
    gpu = Endpoint("gpu0", MODELS["v100-sxm3"], 0, Journal())
    gpu.connect()
    gpu.config.log_errors(1 << 18, 1)
    assert gpu.read(CONFIG, DEVICE_STATUS, 2) == b"\x05\0"  # correctable, fatal
    gpu.reset()
    places = UNCORRECTABLE, CORRECTABLE
    assert [gpu.read(CONFIG, at, 4) for at in places] == [b"\0\0\x04\0", b"\1\0\0\0"]
    gpu.disconnect()
    gpu.connect()
    assert [gpu.read(CONFIG, at, 4) for at in places] == [bytes(4)] * 2


def test_a_register_may_be_stuck(lab: Lab) -> None:
    gpu = lab.client("gpu0")
    lab.control.fault("gpu0", "registers", values={"0x100b20": 0})
    assert (gpu.read(0, 0x100B20), gpu.read(0, 0x100B20, 1)) == (0, 0)
    lab.control.clear("gpu0")
    assert gpu.read(0, 0x100B20) == 1


def test_faults_add_up_and_are_mended_one_by_one(lab: Lab) -> None:
    lab.control.fault("gpu0", "link", speed=1)
    lab.control.fault("gpu0", "gone")
    lab.control.ask("clear", device="gpu0", fault="gone")
    assert lab.control.devices()["gpu0"]["faults"] == ["link"]


@pytest.mark.parametrize(("request_", "reason"), [
    ({"do": "dance"}, "no 'dance'"),
    ({"do": "fault", "device": "gpu9", "fault": "gone"}, "no 'gpu9'"),
    ({"do": "fault", "device": "gpu0", "fault": "tired"}, "no 'tired'"),
    ({"do": "fault", "device": "gpu0", "fault": "link", "lanes": 99}, "no link has 99 lanes"),
    ({"do": "fault", "device": "gpu0", "fault": "errors"}, "errors are bits"),
    ({"do": "fault", "device": "gpu0", "fault": "registers", "values": {"-4": 0}}, "no 32-bit"),
    ({"do": "clear", "device": "gpu0", "fault": "tired"}, "tired"),
    ({"do": "read", "device": "gpu0", "region": "bar0", "offset": 1 << 24, "size": 4}, "within"),
    ({"do": "read", "device": "gpu0", "region": "bar7x", "offset": 0, "size": 4}, "invalid"),
])  # fmt: skip
def test_control_refuses_nonsense(lab: Lab, request_: dict[str, object], reason: str) -> None:
    with pytest.raises(ControlError, match=reason):
        lab.control.ask(**request_)  # type: ignore[arg-type]
    assert not any(device["faults"] for device in lab.control.devices().values())


def test_control_reads_behind_the_machines_back(lab: Lab) -> None:
    closed(lab.client("gpu0"))
    assert lab.control.read("gpu0", "bar0", CLOSE) == 0x3F0000
    assert lab.control.read("gpu0", "config", 0) == 0x1DB810DE


# Clients that misbehave ---------------------------------------------------------------------------


def test_a_client_may_go_away_in_the_middle_of_a_message(lab: Lab) -> None:
    gpu = lab.client("gpu0")
    gpu.socket.send(HEADER.pack(1, Command.REGION_WRITE, 400, 0, 0) + bytes(20))
    gpu.close()
    assert lab.client("gpu0").read(CONFIG, 0) == 0x1DB810DE


def test_messages_may_come_in_pieces_and_at_once(lab: Lab) -> None:
    gpu = lab.client("gpu0")
    message = HEADER.pack(9, Command.REGION_READ, 32, 0, 0) + ACCESS.pack(0, CONFIG, 4)
    for byte in message + message:
        gpu.socket.send(bytes([byte]))
    gpu.socket.send(message * 3)
    answer = HEADER.pack(9, Command.REGION_READ, 36, 1, 0) + ACCESS.pack(0, CONFIG, 4)
    answer += b"\xde\x10\xb8\x1d"
    assert gpu._take(5 * len(answer)) == answer * 5


def test_a_second_client_is_turned_away_and_harms_nothing(lab: Lab) -> None:
    gpu = lab.client("gpu0")
    gpu.write(0, 0x100, 7)
    assert lab.client("gpu0", greet=False).hung_up
    assert gpu.read(0, 0x100) == 7


@pytest.mark.parametrize("message", [
    HEADER.pack(1, Command.REGION_READ, MOST + 1, 0, 0),
    HEADER.pack(1, Command.REGION_READ, 15, 0, 0),
    HEADER.pack(1, Command.RESET, 16, 1, 0),  # a reply
    HEADER.pack(1, Command.VERSION, 20, 0, 0) + bytes(4),  # a second time
])  # fmt: skip
def test_who_does_not_speak_the_protocol_is_cut_off(lab: Lab, message: bytes) -> None:
    gpu = lab.client("gpu0")
    gpu.socket.send(message)
    assert gpu.hung_up
    assert lab.client("gpu1").read(CONFIG, 0) == 0x1DB810DE


def test_versions_come_first(lab: Lab) -> None:
    gpu = lab.client("gpu0", greet=False)
    gpu.send(Command.RESET)
    assert gpu.hung_up


def test_another_major_version_is_refused(lab: Lab) -> None:
    gpu = lab.client("gpu0", greet=False)
    with pytest.raises(Failed):
        gpu.ask(Command.VERSION, struct.pack("<HH", 1, 0))


@pytest.mark.parametrize(("command", "body"), [
    (Command.REGION_READ, ACCESS.pack(4094, CONFIG, 4)),  # beyond the end
    (Command.REGION_READ, ACCESS.pack(0, 2, 4)),  # no such BAR
    (Command.REGION_READ, ACCESS.pack((1 << 64) - 4, 1, 4)),
    (Command.REGION_READ, ACCESS.pack(0, 1, 1 << 31)),
    (Command.REGION_READ, b""),
    (Command.REGION_WRITE, ACCESS.pack(0, 0, 8) + bytes(4)),  # less data than it says
    (Command.GET_REGION_INFO, REGION_INFO.pack(32, 0, 99, 0, 0, 0)),
    (Command.DMA_READ, bytes(16)),
    (77, b""),
])  # fmt: skip
def test_a_wrong_request_is_answered_by_an_error(lab: Lab, command: int, body: bytes) -> None:
    gpu = lab.client("gpu0")
    with pytest.raises(Failed):
        gpu.ask(command, body)
    assert gpu.read(CONFIG, 0) == 0x1DB810DE


def test_file_descriptors_of_the_client_are_closed(lab: Lab) -> None:
    gpu = lab.client("gpu0")
    ends = []
    for _ in range(20):
        ours, theirs = os.pipe()
        body = struct.pack("<IIQQQ", 40, 3, 0, 0, 4096)
        assert gpu.ask(Command.DMA_MAP, body, files=(theirs,)) == b""
        os.close(theirs)
        ends.append(ours)
    for end in ends:
        assert os.read(end, 1) == b""  # nobody holds the other end any more
        os.close(end)
    unmap = UNMAP.pack(24, 0, 0, 4096)
    assert gpu.ask(Command.DMA_UNMAP, unmap) == unmap


def test_who_takes_no_answers_is_read_no_more(lab: Lab) -> None:
    gpu = lab.client("gpu0")
    gpu.socket.setblocking(False)
    message = HEADER.pack(9, Command.REGION_READ, 32, 0, 0) + ACCESS.pack(0, 1, 1 << 16)
    with pytest.raises(BlockingIOError):
        for _ in range(100_000):
            gpu.socket.send(message)
    assert lab.client("gpu1").read(CONFIG, 0) == 0x1DB810DE


def test_a_control_request_without_end_is_cut_off(lab: Lab) -> None:
    endless = socket.socket(socket.AF_UNIX)
    endless.connect(str(lab.directory / "control.sock"))
    with pytest.raises(ConnectionError):
        while True:
            endless.send(b"x" * 4096)
    endless.close()
    assert lab.control.devices()


# The command --------------------------------------------------------------------------------------


@pytest.mark.commands
def test_the_command_serves_a_whole_dgx2_and_ends_clean(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lab.devices", "--directory", str(tmp_path)]
    command += ["--shape", str(shape.SHAPES / "dgx2.yaml")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as server:
        assert server.stdout
        assert server.stdout.readline() == b"ready\n"
        with control.Client(tmp_path / "control.sock") as client:
            assert len(client.devices()) == 28
        server.terminate()
        assert server.wait(10) == 0
    assert not list(tmp_path.iterdir())
