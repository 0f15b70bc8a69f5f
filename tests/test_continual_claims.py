"""Facts about what the continual benchmark concludes: bounds in weight space, paired comparisons, targets and claims."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from stream.breakdown import breakdown, headline
from stream.cells import Table
from stream.claims import claims, others, targets
from stream.figures import adherence_and_identity, over_scales
from stream.plan import Plan, read_plan
from stream.report import ORDER, ablations, conclusions, fresh, orders, read_long, write_report
from stream.run import Stream
from stream.scores import distinct, study
from stream.shared import DECAY
from stream.transfer import COMPARISONS, gain, pairs, transfer
from stream.weights import Found, held, measure, merged, read, section, tail

from share_diffusion.adapt import START
from share_diffusion.lora import Factors, LoRA

BENCHMARKS = Path(__file__).parent / "benchmarks"
CURVE = "0:0.5 60:{:.2f} 120:{:.2f}"


def some_loras(count: int = 3, rank: int = 2) -> dict[str, LoRA]:
    """Random LoRAs on two layers."""
    generator = torch.Generator().manual_seed(0)

    def factors() -> Factors:
        return Factors(torch.randn(12, rank, generator=generator), torch.randn(rank, 10, generator=generator))

    return {f"c{number}": LoRA({"unet.a": factors(), "unet.b": factors()}) for number in range(count)}


def test_a_merge_with_room_loses_nothing_and_states_no_more_than_it_holds():
    loras = some_loras()
    for true, stated in merged(loras, 6).values():
        assert true == pytest.approx(1, abs=1e-5)
        assert stated <= true + 1e-6
    for true, stated in merged(loras, 3).values():
        assert 0.1 < true < 0.9
        assert stated <= true + 1e-6


def test_a_merge_that_truncates_once_is_the_iterated_joint_fit(monkeypatch):
    monkeypatch.setattr("share_diffusion.merge.SWEEPS", 3)  # as many as the bound's
    loras = some_loras(2)  # the first alone fits into three columns
    ours, bound = merged(loras, 3), held(loras, "hooi", 3)
    assert [true for true, _ in ours.values()] == pytest.approx(list(bound.values()), abs=1e-6)
    assert sum(bound.values()) > sum(held(loras, "joint", 3).values()) + 0.01


def test_a_merge_one_by_one_is_near_the_joint_fit():
    loras = some_loras(4)
    lost = [
        len(loras) - sum(shares)
        for shares in ((true for true, _ in merged(loras, 4).values()), held(loras, "hooi", 4).values())
    ]
    assert 0.95 * lost[1] < lost[0] < 1.25 * lost[1]


def test_a_fit_loses_its_tail_energy():
    assert 0 < tail(some_loras(), 3) < 1e-9
    assert tail(some_loras(), 6) == 0  # nothing is discarded


def test_weights_are_told_from_their_csv(tmp_path):
    loras = some_loras(4)  # as many directions as the overlap looks at
    measure(loras, tmp_path / "weights.csv")
    found = read(tmp_path / "weights.csv")
    assert found is not None
    assert found.shares["joint", 4] == pytest.approx(list(held(loras, "joint", 4).values()))
    assert found.overlaps[4] == pytest.approx({"overlap alpha": 1, "overlap beta": 1}, abs=1e-6)
    assert found.beyond_the_bound is not None
    assert found.beyond_the_bound < 0.05
    assert found.overstated is not None
    assert found.overstated <= 1e-6
    text = section(read(tmp_path / "weights.csv"), tmp_path / "retention.png")
    assert "| merged |" in text
    assert (tmp_path / "retention.png").exists()
    assert read(tmp_path / "absent.csv") is None


def a_study(folder: Path, orders: int = 3):
    """Cells of two concepts, of which `share` learns with half of the steps that `share_seed` takes, and forgets nothing."""
    methods = {
        "own_lora": {"kind": "own_lora"},
        "share": {"kind": "share", "orders": 3},
        "share_seed": {"kind": "share", "orders": 3},
        "rate_1": {"kind": "share"},
        "sequential_lora": {"kind": "sequential"},
        "own_lora_r1": {"kind": "own_lora", "rank": 1},
    }
    plan, table = Plan("p", ("one", "two"), methods, orders=orders, seeds=1), Table(folder / "cells.csv")
    ends = {"own_lora": (0.3, 0.3), "share": (0.3, 0.28), "share_seed": (0.4, 0.32), "sequential_lora": (0.4, 0.35)}
    ends["rate_1"] = ends["share"]
    for method in methods:
        for order, seed in plan.runs(method):
            for after in (1, 2):
                for concept in plan.order(order)[:after]:
                    new = concept == plan.order(order)[after - 1]
                    row = {"settings": plan.digest(method), "method": method, "order": order, "seed": seed, "after": after}
                    row["learned"] = plan.order(order)[after - 1]
                    middle, end = ends.get(method, (0.4, 0.31))
                    facts = {"base_loss": 0.5, "loss": end, "judge": 0.9, "adherence": 0.8, "broken": 0, "norm": 1.0}
                    lesson = {"numbers": 10, "concept_numbers": 5, "file_bytes": 100, "trainable": 7, "seconds": 1.0}
                    lesson["curve"] = CURVE.format(middle, end)
                    table.add({**row, "concept": concept, "weight": 1.0, **facts, **(lesson if new else {})})
    return study(plan, table)


def test_orders_that_teach_the_same_are_counted_once(tmp_path):
    found = a_study(tmp_path)
    both = pairs(found, "share", "share_seed")
    assert len(both) == 2  # one seed, two concepts
    assert gain(both, 120) == pytest.approx((0.2, 0.2, 0.2))
    assert gain(both, 77) is None
    assert "2 concepts, 1 seed(s)" in transfer(found)
    alike = [("one", {9: 1.0}, {9: 0.0})] * 3 + [("two", {9: 0.0}, {9: 0.0})] * 3
    assert gain(alike, 9) == pytest.approx((0.5, 0.0, 1.0))  # two concepts, however many seeds
    assert pairs(found, "share", "nobody") == []


def test_the_arms_of_a_comparison_learn_at_the_same_pace():
    plan = read_plan(BENCHMARKS / "continual.toml")
    usual = {"rate": plan.training.rate, "decay": DECAY, "begin": START}
    for ours, null, *_ in COMPARISONS:
        for key in ("mode", "pseudo_rank", "rate", "decay", "begin"):
            assert plan.methods[ours].get(key, usual.get(key)) == plan.methods[null].get(key, usual.get(key))


def test_targets_name_who_is_ahead_and_who_dominates(tmp_path):
    found = a_study(tmp_path)
    line = {"normalised": 1.0, "normalised_judge": 1.0, "bytes_total": 100, "forgetting": 0.0, "forgetting_judge": 0.0}
    line |= {"adherence": 0.7, "bytes_per_concept": 1, "trainable": 1, "steps_to_95": 60}
    lines = {"own_lora": {**line, "bytes_total": 1000}, "share": line, "sequential_lora": {**line, "normalised": 0.9}}
    (_, ahead, *_), (_, better, *_) = others(found, lines)
    assert ahead == pytest.approx(0.1)
    assert better == 0
    lines["own_lora_r1"] = {**line, "bytes_total": 99}
    assert others(found, lines)[1][1] == 1
    weights = Found({("joint", 4): [0.9, 0.9], ("merged", 4): [0.9, 0.88], ("stated", 4): [0.9, 0.85]}, {}, 1e-12)
    long = {"concepts": 50, "first_ten_lose_at_most": 0.02, "times_smaller": 9.0}
    text = targets(found, lines, weights, long)
    assert "| a merge's loss above the best joint fit's at the same k (4 to 32) | 0.01 | <= 0.02 | yes |" in text
    assert "| stated retention above what is held | 0 | <= 1e-06 | yes |" in text
    assert "| 50 concepts: the first ten lose | 0.02 | <= 0.01 | **no** |" in text
    assert "| 50 LoRAs' bytes / the file of 50 | 9 | >= 8 | yes |" in text
    iterated = replace(weights, shares={**weights.shares, ("hooi", 4): [0.95, 0.95]})
    assert iterated.beyond_the_bound == pytest.approx(0.06)  # the better of the two fits is the bound
    overstating = replace(weights, shares={**weights.shares, ("stated", 4): [0.9, 0.881]})
    assert "| stated retention above what is held | 0.001 | <= 1e-06 | **no** |" in targets(found, lines, overstating)
    told = claims(found, lines, replace(weights, overlaps={1: overlap(0.5), 2: overlap(1.0)}))
    assert "| a fit loses exactly its tail energy (Proposition 1, an identity) | `raw` | yes | within 1e-12 of it |" in told
    assert "after 1 of 2 | `joint` | no | inputs 0.50, outputs 0.50 |" in told
    assert "not the paper: columns measured on the base against random ones | `rate_1` | yes | +0.200" in told


def test_an_ablation_stands_beside_its_main_method_after_as_many_concepts(tmp_path):
    found = a_study(tmp_path)
    short = {"kind": "own_lora", "rank": 1, "table": "Ranks", "stop": 1, "beside": ["own_lora", "share"], "about": "rank 1"}
    plan = replace(found.plan, methods={**found.plan.methods, "own_lora_r1": short})
    assert plan.digest("own_lora_r1") == found.plan.digest("own_lora_r1")  # its cells count
    lines = ablations(study(plan, Table(tmp_path / "cells.csv")), {}).splitlines()
    assert lines[4] == "### Ranks"
    assert [line.split(" | ")[:3] for line in lines[8:]] == [
        ["| `own_lora`", "1", "1.000"],
        ["| `share`", "1", "1.100"],
        ["| rank 1", "1", "0.950"],
    ]
    assert ablations(found, {}) == ""
    (tmp_path / "conclusions.toml").write_text('Ranks = "One is enough."')
    assert ablations(study(plan, Table(tmp_path / "cells.csv")), conclusions(tmp_path)).splitlines()[-2:] == [
        "",
        "One is enough.",
    ]


def test_every_conclusion_is_of_a_table_of_the_plan():
    tables = {method.get("table") for method in read_plan(BENCHMARKS / "continual.toml").methods.values()}
    assert set(conclusions(BENCHMARKS / "results" / "continual")) <= tables | {ORDER}


def test_every_order_has_its_score(tmp_path):
    text = orders(a_study(tmp_path, orders=2), {})
    assert "| `share` | 1.100 / 0.000 (1) | 1.100 / 0.000 (1) |" in text
    assert "own_lora" not in text  # one order
    assert orders(a_study(tmp_path / "one", orders=1), {}) == ""


def test_scales_are_measured_once_and_become_a_curve(tmp_path):
    found = a_study(tmp_path)
    methods = {**found.plan.methods, "share": {**found.plan.methods["share"], "scales": [0.5], "weights": [0.0]}}
    plan, table = replace(found.plan, methods=methods), Table(tmp_path / "cells.csv")

    def wanted(order: int, after: int) -> list[tuple[float, str]]:
        stream = Stream(plan, None, table, "share", order, 0, tmp_path)  # type: ignore[arg-type]
        return [(key["weight"], key["concept"]) for key in stream.wanted(after)]

    assert wanted(0, 1) == [(1.0, "one")]
    assert wanted(0, 2) == [(weight, name) for weight in (1.0, 0.0, 0.5) for name in ("one", "two")]
    assert wanted(1, 2) == [(weight, name) for weight in (1.0, 0.0) for name in plan.order(1)]
    key = {"settings": plan.digest("share"), "method": "share", "order": 0, "seed": 0, "after": 2, "weight": 0.5}
    for name, seen in (("one", 0.5), ("two", 0.7)):
        table.add({**key, "concept": name, "loss": 0.3, "base_loss": 0.5, "judge": seen, "adherence": 0.9})
    curve = over_scales(study(plan, table), "share")
    assert curve == {0.5: pytest.approx((0.9, 0.6)), 1.0: pytest.approx((0.8, 0.9))}
    own = {**key, "settings": plan.digest("own_lora"), "method": "own_lora", "concept": "two", "learned": "two"}
    table.add({**own, "loss": 0.45, "base_loss": 0.5, "judge": 0.1, "adherence": 1.0})
    assert study(plan, table).own[0, "two"]["weight"] == 1.0  # what everything is normalised by is the LoRA at its own weight
    adherence_and_identity(study(plan, table), ["share", "own_lora"], tmp_path / "scales.png")
    assert (tmp_path / "scales.png").exists()


def overlap(value: float) -> dict[str, float]:
    """Both sides' overlap."""
    return {"overlap alpha": value, "overlap beta": value}


