"""docs/scale.md, followed literally in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_deltaconv.deltaconv import read_weights
from comfyui_deltaconv.deltaconv.scale.checkpoint import sharded_states
from comfyui_deltaconv.deltaconv.scale.store import StoredData, read_record
from comfyui_deltaconv.development import ROOT


@pytest.mark.long
@pytest.mark.any_comfyui
def test_the_page_works_line_by_line(comfyui_tree, tmp_path):
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    # The page's `python` is the one that runs this.
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    (programs / "python").chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COMFYUI_PATH": str(comfyui_tree)}
    folder = tmp_path / "empty"
    folder.mkdir()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "resumed after 24 steps" in said
    record = read_record(folder / "store")
    assert len(StoredData(folder / "store", base=record["base"])) == 24
    assert [path.name for path in sharded_states(folder / "out" / "state")] == [
        "state-00000028-001",
        "state-00000024-001",
    ]
    weights = read_weights(folder / "out" / "deltaconv.safetensors")
    assert weights.training["steps"] == 28 and len(weights.sites) == 10
    assert list(Path(folder / "out" / "tensorboard").iterdir())
