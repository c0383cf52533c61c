"""What the benchmarks on torch share: the machine, the models' shapes, a whole timed step."""
import platform
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"150m": (12, 12, 768), "400m": (24, 16, 1024), "33m": (6, 6, 384)}  # layers, heads, width


def machine(dtype):
    """The beginning of a benchmark's result: on what, of which code and by which command it was
    measured."""
    name = platform.machine()
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                            text=True).stdout.strip()
    return {"device": name, "torch": torch.__version__, "commit": commit,
            "command": "python " + " ".join(sys.argv), "threads": torch.get_num_threads(),
            "dtype": str(dtype), "rows": []}


def timed_step(loss_of, model, optimizer, device, dtype, kernel=nullcontext()):
    """Seconds of a step as a run makes it: forward, backward, clipping, the optimizer. loss_of: a
    function without arguments."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16), kernel:
        loss = loss_of()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()  # waits for the device
    return time.perf_counter() - start