def test_a_mean_is_told_apart_by_kind_and_pooled_by_what_there_is_to_gain(tmp_path):
    methods = {"own_lora": {"kind": "own_lora"}, "share": {"kind": "share"}}
    plan, table = Plan("p", ("watercolor", "owl"), methods), Table(tmp_path / "cells.csv")
    for method, left in (("own_lora", (0.2, 0.06)), ("share", (0.26, 0.12))):  # of gains .3 and .04
        for after in (1, 2):
            for concept, base, loss in zip(plan.concepts[:after], (0.5, 0.1), left, strict=False):
                row = {"settings": plan.digest(method), "method": method, "order": 0, "seed": 0, "after": after}
                row |= {"concept": concept, "weight": 1.0, "base_loss": base, "loss": loss, "judge": 0.5}
                table.add({**row, "learned": plan.concepts[after - 1]})
    found = study(plan, table)
    text = breakdown(found, ["share"])
    assert "| styles (1) | subjects (1) | pooled |" in text
    assert f"| `share` | 0.150 | 0.150 | 0.800 | -0.500 | {(0.24 - 0.02) / 0.34:.3f} |" in text
    assert "| `share` - `own_lora` | 1 | -0.850 (-1.500 to -0.200) | +0.000 (+0.000 to +0.000) |" in headline(found)


