"""Processes that a launcher of torch's or Accelerate's starts on this machine's CPU."""

import os
import subprocess
import sys

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1")
ACCELERATE += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
ACCELERATE += ("--num_processes",)


def launched(count: int, *arguments, launcher=TORCHRUN, **options) -> subprocess.Popen:
    """`count` processes of a script or module with its arguments."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment |= options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    line = [sys.executable, *launcher, str(count), *map(str, arguments)]
    return subprocess.Popen(line, env=environment, **pipes, **options)


def finished(process: subprocess.Popen, code: int = 0) -> str:
    """What it said, once it has ended with that code."""
    said = process.communicate(timeout=600)[0]
    assert process.returncode == code, said[-3000:]
    return said
