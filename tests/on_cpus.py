"""Run a script under accelerate's engines for GPUs on CPU processes: `accelerate launch ... tests/on_cpus.py SCRIPT ARGS`.

Accelerate starts FSDP and DeepSpeed on GPUs alone. Here it is told that its processes have some, and that each one's device
is the CPU; everything after that (process groups, the engine's own wrapping, averaging and steps) is the real thing.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
from accelerate.state import DistributedType, PartialState


def as_gpus() -> None:
    """Make accelerate take CPU processes for what its engine wants, talking over gloo."""
    wanted = os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    kind = DistributedType.MULTI_GPU if wanted else DistributedType.MULTI_CPU
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", kind)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


if __name__ == "__main__":
    as_gpus()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
