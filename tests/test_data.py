"""Data sets: which pictures and captions a folder gives, what is left out, and what every refusal says."""

from __future__ import annotations

import json
import os
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from share_diffusion.data import Dataset, join_datasets, read_dataset

PHOTOS = Path(__file__).parents[1].parent / "shared" / "dreambooth"
PROMPT = "a photo of a cat"


def draw(path: Path, seed: int | None = None, size: tuple[int, int] = (40, 40)) -> Path:
    """A picture file of its own colours (by its name, unless seeded)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(list(str(path).encode()) if seed is None else seed)
    Image.fromarray(colours.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def captions(data: Dataset) -> dict[str, str]:
    return {example.picture.name: example.caption for example in data.examples}


def refusal(folder: Path, **settings: object) -> str:
    with pytest.raises(ValueError) as caught:
        read_dataset(folder, **settings)  # pyright: ignore[reportArgumentType]
    return str(caught.value)


def test_the_precedence_of_captions(tmp_path: Path) -> None:
    for name in ("1 all", "2 txt", "3 caption", "4 a_red_fox_03", "5"):
        draw(tmp_path / f"{name}.png")
    write(tmp_path / "metadata.jsonl", '{"file_name": "1 all.png", "text": "from metadata"}\n\n')
    for name in ("1 all", "2 txt"):
        write(tmp_path / f"{name}.txt", "from txt")
    for name in ("1 all", "2 txt", "3 caption"):
        write(tmp_path / f"{name}.caption", "from caption")
    data = read_dataset(tmp_path, instance_prompt="from prompt", caption_from_filename=True)
    expected = ["from metadata", "from txt", "from caption", "4 a red fox", "from prompt"]
    assert list(captions(data).values()) == expected
    assert "metadata (1), .txt (1), .caption (1), the file name (1), the instance prompt (1)" in data.notes[0]
    without_names = read_dataset(tmp_path, instance_prompt="from prompt")
    assert list(captions(without_names).values()) == expected[:3] + ["from prompt"] * 2


def test_an_empty_caption_is_none(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    write(tmp_path / "a.txt", " \r\n")
    write(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": ""}')
    assert captions(read_dataset(tmp_path, instance_prompt=PROMPT)) == {"a.png": PROMPT}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a_red_fox_03.png", "a red fox"),
        ("a red fox (2).png", "a red fox"),
        ("close-up of a fox.PNG", "close-up of a fox"),
        ("4k fox.png", "4k fox"),
        ("apollo11.png", "apollo11"),
        ("cafe\u0301.png", "caf\u00e9"),
    ],
)
def test_captions_from_file_names(tmp_path: Path, name: str, words: str) -> None:
    draw(tmp_path / name)
    assert captions(read_dataset(tmp_path, caption_from_filename=True)) == {name: words}


def test_a_number_is_no_caption(tmp_path: Path) -> None:
    draw(tmp_path / "001.png")
    assert "1 of 1 pictures" in refusal(tmp_path, caption_from_filename=True)


def test_byte_order_mark_line_ends_and_upper_case_endings(tmp_path: Path) -> None:
    draw(tmp_path / "a.PNG")
    write(tmp_path / "a.TXT", b"\xef\xbb\xbfa red fox,\r\n  in the  snow\r\n")
    draw(tmp_path / "b.JPG")
    write(tmp_path / "metadata.jsonl", b'\xef\xbb\xbf{"file_name": "b.JPG", "text": "ein F\xc3\xbcchslein"}\r\n')
    assert captions(read_dataset(tmp_path)) == {"a.PNG": "a red fox, in the snow", "b.JPG": "ein Füchslein"}


def test_composed_and_decomposed_names_meet(tmp_path: Path) -> None:
    name = "cafe\u0301 猫 with space"
    folder = tmp_path / "Ordner mit Ümlaut"
    draw(folder / f"{name}.png")
    write(folder / f"{unicodedata.normalize('NFC', name)}.txt", "from txt")
    assert list(captions(read_dataset(folder)).values()) == ["from txt"]
    line = {"file_name": f"./{unicodedata.normalize('NFC', name)}.png", "text": "line \u2028 separator"}
    write(folder / "metadata.jsonl", json.dumps(line, ensure_ascii=False))
    assert list(captions(read_dataset(folder)).values()) == ["line separator"]


def test_the_trigger_is_put_in_its_place_or_in_front(tmp_path: Path) -> None:
    texts = ["a [trigger] dog, [trigger]", "a dog", "the Sks dog", "asks a dog"]
    for number, text in enumerate(texts):
        draw(tmp_path / f"{number}.png")
        write(tmp_path / f"{number}.txt", text)
    data = read_dataset(tmp_path, trigger="sks")
    assert list(captions(data).values()) == ["a sks dog, sks", "sks, a dog", "the Sks dog", "sks, asks a dog"]
    assert "trigger 'sks' put in front of 2 of 4 captions" in data.notes
    everywhere = read_dataset(tmp_path, trigger="dog")
    assert not any("put in front" in note for note in everywhere.notes)


def test_composed_and_decomposed_triggers_meet(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("cafe\u0301 on a table")
    assert read_dataset(tmp_path, trigger="caf\u00e9").examples[0].caption == "caf\u00e9 on a table"


def test_folders_of_a_table_may_hold_links_that_lead_outside(tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere.png")
    for name in ("one", "two"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        draw(tmp_path / "photos" / name / "a.png")
    (tmp_path / "photos/one/link.png").symlink_to(tmp_path / "elsewhere.png")
    parts = [read_dataset(tmp_path / "photos" / name, instance_prompt="x") for name in ("one", "two")]
    assert "link.png" in join_datasets(parts).report()


def test_a_trigger_of_signs_is_found(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    assert captions(read_dataset(tmp_path, trigger="<c+1>", instance_prompt="a <c+1> cat")) == {"a.png": "a <c+1> cat"}


def test_a_placeholder_without_a_trigger_is_refused(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    assert re.search(r"a\.png.*\.txt holds \[trigger\].*give --trigger", refusal(write_caption(tmp_path, "[trigger] cat")))


def write_caption(folder: Path, text: str | bytes) -> Path:
    write(folder / "a.txt", text)
    return folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"un caf\xe9", r"a\.txt is not UTF-8: byte 6 is 0xe9; save it as UTF-8"),
        ("a cat".encode("utf-16"), r"a\.txt is not UTF-8: byte 0 is 0xff; save it as UTF-8"),
        ("a cat".encode("utf-16-le"), r"U\+0000, which is no text; save it as UTF-8"),
        ("x" * 2001, r"\.txt has 2001 characters, at most 2000; shorten it"),
    ],
)
def test_a_bad_caption_is_refused_by_name(tmp_path: Path, text: str | bytes, message: str) -> None:
    draw(tmp_path / "a.png")
    said = refusal(write_caption(tmp_path, text))
    assert said.startswith("a.png: ")
    assert re.search(message, said)


def test_the_longest_caption_passes(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    assert len(read_dataset(write_caption(tmp_path, "x" * 2000)).examples[0].caption) == 2000


def test_a_text_that_belongs_to_no_picture_is_not_read(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    write(tmp_path / "readme.txt", b"\xff\xff")
    assert len(read_dataset(tmp_path, instance_prompt=PROMPT)) == 1


def test_every_bad_line_of_metadata_is_named_at_once(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    lines = [
        '{"file_name": "a.png", "text": "a cat"}',
        "not json",
        '{"file_name": "a.png"}',
        "[" * 100_000,
        '{"file_name": "a.png", "text": "another"}',
        r'{"file_name": "a.png", "text": 7}',
        "null",
    ]
    write(tmp_path / "metadata.jsonl", "\n".join(lines))
    said = refusal(tmp_path).split("\n")
    assert [line.split(" line ")[1][0] for line in said] == ["2", "3", "4", "5", "6", "7"]
    assert '"not json"' not in said[0]
    assert "is not JSON" in said[0]
    assert 'write it as {"file_name": "001.png", "text": "a cat"}' in said[1]
    assert "gives 'a.png' a second, different text; keep one" in said[3]


def test_metadata_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    write(tmp_path / "metadata.jsonl", b'{"file_name": "\xe9')
    assert "metadata.jsonl is not UTF-8: byte 15 is 0xe9; save it as UTF-8" in refusal(tmp_path, instance_prompt=PROMPT)


def test_half_an_escape_in_metadata_is_refused(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    write(tmp_path / "metadata.jsonl", r'{"file_name": "a.png", "text": "cat \ud83d"}')
    assert "U+D83D, which is no text" in refusal(tmp_path)


def test_metadata_for_pictures_that_are_not_there_is_noted(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    names = ["a.png", "../../b.png", "/c.png"]
    write(tmp_path / "metadata.jsonl", "\n".join(json.dumps({"file_name": name, "text": "x"}) for name in names))
    assert "captions in the metadata without a picture (2): 'b.png', 'c.png'" in read_dataset(tmp_path).notes


def test_no_captions_and_no_prompt_names_examples_and_remedies(tmp_path: Path) -> None:
    for number in range(8):
        draw(tmp_path / f"{number}.png")
    write(tmp_path / "3.txt", "has one")
    said = refusal(tmp_path)
    assert "7 of 8 pictures" in said
    assert "0.png, 1.png, 2.png, 4.png, 5.png and 2 more" in said
    for remedy in ("0.txt", "metadata.jsonl", "--instance_prompt 'a photo", "--caption_from_filename"):
        assert remedy in said


def test_kohya_folders_repeat_their_pictures(tmp_path: Path) -> None:
    draw(tmp_path / "10_sks dog" / "a.png")
    draw(tmp_path / "2_cat" / "b.png")
    draw(tmp_path / "2_cat" / "3_inner" / "not read.png")
    draw(tmp_path / "c.png")
    write(tmp_path / "2_cat" / "b.txt", "a cat")
    write(tmp_path / "metadata.jsonl", '{"file_name": "10_sks dog/a.png", "text": "a dog"}')
    data = read_dataset(tmp_path, instance_prompt=PROMPT)
    found = {(example.picture.name, example.caption, example.repeats) for example in data.examples}
    assert found == {("a.png", "a dog", 10), ("b.png", "a cat", 2), ("c.png", PROMPT, 1)}
    assert len(data) == 3
    assert "3 pictures (3 captioned, e.g. 'a cat'), 13 with repeats, 1 skipped:" in data.report()
    assert "3_inner" in data.report()


def test_a_kohya_folder_given_itself_counts_once(tmp_path: Path) -> None:
    draw(tmp_path / "10_cat" / "a.png")
    assert read_dataset(tmp_path / "10_cat", instance_prompt=PROMPT).examples[0].repeats == 1


def test_kohya_class_words_are_proposed_as_the_prompt(tmp_path: Path) -> None:
    draw(tmp_path / "10_sks dog" / "a.png")
    assert "--instance_prompt 'sks dog'" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["2024_summer", "0_cat"])
def test_a_folder_that_is_no_kohya_folder(tmp_path: Path, name: str) -> None:
    draw(tmp_path / name / "a.png")
    draw(tmp_path / "b.png")
    data = read_dataset(tmp_path, instance_prompt=PROMPT)
    assert list(captions(data)) == ["b.png"]
    assert re.search(rf"{name}: would repeat its pictures {name.split('_')[0]} times, 1 to 1000 .*rename", data.report())


def test_recursive_reads_all_subfolders(tmp_path: Path) -> None:
    for name in ("b/c/1.png", "b/2.png", "a.png", "5_dog/3.png", ".hidden/4.png", "__MACOSX/5.png"):
        draw(tmp_path / name)
    write(tmp_path / "b" / "c" / "metadata.jsonl", '{"file_name": "1.png", "text": "deep"}')
    data = read_dataset(tmp_path, recursive=True, instance_prompt=PROMPT)
    assert [(e.picture.name, e.repeats) for e in data.examples] == [
        ("3.png", 5),
        ("a.png", 1),
        ("2.png", 1),
        ("1.png", 1),
    ]
    assert captions(data)["1.png"] == "deep"
    assert data.skipped == ()


def test_only_subfolders_is_an_error_that_names_them(tmp_path: Path) -> None:
    for name in ("dog", "cat"):
        draw(tmp_path / name / "a.png")
    said = refusal(tmp_path, instance_prompt=PROMPT)
    assert f"{tmp_path} holds no pictures, only subfolders; point --instance_data_dir at one of: cat, dog" in said


def test_an_empty_folder_and_one_without_pictures(tmp_path: Path) -> None:
    assert re.search("holds no pictures, at least 1 is needed; put .bmp .jpeg .jpg .png .webp files", refusal(tmp_path))
    write(tmp_path / "notes.txt", "x")
    assert "holds no pictures" in refusal(tmp_path)


def test_a_missing_folder_names_the_nearest(tmp_path: Path) -> None:
    for name in ("watercolor", "dog", "cat"):
        (tmp_path / name).mkdir()
    assert re.search("no folder watercolour in .*did you mean watercolor\\?", refusal(tmp_path / "watercolour"))
    assert re.search("did you mean cat, dog, watercolor\\?", refusal(tmp_path / "xyzzy"))
    assert re.search("nor its parent .*no; check the path", refusal(tmp_path / "no" / "where"))
    assert "holds no folders; check the path" in refusal(tmp_path / "cat" / "where")


def test_a_file_is_no_folder_and_all_wrong_settings_are_named(tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.png")
    said = refusal(picture, trigger=" ", instance_prompt="", minimum_side=0).split("\n")
    assert said == [
        f"{picture} is a picture, a folder of pictures is needed; give its folder: {tmp_path}",
        "trigger is ' ', at least one word is needed; leave it out to go without",
        "instance_prompt is '', at least one word is needed; leave it out to go without",
        "minimum_side is 0, at least 1 pixel is needed; 32 is the default",
    ]
    assert "is a file" in refusal(write(tmp_path / "a.zip", "x"))


def test_what_is_ignored_and_what_is_skipped_with_a_reason(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "c.jpeg", "d.webp", "e.bmp", "f.PNG", "g.png", "h.png"):
        draw(tmp_path / name)
    for name in (".a.png", ".DS_Store", "Thumbs.db", "a.npz", "a.json", "concept.toml", "__MACOSX/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "x")
    bad = {"1.heic": ".heic is not read", "2.svg": ".svg", "3.GIF": ".gif", "4.png": "begins with b'<html>'"}
    for name in bad:
        write(tmp_path / name, "<html>")
    write(tmp_path / "5.jpg", (tmp_path / "b.jpg").read_bytes()[:600])
    write(tmp_path / "6.png", "")
    os.mkfifo(tmp_path / "7.png")
    draw(tmp_path / "8.png", size=(31, 400))
    data = read_dataset(tmp_path, instance_prompt=PROMPT)
    assert len(data) == 8
    reasons = {path.name: reason for path, reason in data.skipped}
    bad |= {"5.jpg": "damaged or cut off", "6.png": "empty", "7.png": "not a regular file"}
    bad |= {"8.png": "has 31 x 400 pixels, its shorter side needs 32; use a larger copy"}
    assert reasons.keys() == bad.keys()
    assert all(word in reasons[name] for name, word in bad.items())
    assert all(";" in reason for reason in reasons.values())  # each with its remedy


def test_a_pipe_for_a_caption_does_not_block(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    os.mkfifo(tmp_path / "a.txt")
    data = read_dataset(tmp_path, instance_prompt=PROMPT)
    assert data.skipped == ((tmp_path / "a.txt", "is not a regular file; remove it"),)


def test_minimum_side_is_a_setting(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", size=(31, 400))
    assert len(read_dataset(tmp_path, instance_prompt=PROMPT, minimum_side=31)) == 1


def test_more_bad_pictures_than_good_ones_is_an_error_that_lists_all(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw(tmp_path / f"{name}.png")
        write(tmp_path / f"bad {name}.png", "<html>")
    assert len(read_dataset(tmp_path, instance_prompt=PROMPT)) == 2  # half
    write(tmp_path / "bad c.heic", "x")
    write(tmp_path / "metadata.jsonl", "not json")
    said = refusal(tmp_path)
    assert re.search("^3 of 5 pictures in .* cannot be used, at most half may fail; mend or remove them:\n", said)
    for expected in ("bad a.png: ", "bad b.png: ", "bad c.heic: ", "metadata.jsonl line 1", "2 of 2 pictures"):
        assert expected in said


def test_one_bad_picture_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.png", "<html>")
    assert re.search(r"1 of 1 pictures.*\n  a\.png: cannot be recognised.*save it again", refusal(tmp_path))


def test_links_are_followed_only_within_the_folder(tmp_path: Path) -> None:
    outside = draw(tmp_path / "outside" / "x.png")
    write(tmp_path / "outside" / "a.txt", "a secret")
    folder = tmp_path / "data"
    draw(folder / "a.png")
    (folder / "b.png").symlink_to("a.png")
    (folder / "out.png").symlink_to(outside)
    (folder / "a.txt").symlink_to(tmp_path / "outside" / "a.txt")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "10_loop").symlink_to(".")
    (tmp_path / "entrance").symlink_to(folder)
    for door in (folder, tmp_path / "entrance"):
        data = read_dataset(door, instance_prompt=PROMPT, recursive=True)
        assert captions(data) == {"a.png": PROMPT, "b.png": PROMPT}
        reasons = {path.name: reason for path, reason in data.skipped}
        assert reasons.keys() == {"out.png", "a.txt", "loop.png", "10_loop"}
        assert "leaves the folder" in reasons["out.png"]
        assert "leaves the folder" in reasons["a.txt"]
        assert "loops" in reasons["loop.png"]
        assert "link to a folder" in reasons["10_loop"]


def test_exact_copies_are_noted_and_stay(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        draw(tmp_path / name, seed=1 if name != "b.png" else 2)
    data = read_dataset(tmp_path, instance_prompt=PROMPT)
    assert len(data) == 3
    assert "exact copies, which count again (1): c.png = a.png" in data.notes


def test_the_order_is_natural_and_does_not_depend_on_the_disk(tmp_path: Path) -> None:
    names = ["1.png", "2.png", "10.png", "a2.png", "A3.png", "a10.png", "B.png", "\u00e9.png", "猫.png"]
    for name in random.Random(0).sample(names, len(names)):
        draw(tmp_path / name)
    data = read_dataset(tmp_path, instance_prompt=PROMPT)
    assert list(captions(data)) == names


def test_the_fingerprint_sees_content_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    draw(folder / "a.png", seed=1)
    draw(folder / "b.png", seed=2)
    write_caption(folder, "a cat")

    def fingerprint(**settings: str) -> str:
        return read_dataset(folder, **({"instance_prompt": PROMPT} | settings)).fingerprint  # pyright: ignore

    first = fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", first)
    os.utime(folder / "a.png", (1, 1))
    write(folder / "unrelated.json", "x")
    assert fingerprint() == first
    folder = folder.rename(tmp_path / "two")
    assert fingerprint() == first
    seen = {first, fingerprint(trigger="sks"), fingerprint(instance_prompt="another")}
    write_caption(folder, "a cat!")
    seen.add(fingerprint())
    write_caption(folder, "a cat")
    assert fingerprint() == first
    draw(folder / "a.png", seed=3)
    seen.add(fingerprint())
    draw(folder / "a.png", seed=1)
    with (folder / "a.png").open("ab") as file:
        file.write(b"\0")  # no pixel changes, the file does
    seen.add(fingerprint())
    draw(folder / "a.png", seed=1)
    draw(folder / "c.png", seed=4)
    seen.add(fingerprint())
    (folder / "c.png").rename(folder / "0.png")  # another order is another run
    seen.add(fingerprint())
    assert len(seen) == 8


def test_the_report(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", seed=1)
    draw(tmp_path / "b\x1b[31m\n.png", seed=1)
    write(tmp_path / "c.heic", "x")
    write_caption(tmp_path, "a watercolor of a fox that goes on " * 9)
    lines = read_dataset(tmp_path, instance_prompt="p", trigger="wtr").report().split("\n")
    assert lines[0].startswith("2 pictures (2 captioned, e.g. 'wtr, a watercolor of a fox")
    assert lines[0].endswith("...'), 1 skipped:")
    assert len(lines[0]) < 120
    assert lines[1].startswith("  c.heic: .heic is not read")
    assert lines[2:] == [
        "captions from .txt (1), the instance prompt (1)",
        "trigger 'wtr' put in front of 2 of 2 captions",
        r"exact copies, which count again (1): b\x1b[31m\n.png = a.png",
    ]


@pytest.mark.real
def test_photographs() -> None:
    if not PHOTOS.is_dir():
        pytest.skip("the photographs are not there: shared/dreambooth beside the repository")
    data = read_dataset(PHOTOS / "cat", instance_prompt="a photo of [trigger] cat", trigger="sks")
    assert len(data) == len(list((PHOTOS / "cat").glob("*.jpg")))
    assert data.skipped == ()
    assert {example.caption for example in data.examples} == {"a photo of sks cat"}
    assert "one of: backpack, cat, dog" in refusal(PHOTOS)
