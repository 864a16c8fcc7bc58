"""Two processes on one machine, for what must come out the same on several as on one."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

BEGIN = """
import os, sys
import torch, torch.distributed as dist
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
"""
# A gloo thread that still holds a tensor when the interpreter is finalized aborts the process (seen with torch 2.11): leave before that.
END = """
dist.barrier()
sys.stdout.flush()
os._exit(0)
"""


def run_on_two(program: str, folder: Path) -> list[str]:
    """Run a program in two processes of one gloo group, with the variables `accelerate launch` sets; what each printed.

    `torch`, `dist` and `rank` are in scope and the tests' modules can be imported. The processes meet in a file of `folder`: a free
    port could be taken by another test before they bind it.
    """
    script = folder / "program.py"
    script.write_text(BEGIN + textwrap.dedent(program) + END)
    (folder / "meeting").unlink(missing_ok=True)
    environment = os.environ | {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }  # fmt: skip
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(folder / "meeting")],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [run.communicate(timeout=240) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert all(run.returncode == 0 for run in runs), "\n".join(errors[-3000:] for _, errors in outputs)
    return [printed for printed, _ in outputs]
