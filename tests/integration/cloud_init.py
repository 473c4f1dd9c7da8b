"""Debian's own cloud-init, unpacked beside this system and not installed: nothing of it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# What it imports and this machine may not have.
_PACKAGES = (
    "cloud-init python3-requests python3-urllib3 python3-idna python3-chardet"
    " python3-charset-normalizer python3-certifi python3-configobj python3-jsonpatch"
    " python3-json-pointer python3-serial python3-netifaces python3-oauthlib python3-six"
)

# The configuration that user data comes to, by the handlers that a guest runs over its parts.
_MERGED = """\
import json, sys
from cloudinit import helpers, user_data, util
from cloudinit.handlers import cloud_config
from cloudinit.handlers import CONTENT_START, CONTENT_END
paths = helpers.Paths({"cloud_dir": "/nonexistent", "run_dir": "/nonexistent"})
handler = cloud_config.CloudConfigPartHandler(paths)
whole = user_data.UserDataProcessor(paths).process(sys.stdin.buffer.read())
handler.handle_part(None, CONTENT_START, None, None, None, {})
kinds = []
for part in whole.walk():
    if part.is_multipart():
        continue
    kinds.append(part.get_content_type())
    if kinds[-1] == "text/cloud-config":
        text = util.fully_decoded_payload(part)
        handler.handle_part(None, kinds[-1], "part", text, None, dict(part))
json.dump({"kinds": kinds, "config": handler.cloud_buf}, sys.stdout)
"""

# The configuration of a guest's network, by the renderer that the guest's system has.
_NETWORK = """\
import sys, yaml
from pathlib import Path
from cloudinit.net import eni, netplan, network_state, networkd
kind, target = sys.argv[1:]
state = network_state.parse_net_config_data(yaml.safe_load(sys.stdin))
{"eni": eni, "netplan": netplan, "networkd": networkd}[kind].Renderer(
    {"netrules_path": None, "postcmds": False}
).render_network_state(state, target=target)
for path in sorted(Path(target).rglob("*")):
    if path.is_file():
        print(path.read_text())
"""


class CloudInit:
    """One version of it in a folder."""

    def __init__(self, folder: Path) -> None:
        self._modules = folder / "usr/lib/python3/dist-packages"

    @classmethod
    def unpacked(cls, folder: Path) -> CloudInit:
        """Download and unpack it; raises CalledProcessError where apt cannot.

        By package lists of its own: a machine that had nothing to install may have none, or such
        as are so old that what they name is gone.
        """
        lists = folder / "lists"
        lists.mkdir(parents=True)
        quiet: dict[str, Any] = {"check": True, "capture_output": True, "cwd": folder}
        own = (f"State::Lists={lists}", "Cache::pkgcache=", "Cache::srcpkgcache=")
        apt = ("apt-get", *(f"-oDir::{setting}" for setting in own))
        subprocess.run((*apt, "update"), **quiet)
        subprocess.run((*apt, "download", *_PACKAGES.split()), **quiet)
        for file in folder.glob("*.deb"):
            subprocess.run(("dpkg-deb", "-x", file, folder), **quiet)
        return cls(folder)

    def run(self, *words: str, text: str = "") -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(self._modules)}
        command = (sys.executable, *words)
        return subprocess.run(
            command, input=text, env=environment, capture_output=True, text=True, check=False
        )

    def schema_faults(self, file: Path) -> str:
        """What `cloud-init schema` says about a cloud-config; "" when it is content."""
        done = self.run("-m", "cloudinit.cmd.main", "schema", "--config-file", str(file))
        return "" if done.returncode == 0 else f"{done.stdout}{done.stderr}"

    def merged(self, user_data: str) -> tuple[list[str], dict[str, Any]]:
        """The kinds of parts that user data has, and the configuration that they come to."""
        done = self.run("-c", _MERGED, text=user_data)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        return found["kinds"], found["config"]

    def network(self, kind: str, config: str, target: Path) -> str:
        """The files that a guest would have for its network."""
        done = self.run("-c", _NETWORK, kind, str(target), text=config)
        assert done.returncode == 0, done.stderr
        return done.stdout
