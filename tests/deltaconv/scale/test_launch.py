"""The launch files: the one for SSH with a shell on this machine in place of its hosts'."""

import json
import os
import socket
import subprocess
import sys

import pytest
import toy_parallel
from comfyui_deltaconv.development import ROOT

LAUNCH = ROOT / "docs" / "launch"


@pytest.mark.parametrize("name", ["ssh.sh", "slurm.sh"])
def test_launch_files_are_bash_that_names_the_command(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    assert "comfyui_deltaconv.cli" in (LAUNCH / name).read_text(encoding="utf-8")


@pytest.mark.long
def test_two_hosts_take_the_steps_together(tmp_path):
    (tmp_path / "shell").write_text('#!/bin/sh\nshift 2\nexec sh -c "$1"\n', encoding="utf-8")
    (tmp_path / "shell").chmod(0o755)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    environment = {
        **os.environ,
        "SSH": str(tmp_path / "shell"),
        "PORT": str(port),
        "PROCESSES": "1",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    line = ["bash", str(LAUNCH / "ssh.sh"), "127.0.0.1 127.0.0.1"]
    line += [toy_parallel.__file__, str(tmp_path), "3", "2"]
    done = subprocess.run(
        line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert found[0]["weights"] == found[1]["weights"] and len(found[0]["records"]) == 6
