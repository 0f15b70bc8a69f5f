"""Facts about the continual benchmark: its scores in closed form, its table, its gates, and a small stream end to end."""

import csv
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from stream.cells import Table, curve_of  # noqa: E402
from stream.gates import gates  # noqa: E402
from stream.plan import Gates, Plan, read_plan  # noqa: E402
from stream.report import write_report  # noqa: E402
from stream.run import Chosen, steps  # noqa: E402
from stream.scores import facts, final, forgetting, interval, learned, steps_to, study  # noqa: E402

PLANS = sorted(BENCHMARKS.glob("continual*.toml"))


def made_up(folder: Path) -> tuple[Plan, Table]:
    """A plan of three concepts whose cells are written by hand: sequential training halves every earlier score."""
    names = ("one", "two", "three")
    methods = {"own_lora": {"kind": "own_lora"}, "sequential_lora": {"kind": "sequential"}, "share": {"kind": "share"}}
    plan = Plan("made-up", names, {**methods, "paper": {"kind": "paper"}, "base": {"kind": "base"}})
    table = Table(folder / "cells.csv")
    for method in plan.methods:
        for after in (1, 2, 3):
            for place, concept in enumerate(names[:after]):
                gone = 0.5 ** (after - 1 - place) if method == "sequential_lora" else 0.0 if method == "base" else 1.0
                new = place == after - 1
                table.add(
                    {
                        "settings": plan.digest(method),
                        "method": method,
                        "order": 0,
                        "seed": 0,
                        "after": after,
                        "concept": concept,
                        "weight": 1.0,
                        "base_loss": 0.5,
                        "loss": 0.5 - 0.2 * gone,
                        "judge": gone,
                        "adherence": 0.75,
                        "broken": 0,
                        "norm": 1.0,
                        "learned": names[after - 1],
                        "commit": "abc",
                        "curve": "0:0.5 10:0.35 60:0.3" if new else "",
                        "numbers": 100 * after if new else "",
                        "concept_numbers": 100 if new else "",
                        "file_bytes": 200 * after + 8 if new else "",
                        "trainable": 100 if new else "",
                        "seconds": 1.0 if new else "",
                    }
                )
    return plan, table


def test_streams_are_worked_on_in_the_order_of_seeds_and_only_those_chosen():
    plan = Plan("p", ("a", "b"), {"x": {"kind": "share", "orders": 2}, "y": {"kind": "base"}}, orders=3, seeds=2)
    whole = list(steps(plan, ["x", "y"]))
    assert whole[:4] == [("x", 0, 0, 1), ("y", 0, 0, 1), ("x", 0, 0, 2), ("y", 0, 0, 2)]
    assert [step for step in whole if step[0] == "x" and step[3] == 2] == [("x", o, s, 2) for s in (0, 1) for o in (0, 1)]
    assert list(steps(plan, ["x", "y"], Chosen(orders=(1,), seeds=(0,)))) == [("x", 1, 0, 1), ("x", 1, 0, 2)]
    assert list(steps(plan, ["x", "y"], Chosen(seeds=(1,)))) == [step for step in whole if step[2] == 1]


def test_scores_of_a_known_matrix(tmp_path):
    plan, table = made_up(tmp_path)
    found = study(plan, table)
    assert found.horizon == 3
    matrix = found.matrices["sequential_lora"][0, 0]
    assert final(matrix, 3, found.rho) == pytest.approx((0.25 + 0.5 + 1) / 3)
    assert learned(matrix, 3, found.rho) == pytest.approx(1.0)
    assert forgetting(matrix, 3, found.rho) == pytest.approx((0.75 + 0.5) / 2)
    line = facts(found, "sequential_lora")
    assert line["normalised"] == pytest.approx(1.75 / 3, abs=1e-4)
    assert line["normalised_judge"] == pytest.approx(1.75 / 3, abs=1e-4)
    assert (line["bytes_per_concept"], line["bytes_total"], line["trainable"], line["steps_to_95"]) == (200, 608, 100, 60)
    assert facts(found, "share")["forgetting"] == 0.0


