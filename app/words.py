"""Every English sentence of the page, in one place."""

from __future__ import annotations

from typing import Any


class Words:
    """What the page says, by what it is for."""

    title = "Share"
    not_done = "Not done"
    unexpected = "Something went wrong on this side; the terminal tells more."

    tab_draw = "Draw"
    tab_compare = "Compare"
    tab_regions = "Regions"
    tab_learn = "Learn"
    tab_inside = "Inside"

    prompt = "Prompt"
    prompt_hint = "a robot on a beach  (Shift+Enter draws)"
    blend = "Blend"
    blend_empty = "Choose concepts from the cards. Each gets a slider."
    written = "Blend as text"
    written_hint = "watercolor:0.8 + robot:0.5"
    draw = "Draw"
    stop = "Stop"
    count = "Pictures"
    seed = "Seed"
    fresh_seed = "New seed each time"
    more = "More settings"
    negative = "Negative prompt"
    steps = "Steps"
    guidance = "Guidance"
    sampler = "Sampler"
    width = "Width"
    height = "Height"

    canvas = "Picture"
    batch = "Pictures just drawn"
    idle = "Ready."
    waiting = "Waiting for the model …"
    stopped = "Stopped; nothing was kept."
    history = "History"
    history_empty = "What you draw appears here and stays after a restart."
    take_settings = "Use its settings"
    remove_picture = "Delete it"
    removed = "Deleted."
    newer = "Newer"
    older = "Older"

    concepts = "Concepts"
    search = "Search"
    search_hint = "name or trigger"
    kind = "Kind"
    kinds = (("All", "all"), ("Styles", "style"), ("Subjects", "subject"))
    concepts_empty = "No concept is called that."
    no_subspace = (
        "No concept has been learned yet. One command makes a subspace with eight: "
        "accelerate launch train/sequence.py --concepts watercolor blueprint robot owl mosaic neon penguin embroidery"
        " — or teach your own under Learn."
    )

    def gone(self, name: str) -> str:
        """Say that the open file was moved or deleted."""
        return f"The subspace file {name} is not there any more; put it back, or start again with another --subspace."

    previous = "Previous"
    next = "Next"

    restore = "Settings from a picture"
    restore_file = "Drop a picture drawn here"
    restore_table = "What would change"
    restore_none = "There are no settings of this page in that picture."
    restore_sheet = "That picture is a sheet of several; its cells are in the history, each with settings of its own."
    restore_same = "That picture has the settings that are set already."
    masks = "Painted regions"
    now = "Now"
    then = "In the picture"
    apply = "Apply"
    cancel = "Cancel"
    applied = "Settings taken over."

    export = "Export this blend"
    export_format = "Format"
    export_name = "File name"
    export_build = "Build the file"
    export_download = "Download"

    tab_pair = "Two pictures"
    tab_sweep = "Sweep"
    tab_strip = "Strip"
    no_concept = "no concept"
    pair_concept = "With and without"
    pair_choose = "No concept is chosen; choose one of the blend."
    pair_draw = "Draw both"
    pair_history = "Or any two from the history"
    pair_hint = "Click one, then another."
    pair_second = "Now click the other one."
    pair_slider = "Two pictures under a slider"
    sweep_x = "Across: weight of"
    sweep_y = "Down: seed, or weight of"
    sweep_from = "From"
    sweep_to = "To"
    sweep_count = "Cells"
    sweep_choose = "One side of the sweep changes nothing; choose a concept for it, or the seed."
    sweep_draw = "Draw the sweep"
    sweep_note = "Prompt, blend and settings are those under Draw. Every cell goes into the history with its own settings."
    strip_from = "From the blend"
    strip_to = "To the blend"
    strip_draw = "Draw the strip"
    strip_film = "Download as film (GIF)"

    def pair_caption(self, left: str, right: str) -> str:
        """Say what lies on either side of the slider."""
        return f"Left: {left}. Right: {right}."

    def cells(self, count: int) -> str:
        """Say how many pictures were drawn."""
        return f"{count} pictures, all in the history"

    region_canvas = "Paint where each concept acts"
    region_note = (
        "Each layer belongs to one concept of the blend: choose the layer in the painting's toolbar, paint where the concept "
        "shall act, and draw. What is not painted for it stays without it. Only what is on the painting counts."
    )
    region_draw = "Draw with these regions"

    def region_twice(self, name: str) -> str:
        """Say that painting would make two terms of a concept the same."""
        return f"{name!r} stands in the blend more than once; leave one of its terms under Draw, then paint"

    def region_layer(self, index: int) -> str:
        """Name a layer."""
        return f"Layer {index + 1}"

    inside_overlap = "Who overlaps whom"
    inside_overlap_note = (
        "Cosine of two concepts' updates: 0 is independent, 1 the same. From a quarter on, expect some bleed in a blend."
    )
    inside_retention = "What adding each concept did to the earlier ones"
    inside_retention_note = "Share of each concept's own energy that is certainly still held, after each step of learning."
    inside_bytes = "What it costs"
    inside_measuring = "Measuring the subspace…"
    inside_spectrum = "How full the shared directions are"
    inside_spectrum_note = "Share of all concepts' energy beyond the first n directions, mean over the layers of a group."
    inside_head = ("Concept", "Kind", "Trigger", "Rank", "Bytes", "Retention")

    def cost(self, facts: dict[str, Any]) -> str:
        """Say what the file costs against separate LoRAs."""
        many = facts["break_even_concepts"]
        text = (
            f"A further concept costs {facts['per_concept_mean']:,.0f} bytes and the columns it adds. This file has "
            f"{facts['total']:,}; the same concepts as separate LoRAs of the same ranks have {facts['as_separate_loras']:,}."
        )
        if not many:
            return text
        return f"{text} The file is the smaller one from {'the first concept' if many == 1 else f'{many:,} concepts'} on."

    def overlaps(self, one: str, other: str, cosine: float, advice: str) -> str:
        """Say before drawing that two concepts overlap."""
        return f"{one} and {other} overlap {100 * cosine:.0f} %: {advice}."

    def uneven(self, loud: str, quiet: str, times: float) -> str:
        """Say before drawing that one concept is likely to drown another."""
        return f"{loud} is {times:.1f} times as loud as {quiet} and may drown it."

    even = "Even them out"
    even_no_more = "Back to the plain sum"

    learn_pictures = "Pictures of it (5 to 30)"
    learn_name = "Name"
    learn_trigger = "Trigger"
    learn_trigger_hint = "the name, if empty"
    learn_steps = "Steps"
    learn_start = "Learn"
    learn_loss = "Loss"
    learn_sample = "Sample so far"
    learn_idle = "Drop pictures of one thing or one style, name it, and learn. Earlier concepts stay as they are."
    learn_starting = "Starting …"
    learn_cancelling = "Cancelling; the subspace file stays as it was."

    def lesson(self, state: str, step: int, steps: int, problem: str) -> str:
        """Say how a lesson stands."""
        return {
            "starting": "Loading the base …",
            "learning": f"Step {step} of {steps}",
            "merging": "Merging into the subspace …",
            "done": "Learned. Its card is under Draw.",
            "cancelled": "Cancelled. The subspace file is as it was.",
            "failed": f"Not learned; the subspace file is as it was. {problem}",
        }[state]

    def learned(self, name: str, retention: dict[str, float]) -> str:
        """Say what was kept of everything."""
        kept = ", ".join(f"{other} {share:.4f}" for other, share in list(retention.items())[-6:])
        return f"{name} is in the subspace. Retention now: {kept}"

    def exported(self, name: str, size: int) -> str:
        """Say what was written."""
        return f"{name}, {size:,} bytes"

    def facts(self, base: str, file: str, count: int) -> str:
        """Say what is open."""
        return f"{base} · {file or 'no subspace file'} · {count:,} concept{'' if count == 1 else 's'}"

    def page(self, number: int, pages: int, count: int) -> str:
        """Say which page of how many things is shown."""
        return f"{count:,} · page {number + 1:,} of {pages:,}" if pages > 1 else f"{count:,}"

    def step(self, step: int, steps: int) -> str:
        """Say how far a drawing is."""
        return f"Step {step} of {steps}"

    def drawn(self, count: int, seconds: float, seed: int) -> str:
        """Say what was drawn."""
        seeds = f"seed {seed}" if count == 1 else f"seeds {seed} to {seed + count - 1}"
        return f"{count} picture{'' if count == 1 else 's'} in {seconds:.1f} s, {seeds}"


WORDS = Words()
