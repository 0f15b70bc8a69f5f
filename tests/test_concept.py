"""Facts about learning a concept: resumption is bit-exact, failures change nothing, earlier concepts stay as they were."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import concept
import pytest
import sequence
import states
import torch
from PIL import Image
from tiny_models import BUILDERS, save

from share_diffusion import storage
from share_diffusion.adapt import MODES
from share_diffusion.asynchronous import merge_files
from share_diffusion.progress import read_progress
from share_diffusion.subspace import Subspace

FAST = ["--max_train_steps", "4", "--train_batch_size", "2", "--gradient_batches", "1", "--checkpointing_steps", "2"]
QUICK = [*FAST, "--no-sheet", "--cpu"]


def run(*words):
    return concept.main([*QUICK, *words])


def file_of(folder):
    return folder / "outputs/tiny/subspace.safetensors"


def test_a_concept_ends_as_file_sheet_and_report(workplace, capsys):
    assert concept.main([*FAST, "--cpu", "--concept", "watercolor"]) == 0
    said = capsys.readouterr().out
    assert "trigger 'watercolor'" in said
    assert "48 pictures" in said
    home = workplace / "outputs/tiny"
    report = json.loads((home / "watercolor/report.json").read_text())
    assert report["retention"]["after"]["watercolor"] >= 0.998
    assert report["file"]["bytes"]["total"] == file_of(workplace).stat().st_size
    assert len(report["losses"]["steps"]) == 4
    assert Subspace.load(file_of(workplace))["watercolor"].half_weight == report["losses"]["half_weight"]
    with Image.open(home / "watercolor/sheet.png") as sheet:
        assert sheet.width > 600


def test_resumed_equals_uninterrupted(workplace, one_thread):
    words = ["--concept", "robot", "--output_dir"]
    assert run(*words, "whole") == 0
    save_state, done = states.save_state, []

    def stop_after_first(*arguments):
        save_state(*arguments)
        done.append(1)
        raise KeyboardInterrupt

    states.save_state = stop_after_first
    try:
        assert run(*words, "parts") == 130
    finally:
        states.save_state = save_state
    assert not (workplace / "parts/tiny/subspace.safetensors").exists()
    assert run(*words, "parts", "--resume_from_checkpoint", "latest") == 0
    files = [workplace / name / "tiny/subspace.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


EVERYTHING = [
    *("--use_aspect_ratio_buckets", "--bucket_step", "16", "--random_flip", "--no-center_crop", "--crops", "2"),
    *("--caption_dropout_rate", "0.3", "--shuffle_caption", "--caption_tag_dropout_rate", "0.2", "--repeats", "2"),
    *(
        "--with_prior_preservation",
        "--class_prompt",
        "a photo of a house",
        "--class_data_dir",
        "houses",
        "--num_class_images",
        "2",
    ),
    *(
        "--snr_gamma",
        "5",
        "--noise_offset",
        "0.05",
        "--preserve_weight",
        "0.5",
        "--ema_decay",
        "0.9",
        "--text_encoder_lr",
        "1e-2",
    ),
    *("--optimizer", "torch.optim:NAdam", "--optimizer_args", "weight_decay=0.01", "--lr_scheduler", "cosine_with_restarts"),
    *("--gradient_accumulation_steps", "2", "--gradient_checkpointing", "--cache_dir", "cache", "--lr_num_cycles", "2"),
]


def own_photos(folder):
    for name, sizes in (("photos", [(120, 70), (70, 120), (90, 90)]), ("houses", [(64, 64), (80, 64)])):
        (folder / name).mkdir()
        for number, size in enumerate(sizes):
            Image.new("RGB", size, (60 * number, 90, 160)).save(folder / name / f"{number}.png")
    return ["--instance_data_dir", "photos", "--instance_prompt", "a photo of mycat, small, grey"]


@pytest.mark.slow
def test_resumed_equals_uninterrupted_with_every_switch_that_has_a_state(workplace, one_thread):
    words = ["--concept", "mycat", *own_photos(workplace), *EVERYTHING]
    assert run("--concept", "robot", "--subspace", "mine.safetensors") == 0
    start = (workplace / "mine.safetensors").read_bytes()
    (workplace / "again.safetensors").write_bytes(start)
    assert run(*words, "--output_dir", "whole", "--subspace", "mine.safetensors") == 0
    save_state = states.save_state

    def stop_after_first(*arguments):
        save_state(*arguments)
        raise KeyboardInterrupt

    states.save_state = stop_after_first
    try:
        assert run(*words, "--output_dir", "parts", "--subspace", "again.safetensors") == 130
    finally:
        states.save_state = save_state
    assert (workplace / "again.safetensors").read_bytes() == start
    words += ["--output_dir", "parts", "--subspace", "again.safetensors", "--resume_from_checkpoint", "latest"]
    assert run(*words) == 0
    assert (workplace / "mine.safetensors").read_bytes() == (workplace / "again.safetensors").read_bytes()


def test_a_dry_run_tells_the_plan_and_writes_nothing(workplace, capsys):
    words = ["--concept", "mycat", *own_photos(workplace), "--use_aspect_ratio_buckets", "--bucket_step", "16", "--dry_run"]
    assert run(*words) == 0
    said = capsys.readouterr().out
    assert "1 at 64 x 64" in said
    assert "4 of 2 pictures" in said
    assert not (workplace / "outputs").exists()
    (workplace / "photos/bad.png").write_bytes(b"not a picture")
    (workplace / "photos/0.txt").write_bytes(b"\xff\xfe")
    assert run(*words) == 1
    assert "0.png: 0.txt is not UTF-8" in capsys.readouterr().err


def test_the_column_of_captions_is_that_of_class_folders_too(workplace):
    words = ["--concept", "mycat", *own_photos(workplace), "--caption_column", "prompt"]
    rows = [json.dumps({"file_name": f"{number}.png", "prompt": "a photo of a house"}) for number in range(2)]
    (workplace / "houses/metadata.jsonl").write_text("\n".join(rows))
    words += ["--with_prior_preservation", "--class_prompt", "a house", "--class_data_dir", "houses", "--num_class_images", "2"]
    assert run(*words, "--dry_run") == 0


@pytest.mark.slow
def test_validation_draws_measures_stops_early_and_is_told_to_other_programs(workplace, capsys):
    assert run("--concept", "robot") == 0
    words = ["--concept", "watercolor", "--learning_rate", "0", "--factor_learning_rate", "1e-12", "--max_train_steps", "6"]
    words += ["--validation_steps", "1", "--early_stop", "2", "--progress_file", "progress.jsonl", "--adaptation", "lora"]
    assert run(*words, "--finetune_steps", "0") == 0
    assert "learned after 2 steps" in capsys.readouterr().out
    home = workplace / "outputs/tiny/watercolor"
    report = json.loads((home / "report.json").read_text())
    losses = [loss for _, loss in report["losses"]["validations"]]
    assert len(losses) == 3
    assert max(losses) - min(losses) < 1e-6
    kept = {when: report["retention"][when]["robot"] for when in ("before", "after")}
    assert report["earlier"]["robot"] == {**kept, "unchanged": True}
    with Image.open(home / "validation-000000.png") as sheet:
        assert sheet.height > 380  # this concept and the earlier one
    facts, _ = read_progress(workplace / "progress.jsonl")
    assert facts[0]["sample"] == "sample-000000.png"
    assert facts[-1]["done"] is True


def test_what_cannot_be_meant_is_told_together_and_early(workplace, capsys):
    words = ["--max_train_steps", "0", "--early_stop", "2", "--with_prior_preservation", "--preserve_weight", "-1"]
    assert run("--concept", "robot", *words) == 1
    said = capsys.readouterr().err
    for part in ("--max_train_steps is 0", "--early_stop needs", "--class_prompt", "--preserve_weight is -1"):
        assert part in said
    assert run("--concept", "robot", "--optimizer", "prodigy") == 1
    assert "pip install prodigyopt" in capsys.readouterr().err
    assert run("--concept", "robot", "--report_to", "wandb") == 1
    assert "pip install wandb" in capsys.readouterr().err


def test_a_line_for_kohyas_trainer_runs_or_says_what_to_use(workplace, capsys):
    line = (
        "--pretrained_model_name_or_path=tiny --train_data_dir=photos --output_name=mycat --resolution=64,64 --enable_bucket "
        "--bucket_reso_steps=16 --network_dim=4 --optimizer_type=AdamW --unet_lr=1e-2 --text_encoder_lr=5e-3 --flip_aug "
        "--min_snr_gamma=5 --lr_scheduler=constant_with_warmup --lr_warmup_steps=2 --max_train_epochs=1 --shuffle_caption "
        "--keep_tokens=1 --noise_offset=0.05 --seed=1 --gradient_checkpointing"
    )
    own_photos(workplace)
    folder = workplace / "photos" / "2_mycat"
    folder.mkdir()
    for file in sorted((workplace / "photos").glob("*.png")):
        file.rename(folder / file.name)
        (folder / f"{file.stem}.txt").write_text("mycat, small, grey")
    assert run(*line.split()) == 0
    assert "mycat" in Subspace.load(file_of(workplace)).concepts
    with pytest.raises(SystemExit):
        run(*line.split(), "--network_module=networks.lora", "--cache_latents", "--clip_skip=2", "--train_text_encoders")
    said = capsys.readouterr().err
    for part in (
        "--network_module: leave it out",
        "--cache_latents: leave",
        "--clip_skip: leave",
        "did you mean --train_text_encoder?",
    ):
        assert part in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_every_family_learns_a_concept(workplace, name):
    pipeline = BUILDERS[name]()
    save(pipeline, workplace / name)
    words = ["--concept", "mycat", *own_photos(workplace), "--base", name, "--preserve_weight", "0.1", "--random_flip"]
    more = (
        ["--gradient_checkpointing", "--low_vram", "--no-train_text_encoder"]
        if name in ("sd3", "flux")
        else ["--snr_gamma", "5"]
    )
    assert run(*words, *more, "--use_aspect_ratio_buckets", "--bucket_step", "16") == 0
    subspace = Subspace.load(workplace / f"outputs/{name}/subspace.safetensors")
    assert subspace["mycat"].norm > 0
    assert subspace["mycat"].retention > 0.998
    assert subspace.origin.kind == ("random" if "--low_vram" in more else "activations")


def test_columns_are_measured_once_and_written_before_anything_trains(workplace, monkeypatch, capsys):
    save(BUILDERS["sd"](), workplace / "other")
    words = ["--concept", "mycat", *own_photos(workplace), "--base", "other", "--targets", "attention"]
    file = workplace / "outputs/other/subspace.safetensors"
    assert run(*words, "--dry_run") == 0
    assert not file.exists()
    assert run(*words, "--low_vram", "--basis", "activations") == 1
    assert "measured on the whole base" in capsys.readouterr().err
    learn = concept.denoising_loss

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(concept, "denoising_loss", stop)
    assert run(*words) == 130
    assert "its columns are measured once" in capsys.readouterr().out
    begun = Subspace.load(file)
    assert (begun.origin.kind, list(begun.concepts)) == ("activations", [])
    monkeypatch.setattr(concept, "denoising_loss", learn)
    assert run(*words) == 0
    assert "are measured once" not in capsys.readouterr().out
    assert Subspace.load(file).origin == begun.origin
    assert list(Subspace.load(file).concepts) == ["mycat"]


def test_a_file_that_another_run_begins_is_waited_for(workplace, monkeypatch, capsys):
    save(BUILDERS["sd"](), workplace / "other")
    words = ["--concept", "mycat", *own_photos(workplace), "--base", "other", "--targets", "attention"]
    file, ready, lock = workplace / "outputs/other/subspace.safetensors", workplace / "ready.safetensors", storage.locked
    assert run(*words, "--patch", "mycat.patch.safetensors") == 0  # which leaves the file without concepts
    capsys.readouterr()
    file.rename(ready)

    @contextlib.contextmanager
    def wait(path, **options):
        with lock(path, **options):
            if not file.exists():
                ready.rename(file)  # what the other one had measured
            yield

    monkeypatch.setattr(storage, "locked", wait)
    assert run(*words) == 0
    assert "are measured once" not in capsys.readouterr().out
    assert list(Subspace.load(file).concepts) == ["mycat"]


def test_a_stop_after_the_merge_says_that_the_concept_is_held(workplace, monkeypatch, capsys):
    drawn = []

    def stop_at_the_second(*_):
        drawn.append(1)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return {}

    monkeypatch.setattr(concept, "draw_base", lambda *_: [])
    monkeypatch.setattr(concept, "draw_concepts", stop_at_the_second)
    assert concept.main([*FAST, "--cpu", "--concept", "robot", "--progress_file", "progress.jsonl"]) == 130
    said = capsys.readouterr().err
    assert "robot is learned all the same" in said
    assert "as it was" not in said
    assert list(Subspace.load(file_of(workplace)).concepts) == ["robot"]
    assert json.loads((workplace / "outputs/tiny/robot/report.json").read_text())["concept"] == "robot"
    assert "robot is learned" in read_progress(workplace / "progress.jsonl")[0][-1]["stopped"]


def test_a_norm_of_zero_clips_nothing_and_learning_nothing_is_told(workplace, one_thread, capsys):
    for file, norm in (("none", "0"), ("huge", "1e30")):
        assert run("--concept", "robot", "--max_grad_norm", norm, "--subspace", f"{file}.safetensors") == 0
    assert (workplace / "none.safetensors").read_bytes() == (workplace / "huge.safetensors").read_bytes()
    assert run("--concept", "robot", "--learning_rate", "0", "--subspace", "other.safetensors") == 1
    assert "'robot' has learned nothing" in capsys.readouterr().err
    assert not (workplace / "other.safetensors").exists()


def test_a_checkpoint_knows_its_processes_and_what_was_preserved():
    def facts(processes, weight, names):
        settings = concept.ConceptSettings(preserve_weight=weight)
        subspace = SimpleNamespace(basis_version="x", concepts=dict.fromkeys(names))
        accelerator = SimpleNamespace(num_processes=processes)
        return states.facts_of(SimpleNamespace(settings=settings, data="", subspace=subspace, accelerator=accelerator))

    assert facts(1, 0.0, ["a"]) == facts(1, 0.0, ["b"])
    assert facts(1, 0.5, ["a"]) != facts(1, 0.5, ["a", "b"])
    assert facts(1, 0.0, ["a"]) != facts(2, 0.0, ["a"])


CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 7.60 GiB of which 1 GiB is free. Of the rest"


@pytest.mark.parametrize(
    ("error", "word"),
    [(torch.OutOfMemoryError(CUDA), "Tried to allocate 2.00 GiB"), (MemoryError(), "MemoryError"), (None, "1000000000000000")],
    ids=["accelerator", "python", "torch"],
)
def test_where_memory_ends_one_message_says_what_to_give_less_of(workplace, monkeypatch, capsys, error, word):
    assert run("--concept", "watercolor") == 0
    before = file_of(workplace).read_bytes()

    def full(*arguments):
        if error is not None:
            raise error
        return torch.empty(10**15, dtype=torch.uint8).sum()

    with monkeypatch.context() as patch:
        patch.setattr(concept, "denoising_loss", full)
        assert run("--concept", "robot", "--train_batch_size", "6", "--progress_file", "progress.jsonl") == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert word in said
    assert "--train_batch_size 3 --gradient_accumulation_steps 2" in said
    assert "--gradient_checkpointing" in said
    assert "--resolution" in said
    assert "Of the rest" not in said
    assert read_progress(workplace / "progress.jsonl")[0][-1]["error"] in said
    assert file_of(workplace).read_bytes() == before


def test_memory_that_ends_at_the_sheet_says_that_the_concept_is_held(workplace, monkeypatch, capsys):
    draw = concept.draw_concepts

    def full(pipeline, subspace, title):
        if subspace.concepts:
            raise torch.OutOfMemoryError(CUDA)
        return draw(pipeline, subspace, title)

    monkeypatch.setattr(concept, "draw_concepts", full)
    words = [word for word in QUICK if word != "--no-sheet"]
    assert concept.main([*words, "--concept", "watercolor"]) == 1
    said = capsys.readouterr().err
    assert "--no-sheet" in said
    assert "watercolor is learned all the same" in said
    assert "--train_batch_size" not in said
    assert list(Subspace.load(file_of(workplace)).concepts) == ["watercolor"]


def test_other_errors_of_the_machine_stay_what_they_are(workplace, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(concept, "denoising_loss", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        run("--concept", "robot")


def test_sigterm_leaves_a_checkpoint_and_no_file(workplace, monkeypatch):
    loss = concept.denoising_loss
    calls = []

    def terminate(*arguments):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    monkeypatch.setattr(concept, "denoising_loss", terminate)
    before = signal.getsignal(signal.SIGTERM)
    assert run("--concept", "robot", "--checkpointing_steps", "100", "--progress_file", "progress.jsonl") == 130
    assert "as it was" in read_progress(workplace / "progress.jsonl")[0][-1]["stopped"]
    assert list((workplace / "outputs/tiny/robot").glob("checkpoint-*/manifest.json"))
    assert not file_of(workplace).exists()
    assert signal.getsignal(signal.SIGTERM) == before


def stopping_after(steps, monkeypatch):
    """Press Ctrl-C when so many batches were seen."""
    loss, calls = concept.denoising_loss, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*arguments)

    monkeypatch.setattr(concept, "denoising_loss", counted)


def test_checkpoints_of_an_earlier_run_give_way_to_those_of_the_present_one(workplace, monkeypatch, capsys):
    words = ["--concept", "robot", "--max_train_steps", "8", "--checkpointing_steps", "2", "--checkpoints_total_limit", "2"]
    assert run(*words) == 0
    file_of(workplace).unlink()
    slower = [*words, "--learning_rate", "0.01"]
    with monkeypatch.context() as patch:
        stopping_after(5, patch)
        assert run(*slower) == 130
    home = workplace / "outputs/tiny/robot"
    assert sorted(path.name for path in home.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    assert run(*slower, "--resume_from_checkpoint", "latest") == 0
    assert "resuming after step 5" in capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_written_is_one_message_and_leaves_nothing(workplace, monkeypatch, capsys):
    home = workplace / "outputs/tiny/robot"
    (home / ".checkpoint-50.1.part").mkdir(parents=True)

    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert run("--concept", "robot", "--progress_file", "progress.jsonl") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert "error" in read_progress(workplace / "progress.jsonl")[0][-1]
    assert not list(home.glob("*checkpoint*"))
    assert not file_of(workplace).exists()


def test_a_run_that_was_learned_enough_is_not_learned_further_when_it_goes_on(workplace, monkeypatch, capsys):
    words = ["--concept", "robot", "--learning_rate", "0", "--factor_learning_rate", "1e-12", "--adaptation", "lora"]
    words += ["--max_train_steps", "6", "--validation_steps", "1", "--early_stop", "1", "--checkpointing_steps", "1"]

    def stopped(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(concept, "fold_in", stopped)
        assert run(*words) == 130
    assert run(*words, "--resume_from_checkpoint", "latest") == 0
    report = json.loads((workplace / "outputs/tiny/robot/report.json").read_text())
    assert len(report["losses"]["steps"]) == 1


def test_nan_in_any_part_of_a_step_names_the_pictures_of_that_part(workplace, monkeypatch, capsys):
    loss, named = concept.denoising_loss, []

    def poisoned(model, pipeline, pictures, drawn, *more):
        value = loss(model, pipeline, pictures, drawn, *more)
        if not named:
            named.extend(pictures.names[int(index)] for index in drawn.indices)
            return value * float("nan")
        return value

    monkeypatch.setattr(concept, "denoising_loss", poisoned)
    assert run("--concept", "robot", "--train_batch_size", "1", "--gradient_accumulation_steps", "2") == 1
    assert f"the loss is not finite at step 0 (pictures: {named[0]})" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--class_data_dir", "houses"], "--with_prior_preservation"),
        (["--sample_prompts", "prompts.txt"], "names a file"),
        (["--finetune_steps", "5", "--preserve_weight", "1"], "would undo"),
    ],
)
def test_what_would_be_passed_over_is_refused(workplace, capsys, words, expected):
    assert run("--concept", "robot", *words) == 1
    assert expected in capsys.readouterr().err


def test_a_placeholder_in_a_prompt_is_the_trigger_wherever_it_is_read(workplace):
    photos = own_photos(workplace)
    assert run("--concept", "mycat", *photos[:2], "--instance_prompt", "a photo of [trigger]", "--max_train_steps", "1") == 0
    held = Subspace.load(file_of(workplace))["mycat"]
    assert held.details["prompts"][0] == "a photo of mycat"
    assert not any("[trigger]" in prompt for prompt in held.details["prompts"])


def test_trackers_end_without_ending_the_processes_group(workplace, monkeypatch):
    ended = []
    monkeypatch.setattr("accelerate.Accelerator.end_training", lambda self: ended.append(1))
    assert run("--concept", "robot", "--max_train_steps", "1") == 0
    assert ended == []


@pytest.mark.parametrize("way", [[], ["--adaptation", "gradient"]], ids=["default", "gradient"])
def test_later_concepts_leave_earlier_ones_bit_identical(workplace, way):
    assert run("--concept", "watercolor", *way) == 0
    first = Subspace.load(file_of(workplace))
    assert run("--concept", "robot", *way) == 0
    second = Subspace.load(file_of(workplace))
    assert list(second.concepts) == ["watercolor", "robot"]
    for layer, entry in first["watercolor"].coefficients.items():
        assert torch.equal(entry.alpha, second["watercolor"].coefficients[layer].alpha)
        width = first.layers[layer].rank[0]
        assert torch.equal(first.layers[layer].alpha, second.layers[layer].alpha[:, :width])
    assert second["robot"].kind == "subject"


@pytest.mark.parametrize("basis", ["activations", "random"])
def test_in_columns_that_never_change_no_order_and_no_other_concept_has_a_say(workplace, one_thread, basis):
    for file, names in (("one", ("watercolor", "robot")), ("two", ("robot", "watercolor"))):
        for name in names:
            assert run("--concept", name, "--subspace", f"{file}.safetensors", "--basis", basis) == 0
    one, two = (Subspace.load(workplace / f"{file}.safetensors") for file in ("one", "two"))
    for name in one.concepts:
        assert one[name].retention > 0.9999
        for layer, entry in one[name].coefficients.items():
            other = two[name].coefficients[layer]
            assert torch.equal(entry.alpha, other.alpha)
            assert torch.equal(entry.beta, other.beta)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_first_and_second_concepts(workplace, mode):
    assert run("--concept", "watercolor", "--adaptation", mode) == 0
    assert run("--concept", "robot", "--adaptation", mode, "--finetune_steps", "1") == 0
    subspace = Subspace.load(file_of(workplace))
    assert all(concept.norm > 0 for concept in subspace.concepts.values())


@pytest.mark.parametrize("basis", ["weights", "random"])
def test_a_derived_basis_costs_no_bytes_for_the_first_concept(workplace, basis):
    words = ["--concept", "robot", "--adaptation", "coefficients", "--basis", basis, "--derived_rank", "6"]
    assert run(*words) == 0
    report = json.loads((workplace / "outputs/tiny/robot/report.json").read_text())
    assert report["file"]["bytes"]["basis"] == 0
    assert run("--concept", "watercolor", "--adaptation", "gradient") == 0
    again = json.loads((workplace / "outputs/tiny/watercolor/report.json").read_text())
    assert again["file"]["bytes"]["basis"] > 0


def test_nan_stops_before_the_step_and_names_the_pictures(workplace, monkeypatch, capsys):
    assert run("--concept", "watercolor") == 0
    before = file_of(workplace).read_bytes()
    loss = concept.denoising_loss
    steps = []

    def poisoned(model, *arguments):
        value = loss(model, *arguments)
        if isinstance(model, concept.Denoiser):
            steps.append(1)
            return value * float("nan") if len(steps) == 3 else value
        return value

    monkeypatch.setattr(concept, "denoising_loss", poisoned)
    assert run("--concept", "robot") == 1
    said = capsys.readouterr().err
    assert "not finite at step 2" in said
    assert ".png" in said
    assert "--learning_rate" in said
    assert file_of(workplace).read_bytes() == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--concept", "watercolour"], "did you mean 'watercolor'"),
        (["--concept", "../x"], "it holds '/'"),
        ([], "--concept is missing"),
        (["--concept", "mine", "--instance_data_dir", "nowhere"], "nowhere"),
        (["--concept", "robot", "--base", "no-such-base", "--local_files_only"], "cannot load the base 'no-such-base'"),
        (["--concept", "robot", "--budget", "many"], "'many' is not a size"),
        (["--concept", "robot", "--pseudo_rank", "0"], "pseudo_rank is 0"),
        (["--concept", "robot", "--targets", "nothing_like_it"], "chooses no layer"),
        (["--concept", "robot", "--basis_rank", "1"], "columns that never change; raise it"),
        (["--concept", "robot", "--basis_rank", "1", "--dry_run"], "columns that never change; raise it"),
        (["--concept", "robot", "--budget", "420KB", "--dry_run"], "with robot in it the file takes"),
        (["--concept", "robot", "--budget", "1e400"], "'1e400' is not a size"),
        (["--concept", "robot", "--cache_dir", "afile"], "choose another --cache_dir"),
        (["--concept", "robot", "--progress_file", "afile/x"], "choose another file"),
        (
            ["--concept", "robot", "--with_prior_preservation", "--class_prompt", "x", "--class_data_dir", "afile"],
            "is no folder",
        ),
        (["--concept", "robot", "--derived_rank", "-1", "--basis", "random"], "--derived_rank is -1; it is 1 to"),
        (["--concept", "robot", "--optimizer", "foo", "--dry_run"], "optimizer 'foo' is not known"),
        (["--concept", "robot", "--optimizer_args", "betas=3"], "optimizer adamw with betas=3"),
        (["--concept", "robot", "--resume", "nosuch", "--dry_run"], "--resume_from_checkpoint nosuch: there is no such folder"),
    ],
)
def test_bad_input_is_one_message(workplace, capsys, words, expected):
    (workplace / "afile").write_text("")
    assert run(*words) == 1
    said = capsys.readouterr().err
    assert expected in said
    assert "Traceback" not in said
    assert not (workplace / "outputs").exists()


def test_an_unknown_flag_names_the_nearest(workplace, capsys):
    with pytest.raises(SystemExit):
        run("--concept", "robot", "--learning_rat", "1")
    assert "did you mean --learning_rate" in capsys.readouterr().err


def test_a_second_run_of_a_concept_is_refused_before_training(workplace, capsys):
    assert run("--concept", "robot") == 0
    before = file_of(workplace).read_bytes()
    assert run("--concept", "ROBOT", "--instance_data_dir", "data/robot", "--subspace", str(file_of(workplace))) == 1
    said = capsys.readouterr().err
    assert "already holds the concept 'robot'" in said
    assert said.rstrip().endswith(f"share-diffusion drop '{file_of(workplace)}' robot")
    assert file_of(workplace).read_bytes() == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["robot", "--concept", "zzz"], "--concept zzz is for train/concept.py"),
        (["robot", "--instance_data_dir", "photos"], "--instance_data_dir photos is for one concept"),
        (["robot", "--progress_file", "p.jsonl"], "--progress_file p.jsonl is for one concept"),
        (["robot", "nosuch"], "nothing is known of concept 'nosuch'"),
        (["robot", "ROBOT"], "more than once"),
        (["robot", "--budget", "lots", "--workers", "2"], "is not a size"),
    ],
)
def test_a_sequence_that_cannot_be_meant_learns_nothing(workplace, capsys, words, expected):
    assert sequence.main([*QUICK, "--concepts", *words]) == 1
    assert expected in capsys.readouterr().err
    assert not (workplace / "outputs").exists()


def test_a_dry_run_of_a_sequence_says_that_nothing_is_learned(workplace, capsys):
    assert sequence.main([*QUICK, "--concepts", "robot", "--dry_run", "--workers", "2"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("nothing is learned (--dry_run)")
    assert not (workplace / "outputs").exists()


def test_resuming_with_other_settings_is_refused(workplace, capsys):
    assert run("--concept", "robot", "--subspace", "one.safetensors") == 0
    assert run("--concept", "robot", "--subspace", "two.safetensors", "--pseudo_rank", "3", "--resume", "latest") == 1
    assert "pseudo_rank was 4, now 3" in capsys.readouterr().err


def test_own_pictures_and_a_config_file(workplace):
    photos = workplace / "photos"
    photos.mkdir()
    for number in range(3):
        Image.new("RGB", (90, 70), (40 * number, 90, 160)).save(photos / f"{number}.jpg")
    (workplace / "run.toml").write_text('kind = "subject"\ninstance_prompt = "a photo of mycat"\nlearning_rate = 1e-2\n')
    assert run("--concept", "mycat", "--instance_data_dir", "photos/", "--config", "run.toml", "--license", "CC0-1.0") == 0
    held = Subspace.load(file_of(workplace))["mycat"]
    assert held.details["license"] == "CC0-1.0"
    assert (held.kind, held.trigger) == ("subject", "mycat")
    assert held.details["prompts"][0] == "a photo of mycat"


def test_a_sequence_goes_on_where_it_stopped(workplace, capsys):
    words = [*QUICK, "--concepts", "watercolor", "robot"]
    assert run("--concept", "watercolor") == 0
    assert sequence.main(words) == 0
    said = capsys.readouterr().out
    assert "watercolor: already in" in said
    assert list(Subspace.load(file_of(workplace)).concepts) == ["watercolor", "robot"]


def test_sigterm_stops_a_sequence_as_ctrl_c_does(workplace, monkeypatch, capsys):
    def killed(settings):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr(sequence, "learn_all", killed)
    before = signal.getsignal(signal.SIGTERM)
    assert sequence.main(["--concepts", "robot"]) == 130
    assert "start the same command again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_workers_share_columns_measured_as_their_concepts_are_learned(monkeypatch):
    seen = []
    monkeypatch.setattr(subprocess, "run", lambda words, check: seen.extend(words) or SimpleNamespace(returncode=0))
    settings = sequence.SequenceSettings(concepts=("robot",), mixed_precision="bf16", prediction_type="v_prediction")
    sequence.begin(settings, Path("mine.safetensors"))
    given = dict(itertools.pairwise(seen))
    assert given["--precision"] == "bfloat16"
    assert given["--prediction_type"] == "v_prediction"


def test_one_process_of_several_tells_of_the_progress(workplace, monkeypatch):
    monkeypatch.setattr(concept, "learn", lambda settings, progress: progress.tell(step=1))
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert concept.main(["--concept", "robot", "--progress_file", "progress.jsonl"]) == 0
    assert len(read_progress(workplace / "progress.jsonl")[0]) == 1


def test_a_place_that_cannot_be_written_is_told_before_any_work(workplace, capsys):
    (workplace / "taken").write_text("a file")
    assert run("--concept", "robot", "--output_dir", "taken/inside") == 1
    said = capsys.readouterr().err
    assert "cannot write to" in said
    assert "taken" in said


def test_a_patch_leaves_the_file_alone_and_merges_to_what_learning_in_place_gives(workplace, capsys):
    assert run("--concept", "watercolor") == 0
    before = file_of(workplace).read_bytes()
    assert run("--concept", "robot", "--patch", "robot.patch.safetensors") == 0
    assert file_of(workplace).read_bytes() == before
    assert "share-diffusion merge" in capsys.readouterr().out
    assert run("--concept", "robot", "--output_dir", "here", "--subspace", str(file_of(workplace))) == 0
    here = Subspace.load(file_of(workplace))
    (workplace / "there.safetensors").write_bytes(before)
    there = merge_files("there.safetensors", ["robot.patch.safetensors"])
    assert there["robot"].kind == "subject"
    assert there["robot"].details["prompts"] == here["robot"].details["prompts"]
    one, two = here.lora("robot"), there.lora("robot")
    gap = sum(float((one.layers[p].dense() - two.layers[p].dense()).square().sum()) for p in one.layers)
    assert gap**0.5 < 0.01 * one.norm
    assert run("--concept", "owl", "--patch", "robot.patch.safetensors") == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_workers_learn_a_sequence_side_by_side(workplace, capsys):
    assert run("--concept", "watercolor") == 0
    (workplace / "data/gnome").mkdir(parents=True)
    assert sequence.main([*QUICK, "--concepts", "watercolor", "gnome", "robot", "--workers", "2"]) == 1
    assert "gnome was not learned: error: " in capsys.readouterr().err
    assert list(Subspace.load(file_of(workplace)).concepts) == ["watercolor", "robot"]
    assert not list((workplace / "outputs/tiny/patches").glob("*.safetensors"))


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_the_doubled_batch(workplace):
    """The same pictures, times and noise in two halves: the coefficients agree to rounding."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = str(Path(concept.__file__))
    for name, processes, batch in (("one", "1", "4"), ("two", "2", "2")):
        words = ["--concept", "robot", *QUICK, "--subspace", f"{name}.safetensors", "--output_dir", name]
        command = [*launch, "--nproc_per_node", processes, script, *words, "--train_batch_size", batch]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    loras = [Subspace.load(workplace / f"{name}.safetensors").lora("robot") for name in ("one", "two")]
    gap = sum(float((loras[0].layers[p].dense() - loras[1].layers[p].dense()).square().sum()) for p in loras[0].layers)
    assert gap**0.5 < 0.02 * loras[0].norm
