from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engram.child_process import module_command, module_environment


def test_a_child_takes_no_module_from_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text("print('from here')")
    (tmp_path / "child.py").write_text("import queue")
    path = os.pathsep.join(["", str(tmp_path / "modules"), ""])
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "child.py").write_text("import queue; print(queue.Queue.__module__)")
    done = subprocess.run(
        module_command("child"),
        env=module_environment({**os.environ, "PYTHONPATH": path}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("queue\n", "")


def test_what_leads_to_the_package_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(Path(__file__).parents[1])
    monkeypatch.setattr(sys, "path", ["/usr/bin", *sys.path])
    assert module_environment({"A": "b", "PYTHONPATH": "x"}) == {"A": "b", "PYTHONPATH": "x"}
    monkeypatch.setattr(sys, "path", [root, *sys.path])
    assert module_environment({"PYTHONPATH": "x:/y"}) == {"PYTHONPATH": f"{root}:x:/y"}
    assert module_environment({}) == {"PYTHONPATH": root}