def test_orders_that_come_to_the_same_are_one_stream(tmp_path):
    found = a_study(tmp_path)
    assert len(found.complete("share")) == 3
    assert distinct(found, "share") == [(0, 0)]


def test_steps_that_are_never_reached_are_told_from_those_that_were_not_watched(tmp_path):
    line = {"normalised": 1.0, "normalised_judge": 1.0, "bytes_total": 100, "forgetting": 0.0, "forgetting_judge": 0.0}
    line |= {"adherence": 0.7, "bytes_per_concept": 1, "trainable": 7, "steps_to_95": None}
    found = a_study(tmp_path)
    assert "| steps to 95 % / the budget | never | <= 0.5 | **no** |" in targets(found, {"share": line})
    assert "| steps to 95 % / the budget | not measured |" in targets(found, {"share": {**line, "trainable": None}})


def test_a_long_stream_of_other_concepts_is_not_this_ones(tmp_path):
    said = {"first_ten": {"10": {"one": {}, "two": {}}}}
    (tmp_path / "long_stream.json").write_text(json.dumps(said))
    assert read_long(("two", "one"), tmp_path / "continual") == said
    assert read_long(("one", "three"), tmp_path / "continual") is None


def test_what_came_out_on_fresh_concepts_stands_in_the_report(tmp_path):
    plan, rows = a_study(tmp_path).plan, Table(tmp_path / "cells.csv")
    assert fresh(tmp_path / "continual") == ""
    write_report(plan, rows, tmp_path / "continual_fresh")
    text = fresh(tmp_path / "continual")
    assert "On 2 others, on which nothing was chosen" in text
    assert "| `share` | 1.100 |" in text
