"""What cloud-init itself makes of our seeds: its schema, its merging, its network renderers."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hosts import SimulatedHost
from test_firstboot import KEY

from dgx_kvm_sw.guest.seed import render
from dgx_kvm_sw.guest.templates import Templates
from dgx_kvm_sw.model.seed import Seed, SeedFacts, SeedMount, SeedNetwork
from dgx_kvm_sw.model.spec import Addressing
from integration.cloud_init import CloudInit

pytestmark = pytest.mark.integration

FACTS = SeedFacts(
    name="a",
    uuid="7beece74-b345-5541-98b8-b3dcf7d645c7",
    tenant="hr",
    gpus=2,
    image="debian-12",
    user="dgx",
    ssh_keys=(KEY,),
    mounts=(SeedMount("data", "/data"),),
    networks=(
        SeedNetwork(
            "net0",
            "52:54:00:11:22:33",
            Addressing(("10.1.0.5/24", "fd00::5/64"), ("10.1.0.1", "fd00::1"), ("10.1.0.2",)),
        ),
        SeedNetwork("net1", "52:54:00:44:55:66", Addressing()),
    ),
    user_data="",
)


@pytest.fixture(scope="module")
def cloud_init(tmp_path_factory: pytest.TempPathFactory) -> CloudInit:
    try:
        return CloudInit.unpacked(tmp_path_factory.mktemp("cloud-init") / "unpacked")
    except (OSError, subprocess.CalledProcessError) as error:
        if os.environ.get("CI"):
            pytest.fail(f"apt-get download: {error}; in CI this test must run")
        pytest.skip(f"needs apt and its archive: {error}")


@pytest.fixture
def seed(host: Callable[..., SimulatedHost]) -> Callable[[str], Seed]:
    """The seed of a VM with everything, beside user data of the operator's."""
    templates = Templates(host("dgx-h100").root)

    def of(user_data: str = "") -> Seed:
        return render(templates, replace(FACTS, user_data=user_data))

    return of


def test_the_user_data_follows_its_schema(
    cloud_init: CloudInit, seed: Callable[[str], Seed], tmp_path: Path
) -> None:
    file = tmp_path / "user-data"
    file.write_text(seed("").files["user-data"])
    assert cloud_init.schema_faults(file) == ""
    file.write_text(seed("").files["user-data"].replace("lock_passwd: true", "lock_passwd: [1]"))
    assert "lock_passwd" in cloud_init.schema_faults(file)  # it does look


def test_cloud_config_of_the_operator_is_merged(
    cloud_init: CloudInit, seed: Callable[[str], Seed]
) -> None:
    theirs = (
        "#cloud-config\nssh_pwauth: true\npackages: [htop]\nusers:\n- {name: eve}\n"
        "mounts:\n- [/dev/sdx, /mnt]\n# ü\n"
    )
    kinds, config = cloud_init.merged(seed(theirs).files["user-data"])
    assert kinds == ["text/cloud-config", "text/cloud-config"]
    assert [user["name"] for user in config["users"]] == ["dgx", "eve"]  # lists: ours, then theirs
    assert [mount[1] for mount in config["mounts"]] == ["/data", "/mnt"]
    assert config["ssh_pwauth"] is True  # where both have a value, theirs
    assert config["packages"] == ["htop"]
    assert config["manage_etc_hosts"] == "localhost"


@pytest.mark.parametrize(
    ("theirs", "kinds"),
    [
        ("#!/bin/sh\necho ü\n", ["text/x-shellscript"]),
        (
            'MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary="x"\n\n--x\n'
            "Content-Type: text/cloud-boothook\n\n#cloud-boothook\ntrue\n--x\n"
            "Content-Type: text/cloud-config\n\n#cloud-config\npackages: [htop]\n--x--\n",
            ["text/cloud-boothook", "text/cloud-config"],
        ),
    ],
)
def test_scripts_and_mime_run_beside_ours(
    cloud_init: CloudInit, seed: Callable[[str], Seed], theirs: str, kinds: list[str]
) -> None:
    found, config = cloud_init.merged(seed(theirs).files["user-data"])
    assert found == [*kinds, "text/cloud-config"]
    assert config["users"][0]["name"] == "dgx"


@pytest.mark.parametrize("kind", ["eni", "netplan", "networkd"])
def test_every_renderer_understands_the_network(
    cloud_init: CloudInit, seed: Callable[[str], Seed], tmp_path: Path, kind: str
) -> None:
    config = seed("").files["network-config"]
    for file in ("etc/network", "etc/netplan", "etc/systemd/network"):
        (tmp_path / "target" / file).mkdir(parents=True)
    text = cloud_init.network(kind, config, tmp_path / "target").lower()
    for word in ("10.1.0.5/24", "fd00::5/64", "10.1.0.1", "fd00::1", "10.1.0.2", "net1", "dhcp"):
        assert word in text
    if kind != "eni":
        assert "52:54:00:44:55:66" in text


@pytest.mark.skipif(not shutil.which("mkfs.ext4"), reason="needs e2fsprogs")
@pytest.mark.parametrize("content", ["nothing", "ext4", "swap", "partitions"])
def test_only_a_disk_with_nothing_on_it_is_formatted(
    seed: Callable[[str], Seed], tmp_path: Path, content: str
) -> None:
    """The command that cloud-init runs as it stands, by a shell, with the device put in."""
    import yaml

    disk = tmp_path / "disk"
    disk.write_bytes(bytes(16 << 20))
    if content == "ext4":
        subprocess.run(("mkfs.ext4", "-q", "-L", "theirs", disk), check=True)
    elif content == "swap":
        subprocess.run(("mkswap", disk), check=True, capture_output=True)
    elif content == "partitions":
        table = "label: gpt\n,4M\n"
        subprocess.run(("sfdisk", "-q", disk), input=table, text=True, check=True)
    before = disk.read_bytes()
    (setup,) = yaml.safe_load(seed("").files["user-data"])["fs_setup"]
    command = setup["cmd"] % {"device": disk, "label": "", "filesystem": "ext4"}
    subprocess.run(command, shell=True, check=True, capture_output=True)
    assert (disk.read_bytes() == before) == (content != "nothing")
