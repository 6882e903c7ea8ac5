"""ioredis and node-redis, in the versions that package.json names."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.components import unavailable
from tests.crash.server_process import DEADLINE_SECONDS, ServerProcess

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "node"
OLDEST_NODE = 20


@pytest.fixture(scope="session")
def node() -> str:
    """The path of node, beside which the clients are installed; in CI a test fails without."""
    path = shutil.which("node")
    if path is None:
        unavailable("node is not installed (Debian: apt-get install nodejs npm)")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.removeprefix("v").partition(".")[0]) < OLDEST_NODE:
        unavailable(f"node is {version.strip()}, the clients need {OLDEST_NODE}")
    for package, version in json.loads((ROOT / "package.json").read_text())["dependencies"].items():
        installed = ROOT / "node_modules" / package / "package.json"
        if not installed.exists() or json.loads(installed.read_text())["version"] != version:
            unavailable(f"{package} {version} is not installed (npm install --no-package-lock)")
    return path


@pytest.mark.parametrize("script", ["ioredis.mjs", "node_redis.mjs"])
def test_client(script: str, node: str, server: ServerProcess, protocol: int) -> None:
    command = [node, str(SCRIPTS / script), str(server.port), str(protocol)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    assert done.returncode == 0, done.stderr
    assert done.stderr == done.stdout == ""
