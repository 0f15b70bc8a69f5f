"""A person at the page, in Chromium: draw, blend, stop, compare, sweep, restore, learn, export, reload."""

import os
import time
from pathlib import Path

import pytest
from PIL import Image

from share_diffusion.drawing import read_settings
from share_diffusion.file import listing
from share_diffusion.lora import LoRA

pytestmark = pytest.mark.browser
WRITTEN = "#written textarea, #written input"
AXE = next(
    (path for path in (Path(os.environ.get("AXE_JS", "/nowhere")), Path("node_modules/axe-core/axe.min.js")) if path.is_file()),
    None,
)


def says(view, where, word):
    """Wait until a line says something."""
    view.wait_for_function(
        "([where, word]) => document.querySelector(where + ' p')?.textContent.includes(word)", arg=[where, word]
    )


def holds(view, where, wanted):
    """Wait until a field holds a value."""
    view.wait_for_function("([where, wanted]) => document.querySelector(where)?.value === wanted", arg=[where, wanted])


FRAMES = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


def quick(view, steps=4):
    """Ask for few steps, so that a test is short.

    The fields are made when their fold opens, and a slider sets its own first value once more a moment after it is there;
    no hand is that quick, a test is.
    """
    view.locator("#more > button").click()
    field = view.locator("#steps input[type=number]")
    field.wait_for()
    for _ in range(20):
        view.evaluate(FRAMES)
        field.fill(str(steps))
        field.press("Enter")
        view.evaluate(FRAMES)
        if field.input_value() == str(steps):
            return
    pytest.fail(f"the steps stay at {field.input_value()}")


def add(view, name):
    """Click a concept's card and wait for its slider."""
    view.locator(f"#cards button[data-id={name}]").click()
    view.wait_for_selector(f"#mixer li .chip[aria-label='Take {name} out']")


def tab(view, name):
    """Open a tab, out of the menu where the window is too narrow for it."""
    shown = view.get_by_role("tab", name=name, exact=True)
    if shown.count() == 0:
        view.locator("#tabs .overflow-menu > button").first.click()
        shown = view.locator("#tabs .overflow-dropdown button", has_text=name).first
    shown.click()


def pictures(server):
    return sorted((server.folder / "outputs" / "app" / "history").glob("*.png"))


def test_first_draw(view, server):
    before = len(pictures(server))
    quick(view)
    view.fill("#prompt textarea", "a red house on a beach")
    view.click("#draw")
    says(view, "#status", "1 picture in")
    assert len(pictures(server)) == before + 1
    assert read_settings(pictures(server)[-1])["prompt"] == "a red house on a beach"
    view.wait_for_selector("#canvas img")
    view.wait_for_selector("#newer[disabled]")  # nothing to turn to
    view.wait_for_selector("#older[disabled]" if before < 18 else "#older:not([disabled])")


def test_a_blend_of_two_from_cards_sliders_and_text(view, server):
    quick(view)
    add(view, "watercolor")
    holds(view, "#prompt textarea", "watercolor painting of a red house on a beach")
    add(view, "robot")
    holds(view, "#prompt textarea", "watercolor painting of a red house on a beach, robot")
    view.locator("#mixer input[type=range]").nth(1).fill("-0.35")
    holds(view, "#written textarea", "watercolor:1 + robot:-0.35")
    view.locator(WRITTEN).fill("watercolor:0.5 + robot:1.25")
    view.locator(WRITTEN).press("Enter")
    holds(view, "#mixer li:nth-child(2) input[type=range]", "1.25")
    view.locator("#mixer input[type=range]").nth(0).fill("0.75")
    view.click("#draw")  # at once: the slider's new weight must be in the picture
    says(view, "#status", "1 picture in")
    assert read_settings(pictures(server)[-1])["blend"] == "watercolor:0.75 + robot:1.25"
    view.locator("#mixer .chip").nth(0).click()
    holds(view, "#prompt textarea", "painting of a red house on a beach, robot")
    holds(view, "#written textarea", "robot:1.25")


LATE = """() => {
  const now = window.fetch;
  window.fetch = async (...call) => {
    const answer = await now(...call);
    if (String(call[0].url ?? call[0]).includes("/run/predict")) await new Promise((done) => setTimeout(done, 700));
    return answer;
  };
}"""


def test_a_slider_that_moves_before_the_page_has_answered_stays(view, server):
    """Where answers come late, what was typed and what was moved are both in the picture."""
    quick(view)
    add(view, "watercolor")
    add(view, "robot")
    view.evaluate(LATE)
    view.locator(WRITTEN).fill("watercolor:0.5 + robot:1.25")
    view.locator("#mixer input[type=range]").nth(0).fill("0.75")  # the answer to the text is still on its way
    holds(view, "#written textarea", "watercolor:0.75 + robot:1.25")
    holds(view, "#mixer li:nth-child(2) input[type=range]", "1.25")
    holds(view, "#mixer li:nth-child(1) input[type=range]", "0.75")
    view.locator("#mixer input[type=range]").nth(0).fill("0.6")
    view.click("#draw")  # waits in the queue while the slider's own answer arrives
    says(view, "#status", "1 picture in")
    assert read_settings(pictures(server)[-1])["blend"] == "watercolor:0.6 + robot:1.25"
    holds(view, "#written textarea", "watercolor:0.6 + robot:1.25")


