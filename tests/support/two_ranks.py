"""Two processes of one torch.distributed group, for what ranks must agree on."""

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AROUND = """
import sys, torch
rank, store, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
group = torch.distributed.new_group([0, 1], backend="gloo")
{body}
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def outputs_of_two(body: str, folder: Path, *arguments: str) -> list[str]:
    """What each rank prints. body: Python that may use `rank`, `group` (of CPU tensors) and `arguments`."""
    program = AROUND.format(body=textwrap.dedent(body))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(folder / "store"), *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, said):
        assert process.returncode == 0, errors[-2000:]
    return [output.strip() for output, _ in said]
