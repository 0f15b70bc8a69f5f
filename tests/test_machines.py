"""Every engine that accelerate can spread a run by learns the same numbers, or says why it cannot be used."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import concept
import machines
import pytest
from flags import ConceptSettings
from ports import free_port

from share_diffusion.subspace import Subspace

ROOT = Path(__file__).resolve().parents[1]
RUN = ["--concept", "robot", "--max_train_steps", "4", "--train_batch_size", "2", "--no-sheet", "--validation_steps", "2"]
SHORT = ["--concept", "robot", "--max_train_steps", "1", "--train_batch_size", "1", "--no-sheet", "--resolution", "16"]


def launch(place, engine, *words, precision="no", run=RUN):
    """Start two processes by the shipped configuration; returns the running command."""
    config = ROOT / "configs/accelerate" / f"{engine}.yaml"
    options = ["--config_file", str(config), "--mixed_precision", precision, "--num_processes", "2", *words]
    script = [str(ROOT / "tests/on_cpus.py"), concept.__file__, *run, "--output_dir", engine]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *script]
    return subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def learned(place, engine, started):
    """What came of the commands: the concept that the engine's file holds."""
    told = [process.communicate(timeout=600)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(told)[-6000:]
    assert sum("robot is learned" in one for one in told) == 1, "one process alone writes and reports"
    return Subspace.load(place / engine / "tiny/subspace.safetensors").lora("robot")


def here(place, engine):
    """What two processes of this machine learn."""
    return learned(place, engine, [launch(place, engine, "--main_process_port", str(free_port()))])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for all the runs."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def ddp(place):
    """What two processes learn under DDP."""
    return here(place, "multi_gpu")


def gap(lora, other):
    """How far two updates are apart, as a part of the first."""
    return sum(float((lora.layers[n].dense() - other.layers[n].dense()).square().sum()) for n in lora.layers) ** 0.5 / lora.norm


@pytest.mark.slow
def test_fsdp_learns_what_ddp_learns(place, ddp):
    assert gap(ddp, here(place, "fsdp")) < 0.02


@pytest.mark.slow
def test_fsdp_as_it_is_shipped_keeps_what_trains_in_float32(place):
    (folder := place / "bf16").mkdir()
    started = launch(folder, "fsdp", "--main_process_port", str(free_port()), precision="bf16", run=SHORT)
    assert learned(folder, "fsdp", [started]).norm > 0  # FSDP would cast the bases, and their product with what trains fails


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed_learns_what_ddp_learns(place, ddp):
    assert gap(ddp, here(place, "deepspeed")) < 0.02
    assert not list((place / "deepspeed").rglob("checkpoint-*"))


@pytest.mark.slow
def test_two_machines_learn_what_one_with_two_processes_learns(place, ddp):
    """Each rank is started by a command of its own, as on two machines, and they meet at the first one's address."""
    port = str(free_port())
    words = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    started = [launch(place, "multi_node", *words, "--machine_rank", rank) for rank in ("0", "1")]
    assert gap(ddp, learned(place, "multi_node", started)) < 0.02


def test_what_an_engine_cannot_do_is_told_all_at_once():
    settings = ConceptSettings(concept="robot")
    assert machines.problems_of_deepspeed(settings, 2) == []
    much = replace(settings, mixed_precision="bf16", resume_from_checkpoint="latest", with_prior_preservation=True)
    told = machines.problems_of_deepspeed(replace(much, preserve_weight=0.5), 3)
    for word in ("zero_stage is 3", "bf16", "--resume_from_checkpoint", "--with_prior_preservation and --preserve_weight"):
        assert any(word in one for one in told), word
    assert all(machines.INSTEAD in one for one in told)


@pytest.mark.parametrize(("version", "strategy", "word"), [(2, None, "fsdp_version is 2"), (1, "FULL_SHARD", "is FULL_SHARD")])
def test_fsdp_that_would_shard_what_trains_is_refused(version, strategy, word):
    (told,) = machines.problems_of_fsdp(SimpleNamespace(fsdp_version=version, sharding_strategy=SimpleNamespace(name=strategy)))
    assert word in told


def test_fsdp_without_sharding_is_taken():
    plugin = SimpleNamespace(fsdp_version=1, sharding_strategy=SimpleNamespace(name="NO_SHARD"))
    assert machines.problems_of_fsdp(plugin) == []