def test_a_loud_concept_is_evened_and_let_loose_again(view, server):
    quick(view)
    add(view, "robot")
    view.wait_for_selector("#even", state="hidden")
    add(view, "blueprint")
    says(view, "#advice", "blueprint is 2.1 times as loud as robot")
    view.click("#even")
    holds(view, "#written textarea", "robot:1 + blueprint:1 | loss-equalised strength=0.5")
    view.wait_for_function("() => document.querySelector('#advice p').textContent === ''")
    view.wait_for_function("() => document.querySelector('#even').textContent.includes('Back to the plain sum')")
    view.locator("#mixer input[type=range]").nth(1).fill("0.5")
    holds(view, "#written textarea", "robot:1 + blueprint:0.5 | loss-equalised strength=0.5")
    view.click("#draw")
    says(view, "#status", "1 picture in")
    assert read_settings(pictures(server)[-1])["blend"] == "robot:1 + blueprint:0.5 | loss-equalised strength=0.5"
    view.click("#even")
    holds(view, "#written textarea", "robot:1 + blueprint:0.5")
    says(view, "#advice", "may drown it")


def test_stop_ends_a_drawing_within_a_step(view, server):
    before = len(pictures(server))
    quick(view, 150)
    view.fill("#count input[type=number]", "9")  # long enough that no hand is too late for it
    view.fill("#prompt textarea", "a cat")
    view.click("#draw")
    says(view, "#status", "of 150")
    view.click("#stop")
    says(view, "#status", "Stopped")
    time.sleep(1)
    assert len(pictures(server)) == before
    view.wait_for_selector("#draw:not([disabled])")


def test_settings_come_back_out_of_a_picture_only_when_asked(view, server):
    quick(view)
    view.fill("#prompt textarea", "a blue cat")
    view.click("#draw")
    says(view, "#status", "1 picture in")
    settings = read_settings(pictures(server)[-1])
    view.fill("#prompt textarea", "something else")
    view.locator("#restore > button").click()
    view.locator("#restore-file input[type=file]").set_input_files(pictures(server)[-1])
    view.wait_for_selector("#restore-table td:has-text('a blue cat')")
    assert view.input_value("#prompt textarea") == "something else"
    view.click("#apply")
    holds(view, "#prompt textarea", "a blue cat")
    assert view.input_value("#seed input") == str(settings["seed"])
    assert not view.is_checked("#fresh-seed input")


def test_with_and_without_lie_under_one_slider(view, server):
    quick(view)
    add(view, "robot")
    tab(view, "Compare")
    view.wait_for_function("document.querySelector('#pair-concept input')?.value === 'robot'")
    view.click("#pair-draw")
    says(view, "#pair-caption", "without robot")
    with_it, without = (read_settings(path) for path in pictures(server)[-2:])
    assert {with_it["blend"], without["blend"]} == {"robot:1", ""}
    assert with_it["seed"] == without["seed"]
    assert view.locator("#pair-slider img").count() == 2


def test_a_sweep_is_a_labelled_sheet_and_its_cells_are_kept(view, server):
    before = len(pictures(server))
    quick(view, 3)
    add(view, "robot")
    tab(view, "Compare")
    tab(view, "Sweep")
    view.wait_for_function("document.querySelector('#sweep-x input')?.value === 'robot'")
    for name, value in (("#sweep-x-count", "2"), ("#sweep-y-count", "2")):
        view.locator(f"{name} input").fill(value)
        view.locator(f"{name} input").press("Enter")
    view.click("#sweep-draw")
    says(view, "#sweep-status", "4 pictures")
    assert len(pictures(server)) == before + 4
    assert [read_settings(path)["blend"] for path in pictures(server)[-4:]].count("robot:1.5") == 2
    assert len(list((server.folder / "outputs" / "app" / "sheets").glob("*.png"))) == 1


def test_an_exported_blend_is_a_lora_that_others_read(view, tmp_path):
    add(view, "watercolor")
    view.locator("#export > button").click()
    view.click("#export-build")
    says(view, "#export-note", "watercolor.safetensors")
    with view.expect_download() as download:
        view.click("#export-download")
    download.value.save_as(tmp_path / "lora.safetensors")
    assert len(LoRA.read(tmp_path / "lora.safetensors").layers) > 10