def test_steps_to_a_share_of_the_own_loras_gain():
    own = {"curve": "0:1.0 10:0.9 60:0.5"}
    assert steps_to({"curve": "0:1.0 10:0.52 60:0.4"}, own) == 10
    assert steps_to({"curve": "0:1.0 10:0.9 60:0.5"}, own) == 60
    assert math.isinf(steps_to({"curve": "0:1.0 10:0.9 60:0.6"}, own))


def weightless(plan: Plan, concept: str, loss: float) -> dict:
    """A cell of Share at weight 0, where the base's loss is .5."""
    key = {"settings": plan.digest("share"), "method": "share", "order": 0, "seed": 0, "after": 3, "concept": concept}
    return {**key, "weight": 0.0, "loss": loss, "base_loss": 0.5}


def test_an_unmeasured_or_broken_gate_makes_a_run_invalid(tmp_path):
    plan, table = made_up(tmp_path)
    assert not write_report(plan, table, tmp_path / "r")["valid"]  # the base's bits at weight 0 were not measured
    table.add(weightless(plan, "one", 0.5))
    assert write_report(plan, table, tmp_path / "r")["valid"]
    table.add(weightless(plan, "two", 0.5 + 1e-7))
    assert [gate.name for gate in gates(study(plan, table)) if not gate.holds] == ["change of the base's loss at weight 0"]


BREAKS = {
    "own LoRA: judge's share": lambda row: {"judge": 0.5} if row["method"] == "own_lora" else {},
    "untouched base: judge's share": lambda row: {"judge": 0.5} if row["method"] == "base" else {},
    "sequential LoRA: judge's share forgotten": lambda row: {"judge": 1.0} if row["method"] == "sequential_lora" else {},
    "smallest norm of an update, above": lambda row: {"norm": math.nan} if row["method"] == "share" else {},
    "blank, constant or NaN pictures": lambda row: {"broken": 1} if row["method"] == "share" else {},
    "change of the base's loss at weight 0": lambda row: {"loss": math.nan} if row["weight"] == 0 else {},
}


@pytest.mark.parametrize("name", BREAKS)
def test_every_gate_can_break_and_breaks_alone(name, tmp_path):
    plan, whole = made_up(tmp_path)
    whole.add(weightless(plan, "one", 0.5))
    table = Table(tmp_path / "broken.csv")
    for row in whole.rows.values():
        table.add({**row, **BREAKS[name](row)})
    assert [gate.name for gate in gates(study(plan, table)) if not gate.holds] == [name]


LOSS_BREAKS = {
    "own LoRA: least share of the base's loss removed": lambda row: {"loss": 0.499} if row["method"] == "own_lora" else {},
    "sequential LoRA: normalised score forgotten": lambda row: {"loss": 0.3} if row["method"] == "sequential_lora" else {},
    "Share: normalised score": lambda row: {"loss": 0.45} if row["method"] == "share" and row["weight"] else {},
    "Share: forgetting": lambda row: {"loss": 0.31} if row["method"] == "share" and row["after"] == 3 and row["weight"] else {},
}


@pytest.mark.parametrize("name", LOSS_BREAKS)
def test_every_gate_of_a_short_stream_can_break(name, tmp_path):
    plan, whole = made_up(tmp_path)
    plan = replace(plan, gates=Gates(own_lora=0.02, measure="loss"))
    whole.add(weightless(plan, "one", 0.5))
    assert all(gate.holds for gate in gates(study(plan, whole)))
    table = Table(tmp_path / "broken.csv")
    for row in whole.rows.values():
        table.add({**row, **LOSS_BREAKS[name](row)})
    assert name in [gate.name for gate in gates(study(plan, table)) if not gate.holds]


def test_a_run_that_drew_nothing_has_not_shown_that_no_picture_is_blank(tmp_path):
    plan, whole = made_up(tmp_path)
    table = Table(tmp_path / "undrawn.csv")
    for row in whole.rows.values():
        table.add({**row, "judge": "", "adherence": "", "broken": ""})
    broken = {gate.name: gate for gate in gates(study(plan, table))}["blank, constant or NaN pictures"]
    assert broken.found is None
    assert not broken.holds


