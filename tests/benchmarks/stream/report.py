"""The report: everything that the cells say, as Markdown, a summary in JSON and figures, made again by one command."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean
from typing import Any

from stream import figures
from stream.breakdown import breakdown, headline
from stream.cells import Row, Table
from stream.claims import claims, targets
from stream.gates import Gate, gates
from stream.plan import Plan, tomllib
from stream.scores import (
    HEADLINE,
    Study,
    deviation,
    distinct,
    facts,
    final,
    forgetting,
    judge,
    present,
    relative_judge,
    study,
)
from stream.transfer import transfer
from stream.weights import read, section

KEYS = (
    *("normalised", "normalised_judge", "forgetting", "forgetting_judge", "adherence"),
    *("bytes_per_concept", "bytes_total", "trainable", "steps_to_95"),
)
ORDER = "Order of the stream"  # a table of the headline methods, not of the plan's ablations
UNTRAINED = ("base", "compressed", "merged")  # made of own LoRAs that are there already
PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pillow")


def write_report(plan: Plan, table: Table, results: Path) -> dict[str, Any]:
    """Write report.md, summary.json and the figures of a plan's cells; returns the summary."""
    found, results = study(plan, table), Path(results)
    results.mkdir(parents=True, exist_ok=True)
    checked = gates(found)
    finished = [name for name in plan.methods if found.complete(name)]
    lines = {name: facts(found, name) for name in finished}
    shared = pairs_of_all(found)
    summary = {
        "valid": bool(found.horizon) and all(gate.holds for gate in checked),
        "concepts": found.horizon,
        "orders": len({order for order, _ in shared}),
        "seeds": len({seed for _, seed in shared}),
        "methods": lines,
    }
    (results / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    draw_figures(found, lines, results)
    (results / "report.md").write_text(text_of(found, summary, checked, results), encoding="utf-8")
    return summary


def pairs_of_all(found: Study) -> set[tuple[int, int]]:
    """Return the (order, seed) pairs that every headline method has been through; for own LoRAs the order has no say."""
    pairs = [set(found.complete(name)) for name in found.headline]
    return set.intersection(*pairs[1:]) if len(pairs) > 1 else set()


def draw_figures(found: Study, lines: Mapping[str, Mapping[str, Any]], results: Path) -> None:
    """Draw every figure of the report."""
    names = plain(found, lines)
    figures.heat_maps(found, ("share", "sequential_lora", "paper"), results / "matrices.png")
    figures.quality_against_bytes(found, {name: lines[name] for name in names}, results / "quality_bytes.png")
    kinds = {name: found.plan.methods[name]["kind"] for name in names}
    trained = [name for name in names if kinds[name] in ("own_lora", "share", "sequential", "paper")]
    figures.learning_curves(found, trained, results / "curves.png")
    figures.over_the_stream(found, [name for name in trained if kinds[name] != "own_lora"], results / "stream.png")
    figures.adherence_and_identity(found, names, results / "scales.png")
    shown = ("base", "own_lora", "share", "sequential_lora", "paper")
    figures.contact_sheet(found, shown, results / "pictures", results / "forgetting.png")


def plain(found: Study, lines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the methods that something was learned by and that are no variant of an ablation."""
    return [name for name in lines if name != "base" and "table" not in found.plan.methods[name]]


def text_of(found: Study, summary: Mapping[str, Any], checked: Sequence[Gate], results: Path) -> str:
    """Return the whole report."""
    weights, concluded = read(results / "weights.csv"), conclusions(results)
    long = read_long(found.plan.concepts, results)
    parts = [
        "# The continual benchmark",
        introduction(found, summary),
        "## Gates",
        gate_table(checked),
        "## Methods",
        method_table(found, summary["methods"]),
        breakdown(found, plain(found, summary["methods"])),
        headline(found),
        fresh(results),
        figure("quality_bytes.png", "score against bytes", results),
        figure("stream.png", "score over the stream", results),
        figure("scales.png", "pictures that show the concept over adherence, at several scales of the weight", results),
        "## Every concept after every other",
        figure("matrices.png", "R: rows after each concept, columns concepts", results),
        figure("forgetting.png", "two prompts a concept at the same seeds: the base, when learned and at the end", results),
        "## Learning speed and transfer",
        figure("curves.png", "score over steps", results),
        transfer(found),
        "## What was to be reached",
        targets(found, summary["methods"], weights, long),
        "## The paper's claims, measured here",
        claims(found, summary["methods"], weights),
        ablations(found, concluded),
        orders(found, concluded),
        section(weights, results / "retention.png"),
        long_stream(long),
        elsewhere(results),
        notes(results),
        "## Progress and cost",
        progress(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def introduction(found: Study, summary: Mapping[str, Any]) -> str:
    """Return what was run, at which commit, with which versions."""
    commits = sorted({row["commit"] for row in found.rows if row["commit"]})
    training, measures = found.plan.training, found.plan.measures
    verdict = "valid" if summary["valid"] else "**not valid: a gate is broken or was not measured**"
    return (
        f"Written by `python tests/benchmarks/continual.py --report_only` from `cells.csv` ({len(found.rows)} cells). "
        f"Base `{found.plan.base}`; compared after **{summary['concepts']} of {len(found.plan.concepts)} concepts**, "
        f"{summary['orders']} order(s), {summary['seeds']} seed(s), {len(pairs_of_all(found))} of their "
        f"{summary['orders'] * summary['seeds']} pairs by all of {', '.join(found.headline[1:])}; this run is {verdict}.\n\n"
        f"Order 0: {', '.join(found.plan.concepts)}. Every concept has {training.steps} steps of batch {training.batch} for "
        f"every method, the same pictures, noise and prompts. Loss is measured at fixed noise on {measures.held_out} "
        f"pictures in combinations that nothing was trained on; the judge sees {measures.pictures} pictures of a "
        f"concept at other unseen prompts, {measures.sampling_steps} steps each. A score of 1 is the concept's own "
        f"LoRA, 0 the untouched base.\n\nMeasured at {named(commits)} with {versions()}."
    )


def named(commits: Sequence[str]) -> str:
    """Return which commits these are, or where they stand where they are many."""
    few = ", ".join(commits) or "no commit"
    return few if len(commits) <= 6 else f"{len(commits)} commits, each cell's beside it in `cells.csv`,"


def versions() -> str:
    """Return the versions of what everything rests on."""
    known = []
    for package in PACKAGES:
        try:
            known.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"Python {platform.python_version()}, {', '.join(known)}"


def gate_table(checked: Sequence[Gate]) -> str:
    """Return the gates as a table."""
    lines = ["| gate | found | asked | holds |", "|---|---|---|---|"]
    for gate in checked:
        shown = "not measured" if gate.found is None else f"{gate.found:.4g}"
        lines.append(f"| {gate.name} | {shown} | {gate.asked} | {'yes' if gate.holds else '**no**'} |")
    return "\n".join(lines)


def method_table(found: Study, lines: Mapping[str, Mapping[str, Any]]) -> str:
    """Return every finished method's line, with deviations over orders and seeds where there are several."""
    out = [
        "| method | streams | score | forgetting | judge | judge forgets | adherence | bytes a further concept | bytes in all "
        "| trainables | steps to 95 % | what it is |",
        "|---|" + "---|" * 11,
    ]
    for name, line in lines.items():
        if "table" in found.plan.methods[name]:
            continue
        matrices, pairs, judged = found.complete(name), distinct(found, name), relative_judge(found, name)
        score = spread(line["normalised"], present(final(matrices[pair], found.horizon, found.rho) for pair in pairs))
        pictures = spread(line["normalised_judge"], [judged[pair] for pair in pairs if pair in judged])
        streams = f"{len(matrices)}" + (f", {len(pairs)} distinct" if len(pairs) < len(matrices) else "")
        about = found.plan.methods[name].get("about", "")
        out.append(
            f"| `{name}` | {streams} | {score} | {shown(line['forgetting'], 4)} | {pictures} "
            f"| {shown(line['forgetting_judge'], 3)} | {shown(line['adherence'], 3)} | {count(line['bytes_per_concept'])} "
            f"| {count(line['bytes_total'])} | {count(line['trainable'])} | {count(line['steps_to_95'])} | {about} |"
        )
    note = (
        "Score: share of the own LoRA's gain in held-out loss, mean over all concepts after the last one; below 0 it is worse "
        "than the untouched base. Forgetting: how much of a concept's best score is gone at the end. Judge: the share of "
        "pictures in which an independent classifier sees the concept, relative to the own LoRAs' share. Adherence: the share "
        "of what a prompt asks for besides the concept that the classifier sees. Bytes: of Share's files whole, names "
        "included, of LoRAs' as files, of the rest their numbers in half precision; columns measured on the base take four "
        "bits and coefficients in such columns or in those of a seed eight; columns drawn from a seed or taken from the "
        "base's weights are stored nowhere. Steps to 95 %: the median over concepts after the first, at the watched steps of "
        "a decaying learning rate; empty where most never get there. ±: the standard deviation over distinct streams; where "
        "bases never change, the orders of a seed come to the same, to the bit."
    )
    return "\n".join(out) + "\n\n" + note


def spread(middle: float | None, values: Sequence[float]) -> str:
    """Return a mean with the standard deviation of what it is of, as a cell."""
    sigma = deviation(values)
    return shown(middle, 3) + (f" ± {sigma:.3f}" if sigma is not None else "")


def shown(value: float | None, digits: int) -> str:
    """Return a number for a table, empty for None."""
    return "" if value is None else f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """Return a whole number for a table, empty for None."""
    return "" if value is None else f"{value:,}"


def figure(name: str, about: str, results: Path) -> str:
    """Return a figure's line where it was drawn."""
    return f"![{about}]({name})" if (results / name).exists() else ""


def ablations(found: Study, concluded: Mapping[str, str]) -> str:
    """Return one table for each `table` that the plan's methods name, with what people concluded from it."""
    methods, out = found.plan.methods, []
    for title in dict.fromkeys(method["table"] for method in methods.values() if "table" in method):
        variants = [name for name, method in methods.items() if method.get("table") == title and reached(found, name)]
        if not variants:
            continue
        known: list[str] = []
        for name in variants:
            for beside in methods[name].get("beside", ()):
                label = f"`{beside}`" + (f", {methods[beside]['about']}" if "table" in methods[beside] else "")
                if (row := ablation_row(found, beside, reached(found, name), label)) not in known:
                    known.append(row)
            known.append(ablation_row(found, name, reached(found, name), methods[name].get("about", name)))
        head = "| variant | concepts | score | forgetting | judge | bytes in all | bytes of a further concept |"
        lines = [f"### {title}", "", head, "|---|" + "---|" * 6, *(row for row in known if row)]
        out.append("\n".join([*lines, "", concluded[title]] if title in concluded else lines))
    about = "Order 0, seed 0, no deviation known; pictures are 16 a concept, told as a share of the own LoRAs'."
    return "\n\n".join(["## Ablations", about, *out]) if out else ""


def orders(found: Study, concluded: Mapping[str, str]) -> str:
    """Return what each order of the stream came to, for every method that went through several; means over seeds."""
    last, numbers, lines = found.horizon, range(found.plan.orders), []
    for name in found.plan.methods:
        streams = found.complete(name)
        if len({order for order, _ in streams}) < 2:
            continue
        cells = []
        for number in numbers:
            some = [one for (order, _), one in streams.items() if order == number]
            scores, lost = (present(how(one, last, found.rho) for one in some) for how in (final, forgetting))
            cells.append(f"{mean(scores):.3f} / {shown(mean(lost), 3)} ({len(some)})" if scores and lost else "")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    if not lines:
        return ""
    head = f"| method | {' | '.join(f'order {number}' for number in numbers)} |"
    about = "Score after the last concept / forgetting (seeds):"
    body = "\n".join([head, "|---|" + "---|" * len(numbers), *lines])
    return "\n\n".join(part for part in (f"### {ORDER}", about, body, concluded.get(ORDER)) if part)


def conclusions(results: Path) -> dict[str, str]:
    """Return what people concluded from the ablations' tables, by title."""
    file = results / "conclusions.toml"
    return tomllib.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def reached(found: Study, name: str) -> int:
    """Return how many concepts every begun stream of a method has learned, at most as many as the plan asks for."""
    begun = [one.reached for one in found.matrices.get(name, {}).values() if one.reached]
    return min([*begun, found.plan.length(name)]) if begun else 0


def ablation_row(found: Study, name: str, last: int, about: str) -> str:
    """Return a method's line after so many concepts, order 0 and seed 0; empty where it has not come so far."""
    one = found.matrices.get(name, {}).get((0, 0))
    if one is None or not last or one.reached < last:
        return ""
    score, lost = final(one, last, found.rho), forgetting(one, last, found.rho)
    own = found.matrices.get("own_lora", {}).get((0, 0))
    theirs, accepted = final(own, last, judge) if own else None, final(one, last, judge)
    pictures = accepted / theirs if accepted is not None and theirs else None
    end: Row = one.rows[last, one.names[last - 1]]
    if score is None:
        return ""
    cells = (
        f"{score:.3f}",
        shown(lost, 4),
        shown(pictures, 3),
        *(count(2 * end[key]) for key in ("numbers", "concept_numbers")),
    )
    return f"| {about} | {last} | {' | '.join(cells)} |"


def fresh(results: Path) -> str:
    """Return what came out on concepts that nothing was chosen on, a plan and a report of their own, where that was run."""
    place = results.with_name(f"{results.name}_fresh")
    if not (place / "summary.json").exists():
        return ""
    said = json.loads((place / "summary.json").read_text(encoding="utf-8"))
    lines = ["| method | score | judge | adherence | bytes in all |", "|---|---|---|---|---|"]
    for name, line in said["methods"].items():
        cells = (shown(line[key], 3) for key in ("normalised", "normalised_judge", "adherence"))
        lines.append(f"| `{name}` | {' | '.join(cells)} | {count(line['bytes_total'])} |")
    about = (
        f"The defaults were chosen on the concepts of this stream. On {said['concepts']} others, on which nothing was chosen, "
        f"with the same settings, {said['seeds']} seed(s) ([report](../{place.name}/report.md)):"
    )
    return "\n".join(["### Concepts that nothing was chosen on", "", about, "", *lines])


def read_long(concepts: Sequence[str], results: Path) -> dict[str, Any] | None:
    """Return what the long stream came to that begins with these concepts, None where it was not run."""
    file = results.parent / "long_stream.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    return found if found and set(next(iter(found["first_ten"].values()))) == set(concepts) else None


def long_stream(found: Mapping[str, Any] | None) -> str:
    """Return how the first ten concepts, the file and a merge fare while fifty are learned, where that was run."""
    if found is None:
        return ""
    scores = dict(zip(found["first_ten"], found["first_ten_score"], strict=True))
    size = {row["concepts"]: (row["file_bytes"], row["merge_seconds"]) for row in found["rows"]}
    each = found["separate_loras_bytes"] / found["concepts"]
    lines = ["| concepts | score of the first ten | lowest retention | bytes | LoRAs' bytes / these | a merge, s |"]
    lines.append("|---|" + "---|" * 5)
    for count, score in scores.items():
        retention = min(entry["retention"] for entry in found["first_ten"][count].values())
        total, seconds = size[int(count)]
        lines.append(f"| {count} | {score:.4f} | {retention:.4f} | {total:,} | {int(count) * each / total:.1f} | {seconds} |")
    head = (
        f"## {found['concepts']} concepts\n\n`python tests/benchmarks/long_stream.py`: the ten concepts of this stream, then "
        f"further ones for {found['steps_of_later_concepts']} steps each, in one file; of the first ten none loses more than "
        f"{found['first_ten_lose_at_most']:g} of its LoRA's gain. How good the later ones are, after so few steps, was not "
        "measured: it is the first ten, the bytes and the time that this is about."
    )
    return head + "\n\n" + "\n".join(lines)


def elsewhere(results: Path) -> str:
    """Return what the same core does on models that draw nothing, where it was run."""
    file = results / "elsewhere.json"
    if not file.exists():
        return ""
    lines = ["| stream | what | accuracy, mean | worst task | forgotten | numbers in all |", "|---|---|---|---|---|---|"]
    for name, runs in json.loads(file.read_text(encoding="utf-8")).items():
        whole, tasks = runs[0]["loras_numbers"], len(runs[0]["base"])
        kept = [("base", [run["base"] for run in runs], 0), ("own_lora", [run["own_lora"] for run in runs], whole)]
        lines += [f"| {name} | `{kind}` | {accuracy(scores)} | 0 | {numbers:,} |" for kind, scores, numbers in kept]
        streams = [("`sequential_lora`", [run["sequential_lora"] for run in runs], whole // tasks)]
        for way in runs[0]["share"]:
            each = [run["share"][way] for run in runs]
            streams.append((f"Share, `{way}`", each, round(mean(one["numbers"] for one in each))))
        for kind, each, numbers in streams:
            ends, firsts = ([one[when] for one in each] for when in ("at_the_end", "when_learned"))
            lost = mean(mean(first.values()) - mean(end.values()) for first, end in zip(firsts, ends, strict=True))
            lines.append(f"| {name} | {kind} | {accuracy(ends)} | {lost:.4f} | {numbers:,} |")
    head = f"Accuracy over the tasks of a stream, {len(runs)} seed(s) (`--elsewhere`); bases and coefficients are counted:"
    return "\n".join(["## The same core elsewhere", "", head, "", *lines])


def accuracy(runs: Sequence[Mapping[str, float]]) -> str:
    """Return mean and worst accuracy over tasks and seeds, as two cells."""
    return f"{mean(mean(run.values()) for run in runs):.3f} | {min(min(run.values()) for run in runs):.3f}"


def notes(results: Path) -> str:
    """Return what people wrote down beside the figures: what did not work, and why."""
    file = results / "notes.md"
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""


def progress(found: Study) -> str:
    """Return what is finished and what the rest costs at most; a method without a cell goes at the others' pace.

    Finished variants of an ablation are counted, not listed.
    """
    out = ["| method | streams asked for | finished | seconds a concept | hours left |", "|---|---|---|---|---|"]
    pace = {
        name: [row["seconds"] for row in found.rows if row["method"] == name and row["seconds"] != ""]
        for name in found.plan.methods
    }
    usual = mean(second for seconds in pace.values() for second in seconds) if any(pace.values()) else 0.0
    total, variants = 0.0, 0
    for name, settings in found.plan.methods.items():
        asked, length = found.plan.runs(name), found.plan.length(name)
        reached = [found.matrices.get(name, {}).get(pair) for pair in asked]
        left = sum(length - (one.reached if one else 0) for one in reached)
        each = 0.0 if settings["kind"] in UNTRAINED else mean(pace[name] or [usual])
        total += (hours := left * each / 3600)
        done = sum(1 for one in reached if one and one.reached == length)
        if "table" in settings and done == len(asked):
            variants += 1
            continue
        out.append(f"| `{name}` | {len(asked)} | {done} | {f'{mean(pace[name]):.0f}' if pace[name] else ''} | {hours:.1f} |")
    out.append(
        f"\nOf the ablations {variants} variants are finished. Training left: at most {total:.1f} hours at the measured pace; "
    )
    out[-1] += "drawing and losses come on top."
    return "\n".join(out)


__all__: Sequence[str] = ("HEADLINE", "write_report")
