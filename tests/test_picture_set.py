"""Facts about data on its way into training: buckets, cuts, masks, captions that vary, and caches by content."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from share_diffusion.base import load_base
from share_diffusion.buckets import batches_in, batches_in_epoch, bucket_batch, bucket_sizes, choose_bucket
from share_diffusion.cache import Cache
from share_diffusion.captions import Variation, without_trigger
from share_diffusion.class_pictures import class_folder, missing_pictures
from share_diffusion.data import join_datasets, read_dataset
from share_diffusion.learning import Frozen, denoising_loss, prepare
from share_diffusion.objective import batch_indices, draw, offset_noise, time_weights
from share_diffusion.picture_set import Framing, prepare_pictures
from share_diffusion.pictures import cut_picture, fit_picture
from share_diffusion.preservation import Preservation
from share_diffusion.schedules import rate_factor
from share_diffusion.step import draw_step
from share_diffusion.subsets import read_subsets

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline():
    return load_base("tiny")


def paint(folder, sizes, caption="[trigger], a thing, red, big"):
    folder.mkdir(exist_ok=True)
    for number, (width, height) in enumerate(sizes):
        picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
        picture.putpixel((0, 0), (number, 0, 0))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return read_dataset(folder, trigger="sks")


def test_buckets_have_the_area_of_the_resolution_and_sides_of_the_step():
    sizes = bucket_sizes(512, 64)
    assert sizes[0] == (512, 512)
    assert all(height % 64 == width % 64 == 0 for height, width in sizes)
    assert all(
        abs(height * width / 512**2 - 1) < 0.13 and max(height, width) <= 2 * min(height, width) for height, width in sizes
    )
    assert choose_bucket((600, 1200), sizes, 64) == min(sizes, key=lambda size: abs(math.log(size[1] / size[0] / 2)))
    small = choose_bucket((100, 200), sizes, 64)
    assert small[0] <= 100
    assert small[1] <= 200
    assert choose_bucket((100, 200), sizes, 64, enlarge=True) in sizes
    with pytest.raises(ValueError, match="multiple of 64"):
        bucket_sizes(500, 64)


def test_every_picture_is_visited_in_every_epoch_and_batches_are_of_one_size():
    buckets = [(64, 64)] * 5 + [(48, 80)] * 3 + [(80, 48)] * 1
    count = batches_in_epoch(buckets, 2)
    for epoch in range(3):
        steps = [bucket_batch(buckets, 2, seed=4, step=epoch * count + place).tolist() for place in range(count)]
        assert {index for batch in steps for index in batch} == set(range(9))
        assert all(len({buckets[index] for index in batch}) == 1 for batch in steps)
    assert torch.equal(bucket_batch([(64, 64)] * 5, 4, 1, 7), batch_indices(5, 4, 1, 7))


@pytest.mark.parametrize(("count", "batch", "epochs"), [(10, 8, 10), (5, 8, 10), (20, 8, 10), (16, 4, 3)])
def test_passes_over_the_pictures_are_what_they_say(count, batch, epochs):
    """Epochs run on within a batch, so all steps together are no more than one batch above the asked passes."""
    buckets = [(64, 64)] * count
    steps = batches_in(epochs, buckets, batch)
    seen = torch.bincount(torch.cat([bucket_batch(buckets, batch, 0, step) for step in range(steps)]), minlength=count)
    assert int(seen.min()) >= epochs
    assert 0 <= int(seen.sum()) - epochs * count < batch
    assert batches_in(2, [(64, 64)] * 3 + [(64, 96)] * 3, 2) == 2 * 4


def test_a_square_cut_is_the_fitted_picture_and_others_keep_their_shape():
    picture = Image.radial_gradient("L").convert("RGB").resize((123, 77))
    assert cut_picture(picture, (64, 64)).tobytes() == fit_picture(picture, 64).tobytes()
    assert cut_picture(picture, (64, 64), flip=True).tobytes() == fit_picture(picture, 64, flip=True).tobytes()
    wide = Image.new("RGB", (200, 100))
    wide.paste((255, 0, 0), (100, 0, 200, 100))
    cut = cut_picture(wide, (32, 64))
    assert cut.getpixel((5, 5)) == (0, 0, 0)
    assert cut.getpixel((60, 5)) == (255, 0, 0)


def test_the_default_set_is_what_prepare_makes(pipeline, tmp_path):
    data = paint(tmp_path / "a", [(70, 70), (90, 64), (64, 80)])
    plain, made = prepare(pipeline, data, 64), prepare_pictures(pipeline, data, 64)
    drawn = draw(pipeline, 3, 3, made.shape(), 0, 5)
    assert torch.equal(made.latents_of(drawn, CPU), plain.latents_of(drawn, CPU))
    ours, theirs = made.conditions_of(drawn, CPU), plain.conditions_of(drawn, CPU)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = draw_step(pipeline, made, 3, 0, 5)
    assert torch.equal(again.noise, drawn.noise)
    assert torch.equal(again.indices, drawn.indices)


def test_buckets_flips_and_random_cuts_give_latents_of_their_shapes(pipeline, tmp_path):
    data = paint(tmp_path / "a", [(70, 70), (160, 80), (80, 160)])
    framing = Framing(64, buckets=True, step=16, center_crop=False, crops=2, flip=True)
    made = prepare_pictures(pipeline, data, framing)
    shapes = {tuple(latents.shape) for latents in made.latents}
    assert shapes == {(4, made.shape()[0], height // 4, width // 4) for height, width in made.sizes}
    assert len(set(made.sizes)) == 3
    seen = Counter()
    for step in range(30):
        drawn = draw_step(pipeline, made, 1, 0, step)
        assert made.latents_of(drawn, CPU).shape[1:] == drawn.noise.shape[1:]
        seen[made.cuts(drawn)[0]] += 1
    assert len(seen) > 8
    mirrored = prepare_pictures(pipeline, paint(tmp_path / "b", [(64, 64)]), Framing(64, flip=True))
    assert not torch.equal(mirrored.latents[0][0], mirrored.latents[0][1])


def test_a_mask_decides_where_the_loss_counts(pipeline, tmp_path):
    folder = tmp_path / "a"
    paint(folder, [(64, 64)])
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(folder / "0.mask.png")
    data = read_dataset(folder, trigger="sks")
    assert len(data) == 1
    assert "1 with a mask" in data.report()
    made, bare = prepare_pictures(pipeline, data, 64), prepare_pictures(pipeline, paint(tmp_path / "b", [(64, 64)]), 64)
    drawn = draw_step(pipeline, made, 1, 0, 0)
    assert made.mask_of(drawn, CPU)[0, 0, :, :8].min() == 1
    assert made.mask_of(drawn, CPU)[0, 0, :, 8:].max() == 0
    half, whole = (float(denoising_loss(Frozen(pipeline), pipeline, some, drawn, CPU)) for some in (made, bare))
    mask.paste(255, (0, 0, 64, 64))
    mask.save(folder / "0.mask.png")
    full = prepare_pictures(pipeline, read_dataset(folder, trigger="sks"), 64)
    assert float(denoising_loss(Frozen(pipeline), pipeline, full, drawn, CPU)) == pytest.approx(whole, rel=1e-5)
    assert half != pytest.approx(whole, rel=1e-3)
    Image.new("L", (32, 64)).save(folder / "0.mask.png")
    with pytest.raises(ValueError, match=r"0\.mask\.png is 32 x 64, its picture 64 x 64"):
        read_dataset(folder, trigger="sks")


def test_a_cache_serves_by_content_alone(pipeline, tmp_path):
    data = paint(tmp_path / "a", [(70, 70), (90, 64)])
    cache = Cache(tmp_path / "cache")
    first = prepare_pictures(pipeline, data, 64, cache=cache, freeze_text=True)
    drawn = draw_step(pipeline, first, 2, 0, 0)
    states = first.conditions_of(drawn, CPU)["states"]
    assert cache.misses > 0
    again = Cache(tmp_path / "cache")
    second = prepare_pictures(pipeline, paint(tmp_path / "copy", [(70, 70), (90, 64)]), 64, cache=again, freeze_text=True)
    assert torch.equal(second.conditions_of(drawn, CPU)["states"], states)
    assert again.misses == 0
    assert all(torch.equal(one, two) for one, two in zip(first.latents, second.latents, strict=True))
    (tmp_path / "copy/0.txt").write_text("[trigger], another")
    Image.new("RGB", (70, 70), "red").save(tmp_path / "copy/1.png")
    edited = Cache(tmp_path / "cache")
    third = prepare_pictures(pipeline, read_dataset(tmp_path / "copy", trigger="sks"), 64, cache=edited, freeze_text=True)
    assert edited.misses == 1
    assert not torch.equal(third.latents[1], second.latents[1])
    assert not torch.equal(third.conditions_of(drawn, CPU)["states"], states)
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:50])
    mended = prepare_pictures(pipeline, data, 64, cache=Cache(tmp_path / "cache"))
    assert all(torch.equal(one, two) for one, two in zip(first.latents, mended.latents, strict=True))


def test_kept_text_states_predict_what_encoding_predicts(pipeline, tmp_path):
    data = paint(tmp_path / "a", [(70, 70)])
    drawn = draw_step(pipeline, prepare_pictures(pipeline, data, 64), 1, 0, 0)
    losses = [
        denoising_loss(Frozen(pipeline), pipeline, prepare_pictures(pipeline, data, 64, freeze_text=kept), drawn, CPU)
        for kept in (False, True)
    ]
    assert torch.allclose(*losses, rtol=1e-5)


def test_captions_vary_by_step_alone():
    variation = Variation(dropout=0.3, shuffle=True, keep=1)
    told = [variation.apply(["sks, a, b, c, d"], 1, step)[0] for step in range(300)]
    assert told == [variation.apply(["sks, a, b, c, d"], 1, step)[0] for step in range(300)]
    assert 60 < told.count("") < 120
    assert all(text == "" or (text.startswith("sks, ") and sorted(text.split(", ")[1:]) == list("abcd")) for text in told)
    assert len(set(told)) > 15
    kept = [Variation(tag_dropout=0.5).apply(["sks, a, b"], 0, step)[0] for step in range(200)]
    assert Counter(kept).keys() == {"sks", "sks, a", "sks, b", "sks, a, b"}
    with pytest.raises(ValueError, match="caption_dropout_rate is 2"):
        Variation(dropout=2)


def test_the_trigger_leaves_no_trace():
    assert without_trigger("watercolor painting of a house", "watercolor") == "painting of a house"
    assert without_trigger("a photo, sks, red", "SKS") == "a photo, , red"
    assert without_trigger("asks for it", "sks") == "asks for it"


def test_subset_tables_join_folders_and_name_the_flag_for_the_rest(tmp_path):
    paint(tmp_path / "a", [(70, 70)])
    paint(tmp_path / "b", [(70, 72), (70, 74)])
    table = tmp_path / "data.toml"
    table.write_text(
        f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{tmp_path / "a"}"\nnum_repeats = 3\n'
        f'[[datasets.subsets]]\nimage_dir = "{tmp_path / "b"}"\nis_reg = true\n'
    )
    one, two = read_subsets(table)
    assert (one.repeats, one.of_class, two.of_class) == (3, False, True)
    joined = join_datasets([read_dataset(part.folder, trigger="sks", repeats=part.repeats) for part in (one, two)])
    assert [example.repeats for example in joined.examples] == [3, 1, 1]
    assert "3 pictures" in joined.report()
    table.write_text('[general]\nenable_bucket = true\n[[datasets]]\n[[datasets.subsets]]\nimage_dirs = "x"\n')
    with pytest.raises(ValueError, match="--use_aspect_ratio_buckets") as error:
        read_subsets(table)
    assert "did you mean image_dir?" in str(error.value)
    assert "a subset has no image_dir" in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("datasets = 3", "datasets is 3; write it as a table, headed [[datasets]]"),
        ("general = 1\n[[datasets]]\nsubsets = [1]", "subsets is [1]; write it as a table, headed [[datasets.subsets]]"),
        ("general = 1\n[[datasets]]\nsubsets = [1]", "general is 1; write it as a table, headed [general]"),
        ('[datasets]\nsubsets = "x"', "datasets is {'subsets': 'x'}"),
    ],
)
def test_a_subset_table_of_another_form_is_one_message(tmp_path, text, expected):
    (tmp_path / "data.toml").write_text(text)
    with pytest.raises(ValueError, match="--dataset_config") as error:
        read_subsets(tmp_path / "data.toml")
    assert expected in str(error.value)


def test_a_cache_that_is_a_file_is_one_message(tmp_path):
    (tmp_path / "afile").write_text("")
    with pytest.raises(ValueError, match="choose another --cache_dir"):
        Cache(tmp_path / "afile").keep("00ff", {"a": torch.zeros(1)})


def test_an_imagefolder_of_hugging_face_is_read(tmp_path):
    inner = tmp_path / "hf" / "train"
    inner.mkdir(parents=True)
    Image.new("RGB", (70, 70)).save(inner / "a.png")
    (inner / "metadata.csv").write_text('file_name,prompt\na.png,"a cat, red"\n')
    data = read_dataset(tmp_path / "hf", trigger="sks", caption_column="prompt")
    assert data.examples[0].caption == "sks, a cat, red"
    with pytest.raises(ValueError, match="has no column text; it has file_name, prompt"):
        read_dataset(tmp_path / "hf", trigger="sks")


def test_class_pictures_are_numbered_on(tmp_path):
    start = "a photo of a cat that sits on a mat and looks at something far "
    asked = [("фото кота", "tiny", 64), ("写真", "tiny", 64), (start + "up", "tiny", 64), (start + "off", "tiny", 64)]
    asked += [("a photo of a cat", "tiny", 64), ("a photo of a cat", "sdxl", 64), ("a photo of a cat", "tiny", 1024)]
    assert len({class_folder(*one) for one in asked}) == len(asked)
    assert class_folder("a photo of a cat", "tiny", 64).name.startswith("a-photo-of-a-cat-")
    assert class_folder("фото кота", "tiny", 64).name.startswith("фото-кота-")
    for name in ("class-00000.png", "class-00002.png", "mine.jpg"):
        (tmp_path / name).write_bytes(b"")
    assert missing_pictures(tmp_path, 5) == [1, 3]
    assert missing_pictures(tmp_path, 2) == []


def test_min_snr_caps_the_weight_and_noise_offset_moves_the_mean(pipeline):
    times = torch.tensor([0, 100, 500, 900])
    alphas = pipeline.scheduler.alphas_cumprod[times]
    ratio = alphas / (1 - alphas)
    assert torch.allclose(time_weights(pipeline, times, 5.0), ratio.clamp_max(5) / (ratio + 1), rtol=1e-4)
    assert torch.equal(time_weights(pipeline, times, None), torch.ones(4))
    plain = draw(pipeline, 4, 64, (4, 16, 16), 0, 0)
    moved = offset_noise(plain, 0.5, 0, 0).noise - plain.noise
    assert moved.std(dim=(2, 3)).max() < 1e-5
    assert float(moved[:, :, 0, 0].std()) == pytest.approx(0.5, rel=0.2)


def test_schedules_end_where_they_should():
    assert rate_factor("cosine_with_restarts", 50, 100, 0, cycles=2) == pytest.approx(1.0)
    assert rate_factor("cosine_with_restarts", 49, 100, 0, cycles=2) < 0.01
    assert rate_factor("polynomial", 50, 100, 0, power=2) == pytest.approx(0.25)
    assert rate_factor("constant_with_warmup", 4, 100, 10) == 0.5
    assert rate_factor("constant", 0, 100, 10) == 1.0
    with pytest.raises(ValueError, match="lr_scheduler is 'sine'"):
        rate_factor("sine", 5, 10, 0)


def test_preservation_is_zero_for_a_concept_that_changes_nothing_and_chooses_every_witness(pipeline, tmp_path):
    from share_diffusion.adapt import Adaptation
    from share_diffusion.learning import Denoiser, freeze
    from share_diffusion.loop import learning, opened

    freeze(pipeline)
    made = prepare_pictures(pipeline, paint(tmp_path / "a", [(64, 64)]), 64)
    empty = opened(pipeline, None, "to_q$", False)
    with learning(pipeline, empty, made, Adaptation("lora", rank=1), "to_q$", False, batch=1) as (learner, model):
        held = empty.merge({"one": learner.lora().__class__(noisy(learner.lora()))})
        keeper = Preservation(pipeline, held, model._frozen[1], made, "sks", 0)
        drawn = draw_step(pipeline, made, 1, 0, 0)
        names = {keeper.witness(drawn, step).name for step in range(20)}
        assert names == {None, "one"}
        assert all(float(keeper.loss(model, drawn, step, CPU)) < 1e-10 for step in range(3))
        with torch.no_grad():
            for name, parameter in learner.named_parameters():
                if name.endswith("beta"):
                    parameter.add_(0.2)
        loss = keeper.loss(model, drawn, 0, CPU)
        assert float(loss) > 1e-8
        loss.backward()
        assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in learner.parameters())
        assert isinstance(model, Denoiser)


def noisy(lora):
    """The LoRA's layers with random factors."""
    generator = torch.Generator().manual_seed(0)
    return {
        path: type(factors)(torch.randn(factors.up.shape, generator=generator), factors.down)
        for path, factors in lora.layers.items()
    }


DREAMBOOTH = Path(__file__).resolve().parents[2] / "shared" / "dreambooth"


@pytest.mark.real
@pytest.mark.skipif(not DREAMBOOTH.is_dir(), reason="the photographs are not there: expected in ../shared/dreambooth")
def test_photographs_of_subjects_fall_into_buckets(pipeline):
    for folder in sorted(path for path in DREAMBOOTH.iterdir() if path.is_dir()):
        data = read_dataset(folder, trigger="sks", instance_prompt=f"a photo of sks {folder.name}")
        made = prepare_pictures(pipeline, data, Framing(64, buckets=True))
        assert len(made) >= 4
        for latents, (height, width) in zip(made.latents, made.sizes, strict=True):
            assert latents.shape[2:] == (height // 4, width // 4)
            assert latents.isfinite().all()
