"""Learn a list of concepts into one subspace file, one after another or several at a time.

    accelerate launch train/sequence.py --concepts watercolor blueprint robot
    python train/sequence.py --concepts watercolor blueprint robot --workers 3

Concepts that the file already holds are passed over, and a concept that was interrupted goes on from its last
checkpoint: starting the same command again finishes what is left. Every flag of train/concept.py applies to each.

With `--workers N` every concept is learned by a process of its own, N at a time, against the file as it is at the start,
and handed back as a patch; all patches are then folded in at once. The same by hand on N machines: give each a copy of
the file, run train/concept.py with --patch on it, gather the patches and run `share-diffusion merge FILE *.patch.safetensors`.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import flags
import torch
from concept import learn
from flags import ELSEWHERE, PRECISIONS, ConceptSettings, capacity_of, origin_of
from start import recipe_of, subspace_file
from torch import Tensor

from share_diffusion import storage
from share_diffusion.asynchronous import merge_files
from share_diffusion.base import load_base
from share_diffusion.file import listing
from share_diffusion.models.identity import weights_of
from share_diffusion.settings import flag, parse, spell
from share_diffusion.subspace import normal


@dataclass(frozen=True)
class SequenceSettings(ConceptSettings):
    """Which concepts are learned, and how each of them is."""

    concepts: tuple[str, ...] = flag((), "the concepts, in order")
    workers: int | None = flag(None, "learn this many at a time, each in a process of its own, and merge them at the end")


def folded(name: str) -> str:
    """Return what two spellings of one concept's name have in common."""
    return normal(name).casefold()


def held(file: Path) -> set[str]:
    """Return the names of the concepts that a file holds, folded."""
    return {folded(str(entry["name"])) for entry in listing(file).concepts} if file.exists() else set()


def check(settings: SequenceSettings, todo: Sequence[str]) -> None:
    """Refuse settings that cannot be meant, and concepts still to be learned of which nothing is known, all at once."""
    problems = []
    if not settings.concepts:
        problems.append("--concepts is missing; give names, as in --concepts watercolor blueprint robot")
    names = [folded(name) for name in settings.concepts]
    if twice := sorted({name for name in settings.concepts if names.count(folded(name)) > 1}):
        problems.append(f"--concepts names {', '.join(twice)} more than once; each concept is learned once")
    if settings.workers is not None and settings.workers < 1:
        problems.append(f"--workers is {settings.workers}; at least 1 process is needed")
    if settings.workers is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append("--workers starts processes by itself; run train/sequence.py with python, not with accelerate launch")
    if settings.concept:
        problems.append(f"--concept {settings.concept} is for train/concept.py; add it to --concepts")
    if settings.instance_data_dir:
        problems.append(
            f"--instance_data_dir {settings.instance_data_dir} is for one concept; a sequence reads data/NAME/ for each"
        )
    if settings.progress_file:
        problems.append(f"--progress_file {settings.progress_file} is for one concept; a sequence says how far it is by itself")
    if settings.patch:
        problems.append(f"--patch {settings.patch} is for one concept; --workers N names a patch for each by itself")
    if settings.dataset_config:
        problems.append(f"--dataset_config {settings.dataset_config} is for one concept; a sequence reads data/NAME/ for each")
    problems += [problem for name in todo for problem in problems_of_one(settings, name)]
    if problems:
        raise ValueError("; ".join(dict.fromkeys(problems)))


def problems_of_one(settings: SequenceSettings, name: str) -> list[str]:
    """Return what is wrong with the settings of one concept, or that nothing is known of it."""
    alone, problems = replace(one_of(settings, name), patch=None, dataset_config=None), []
    for look in (flags.check, recipe_of):
        try:
            look(alone)
        except ValueError as error:
            problems.append(str(error))
    return problems


def one_of(settings: SequenceSettings, name: str) -> ConceptSettings:
    """Return the settings of one concept of the list."""
    common = {field.name: getattr(settings, field.name) for field in fields(ConceptSettings)}
    one = ConceptSettings(**{**common, "concept": name, "instance_data_dir": None, "progress_file": None})
    return replace(one, resume_from_checkpoint=settings.resume_from_checkpoint or "auto")


def learn_all(settings: SequenceSettings) -> list[str]:
    """Learn what is not held yet and return the names of the concepts learned now."""
    file = subspace_file(settings)
    done = held(file)
    todo = [name for name in settings.concepts if folded(name) not in done]
    check(settings, todo)
    for name in settings.concepts:
        if folded(name) in done:
            print(f"{name}: already in {file}, passed over")
    if settings.workers is not None and todo and not settings.dry_run:
        return learn_apart(settings, file, todo)
    for number, name in enumerate(todo, start=1):
        print(f"\n[{number} of {len(todo)}] {name}")
        learn(one_of(settings, name))
    return [] if settings.dry_run else todo


