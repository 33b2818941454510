"""`deltaconv distill` on the demo by many processes: as torchrun and Accelerate start it."""

import json
import signal
import time

import pytest
import yaml
from comfyui_deltaconv.deltaconv import demo, read_weights
from comfyui_deltaconv.deltaconv.scale.checkpoint import sharded_states
from launched import ACCELERATE, TORCHRUN, finished, launched

COMMAND = ("-m", "comfyui_deltaconv.cli", "distill", "--config")


@pytest.fixture
def start(comfyui_tree, tmp_path):
    """(count, name, launcher, **settings) → processes with states and log in that folder."""
    from comfyui_deltaconv.deltaconv.pictures.metrics import to_pil

    (tmp_path / "pictures").mkdir()
    found, captions = demo.pictures()
    for index in range(8):
        to_pil((found[index].movedim(0, -1) + 1) / 2).save(tmp_path / f"pictures/{index}.png")
        (tmp_path / f"pictures/{index}.txt").write_text(captions[index], encoding="utf-8")
    started = []

    def start(count, name, launcher=TORCHRUN, **settings):
        stages = {"layers": {"steps": 20, "batch": 4}, "joint": {"steps": 20, "batch": 4}}
        config = {"data": "pictures", "size": 16, "choice": "fastest", "folder": name}
        config["settings"] = {"init_images": 4, **stages, **settings}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        env = {"COMFYUI_PATH": str(comfyui_tree)}
        command = (*COMMAND, f"{name}.yaml")
        started.append(launched(count, *command, launcher=launcher, cwd=tmp_path, env=env))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


def logged(folder):
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return {(line["stage"], line["step"]): line["loss"] for line in map(json.loads, lines)}


@pytest.mark.long
@pytest.mark.any_comfyui
def test_the_demo_has_the_losses_of_one_process_with_any_number_and_launcher(start, tmp_path):
    finished(start(1, "one"))
    expected = logged(tmp_path / "one")
    assert len(expected) == 41
    for count, launcher in ((2, TORCHRUN), (4, ACCELERATE)):
        name = f"of{count}"
        # What is recomputed in the backward pass changes nothing.
        said = finished(start(count, name, launcher, checkpointing=count == 4))
        assert said.count("Weights:") == 1
        found = logged(tmp_path / name)
        assert found.keys() == expected.keys()
        for step, loss in found.items():
            assert abs(loss - expected[step]) < 1e-5, (count, step)
        weights = read_weights(tmp_path / name / "deltaconv.safetensors")
        assert weights.training["steps"] == 40 and len(weights.sites) == 10


@pytest.mark.long
@pytest.mark.any_comfyui
def test_being_told_to_end_saves_once_and_the_same_command_goes_on(start, tmp_path):
    process = start(2, "out", layers={"steps": 500, "batch": 2}, save_every=10**6)
    deadline = time.monotonic() + 300
    log = tmp_path / "out" / "log.jsonl"
    while not log.exists() or len(log.read_text(encoding="utf-8").splitlines()) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert "Stopped; the same command goes on." in said, said[-3000:]
    newest = sharded_states(tmp_path / "out" / "state")[0]
    steps = int(newest.name.split("-")[1])
    assert 3 <= steps < 500
    stages = {"layers": {"steps": steps + 1, "batch": 2}, "joint": {"steps": 0}}
    finished(start(2, "out", **stages))
    assert f"resumed after {steps} steps" in log.read_text(encoding="utf-8")