def test_the_form_survives_a_reload(view):
    add(view, "robot")
    view.fill("#prompt textarea", "a robot, still here")
    view.locator("#prompt textarea").press("Tab")
    time.sleep(1)
    view.reload()
    holds(view, "#prompt textarea", "a robot, still here")
    view.wait_for_selector("#mixer li")
    holds(view, "#written textarea", "robot:1")


def test_a_concept_is_learned_from_the_page(view, server, tmp_path):
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.png")
        Image.radial_gradient("L").resize((64, 64)).rotate(30 * number).convert("RGB").save(paths[-1])
    before = [entry["name"] for entry in listing(server.file).concepts]
    tab(view, "Learn")
    view.locator("#learn-pictures input[type=file]").set_input_files(paths)
    view.fill("#learn-name textarea, #learn-name input", "glow")
    view.locator("#learn-steps input[type=number]").fill("10")
    view.locator("#learn-steps input[type=number]").press("Enter")
    view.set_default_timeout(600_000)
    view.click("#learn-start")
    says(view, "#learn-news", "glow is in the subspace")
    assert [entry["name"] for entry in listing(server.file).concepts] == [*before, "glow"]
    tab(view, "Draw")
    view.wait_for_selector("#cards button[data-id=glow]")


def test_of_several_pictures_the_chosen_one_is_deleted(view, server):
    quick(view)
    view.locator("#count input").fill("2")
    view.locator("#count input").press("Enter")
    view.click("#draw")
    says(view, "#status", "2 pictures")
    assert view.locator("#remove").is_disabled()
    drawn = pictures(server)[-2:]
    view.locator("#batch .thumbnail-lg").nth(1).click()
    view.wait_for_selector("#remove:not([disabled])")
    view.click("#remove")
    says(view, "#status", "Deleted")
    assert [path.exists() for path in drawn] == [True, False]


def test_a_cancelled_lesson_leaves_the_file_as_it_was(view, server, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    before = server.file.read_bytes()
    tab(view, "Learn")
    view.locator("#learn-pictures input[type=file]").set_input_files(tmp_path / "a.png")
    view.fill("#learn-name textarea, #learn-name input", "never")
    view.click("#learn-start")
    view.wait_for_selector("#learn-cancel:not([disabled])")
    view.click("#learn-cancel")
    says(view, "#learn-status", "Cancelled")
    assert server.file.read_bytes() == before


def test_hostile_names_are_text(view):
    evil = "<img src=x onerror=alert(1)> ${alert(1)} ![](http://evil.example/x)"
    view.locator(WRITTEN).fill(f'"{evil}":1')
    view.locator(WRITTEN).press("Enter")
    view.wait_for_selector("#mixer li")
    assert evil in view.inner_text("#mixer .chip")
    assert view.locator("#mixer img").count() == 0
    view.click("#draw")
    says(view, "#status", "unknown concept")
    assert view.locator("#status img").count() == 0


def test_a_message_points_at_its_character(view):
    view.locator(WRITTEN).fill("robot:0.5 + watercolor:0.3x + blueprint")
    view.click("#draw")
    says(view, "#status", "is not a number")
    view.wait_for_selector("[data-testid=toast-text]")
    for where in ("#status p", "[data-testid=toast-text]"):
        style = view.evaluate("where => ({...getComputedStyle(document.querySelector(where))})", where)
        assert style["whiteSpace"] == "pre-wrap"
        assert "mono" in style["fontFamily"]
        _, text, mark = view.locator(where).first.text_content().split("\n")
        assert text[mark.index("^") :].startswith("0.3x")


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_nothing_for_axe_to_complain_of(view, colours):
    if AXE is None:
        pytest.skip("axe-core is absent; npm install axe-core, or point AXE_JS at axe.min.js")
    view.emulate_media(color_scheme=colours)
    view.reload()
    view.wait_for_selector("#cards button")
    add(view, "robot")
    view.add_script_tag(path=str(AXE))
    for name in ("Draw", "Compare", "Learn", "Inside"):
        tab(view, name)
        time.sleep(1.5)
        found = view.evaluate(
            "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']}).then(r => r.violations.map("
            "v => v.id + ': ' + v.nodes.map(n => n.html.slice(0, 120)).join(' | ')))"
        )
        assert found == [], name


def test_a_phone_has_no_sideways_scroll(view):
    view.set_viewport_size({"width": 390, "height": 844})
    for name in ("Draw", "Compare", "Learn", "Inside"):
        tab(view, name)
        time.sleep(0.7)
        assert view.evaluate("document.documentElement.scrollWidth") <= 390, name


def test_the_keyboard_is_enough(view):
    view.locator("#cards button[data-id=robot]").focus()
    view.keyboard.press("Enter")
    view.wait_for_selector("#mixer li")
    view.locator("#mixer input[type=range]").focus()
    view.keyboard.press("ArrowRight")
    holds(view, "#written textarea", "robot:1.05")