def learn_apart(settings: SequenceSettings, file: Path, todo: Sequence[str]) -> list[str]:
    """Learn each concept in a process of its own, then fold all patches in; patches that exist are not learned again."""
    folder = file.parent / "patches"
    folder.mkdir(parents=True, exist_ok=True)
    patches = {name: folder / f"{name}.patch.safetensors" for name in todo}
    processes: list[subprocess.Popen[bytes]] = []
    slots, places = range(min(settings.workers or 1, len(todo))), queue.SimpleQueue[int]()
    for place in slots:
        places.put(place)
    for name in todo:
        if patches[name].exists():
            print(f"{name}: {patches[name]} is there already, whatever it was learned with; remove it to learn {name} again")

    def work(name: str) -> int:
        if patches[name].exists():
            return 0
        words = spell(replace(one_of(settings, name), patch=str(patches[name]), subspace=str(file)))
        place = places.get()
        try:
            with (folder / f"{name}.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, script(), *words], stdout=log, stderr=log, env=share_of(place, len(slots))
                )
                processes.append(process)
                return process.wait()
        finally:
            places.put(place)

    if origin_of(settings).kind == "activations" and not file.exists():  # all of them learn in the same columns
        begin(settings, file)
    print(f"learning {len(todo)} concepts, {settings.workers} at a time; each one's words go to {folder}/NAME.log")
    with ThreadPoolExecutor(settings.workers) as pool:
        try:
            codes = dict(zip(todo, pool.map(work, todo), strict=True))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise
    failed = [name for name in todo if codes[name]]
    if learned := [name for name in todo if not codes[name]]:
        merge_files(
            file, [patches[name] for name in learned], capacity=capacity_of(settings), weights=base_weights(settings, file)
        )
        for name in learned:
            patches[name].unlink()
    if failed:
        last = {name: (folder / f"{name}.log").read_text(errors="replace").strip().rpartition("\n")[2] for name in failed}
        raise ValueError(
            "; ".join(f"{name} was not learned: {line}" for name, line in last.items())
            + f". {len(learned)} of {len(todo)} are merged; start the same command again for the rest"
        )
    return learned


def share_of(place: int, workers: int) -> dict[str, str]:
    """Return a worker's environment: an accelerator of its own where there are several, and its share of the cores."""
    share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    if (count := torch.cuda.device_count()) > 1:
        told = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
        devices = told or [str(index) for index in range(count)]
        share["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)].strip()
        return {**os.environ, **share}
    return {**share, **os.environ}


def begin(settings: SequenceSettings, file: Path) -> None:
    """Begin the file with columns measured on its base, in a process of its own, which leaves the device to the others."""
    words = ["--base", settings.pretrained_model_name_or_path, "--targets", settings.targets]
    words += ["--derived_rank", str(settings.derived_rank), *(["--local_files_only"] if settings.local_files_only else [])]
    words += ["--batch", str(min(settings.train_batch_size, 8))]
    words += ["--resolution", str(settings.resolution)] if settings.resolution else []
    words += ["--gradient_checkpointing"] if settings.gradient_checkpointing else []
    precision = PRECISIONS[flags.mixed_precision_of(settings)]
    words += ["--precision", str(precision).removeprefix("torch.")]
    words += ["--prediction_type", settings.prediction_type] if settings.prediction_type else []
    words += ["--device", "cpu"] if settings.cpu else []
    words += [] if settings.train_text_encoder else ["--no-train_text_encoder"]
    if subprocess.run([sys.executable, "-m", "share_diffusion", "measure", str(file), *words], check=False).returncode:
        raise ValueError(f"{file} could not be begun; what is wrong stands above")


def base_weights(settings: SequenceSettings, file: Path) -> dict[str, Tensor] | None:
    """Return the base's weights where the file's basis comes from them."""
    kind = storage.read_header(file).metadata["origin"]["kind"] if file.exists() else origin_of(settings).kind
    if kind != "weights":
        return None
    return weights_of(load_base(settings.pretrained_model_name_or_path, local_files_only=settings.local_files_only))


def script() -> str:
    """Return the path of the script that learns one concept."""
    return str(Path(__file__).with_name("concept.py"))


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    words = "Learn a list of concepts into one subspace file."
    settings = parse(SequenceSettings, argv, description=words, elsewhere=ELSEWHERE)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # it stops as Ctrl-C does, the workers as well
    try:
        learned = learn_all(settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; start the same command again to go on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    if settings.dry_run:
        print("\nnothing is learned (--dry_run)")
    else:
        print(f"\nlearned {len(learned)}: {', '.join(learned) or 'nothing was left to learn'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