def test_the_summary_has_the_promised_keys_and_everything_is_made_again_from_the_csv(tmp_path):
    plan, table = made_up(tmp_path)
    first = write_report(plan, table, tmp_path / "a")
    second = write_report(plan, Table(tmp_path / "cells.csv"), tmp_path / "b")
    assert first == second == json.loads((tmp_path / "a" / "summary.json").read_text())
    assert set(first) == {"valid", "concepts", "orders", "seeds", "methods"}
    keys = {"normalised", "normalised_judge", "forgetting", "forgetting_judge", "adherence"}
    assert set(first["methods"]["share"]) == keys | {"bytes_per_concept", "bytes_total", "trainable", "steps_to_95"}
    for name in ("report.md", "matrices.png", "quality_bytes.png", "curves.png", "stream.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_cells_come_back_as_they_were_and_none_is_written_twice(tmp_path):
    _, table = made_up(tmp_path)
    again = Table(tmp_path / "cells.csv")
    assert again.rows == table.rows
    assert curve_of(next(iter(again.rows.values()))) == {0: 0.5, 10: 0.35, 60: 0.3}
    with pytest.raises(AssertionError):
        again.add(next(iter(table.rows.values())))
    with (tmp_path / "cells.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(table.rows)


def test_a_changed_plan_leaves_cells_of_the_old_one_out(tmp_path):
    plan, table = made_up(tmp_path)
    changed = Plan(plan.name, plan.concepts, {**plan.methods, "share": {"kind": "share", "pseudo_rank": 2}})
    assert "share" not in study(changed, table).matrices
    assert "own_lora" in study(changed, table).matrices


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plans_can_be_read_and_every_order_is_a_permutation(path):
    plan = read_plan(path)
    assert {"own_lora", "share"} <= set(plan.methods)
    for order in range(3):
        assert sorted(plan.order(order)) == sorted(plan.concepts)
    assert plan.order(0) == plan.concepts


def test_the_fresh_concepts_are_all_that_no_setting_was_chosen_on_and_run_at_the_settings_of_the_stream():
    chosen, fresh = (read_plan(BENCHMARKS / f"{name}.toml") for name in ("continual", "continual_fresh"))
    every = {path.stem for path in (BENCHMARKS.parents[1] / "configs/concepts").glob("*.toml")}
    assert set(fresh.concepts) == every - set(chosen.concepts) - {"pixel"}
    assert fresh.training == chosen.training
    assert replace(fresh.measures, judged_after=()) == replace(chosen.measures, judged_after=())
    for method in fresh.methods:
        told = {"orders", "about", "scales", "seeds", "pictures"}
        assert {k: v for k, v in fresh.methods[method].items() if k not in told} == {
            k: v for k, v in chosen.methods[method].items() if k not in told
        }


def test_an_unknown_key_of_a_plan_is_refused(tmp_path):
    (tmp_path / "plan.toml").write_text('name = "x"\nconcepts = []\nstep = 3\n[methods]\n[training]\nrates = 1\n')
    with pytest.raises(ValueError, match=r"step.*training\.rates"):
        read_plan(tmp_path / "plan.toml")


def test_an_interval_holds_the_mean_and_grows_with_the_spread():
    low, high = interval([0.1, 0.2, 0.3, 0.4])
    assert low < 0.25 < high
    wide = interval([-1.0, 0.0, 0.5, 1.5])
    assert wide[1] - wide[0] > high - low


@pytest.mark.slow
def test_the_smoke_run_passes_its_gates_and_is_not_run_twice(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "continual.py"), "--smoke", "--work", str(tmp_path), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    report = (tmp_path / "smoke" / "report.md").read_text()
    assert done.returncode == 0, report + done.stderr[-2000:]
    before = (tmp_path / "smoke" / "cells.csv").read_bytes()
    again = subprocess.run([*command, "--report_only"], capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0
    assert (tmp_path / "smoke" / "cells.csv").read_bytes() == before
    assert (tmp_path / "smoke" / "report.md").read_text() == report
    assert (tmp_path / "smoke" / "forgetting.png").exists()
