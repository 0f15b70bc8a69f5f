"""The continual benchmark: learn concepts in turn by many methods and measure what each one still knows.

    python tests/benchmarks/continual.py                    # the whole plan, in as many sittings as it takes
    python tests/benchmarks/continual.py --minutes 60       # one sitting
    python tests/benchmarks/continual.py --report_only      # report, summary and figures again, from the CSV
    python tests/benchmarks/continual.py --smoke            # a small stream with its own gates, as CI runs it

The plan is `continual.toml` (`continual_smoke.toml`). Every finished cell is a line of results/continual/cells.csv and is
never measured twice; states and LoRAs in the making lie under outputs/benchmarks/, outside the repository's files. Where the
machine has room, start the same command several times with different --methods or --seeds: they share the CSV and the own
LoRAs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from stream.cells import Table  # noqa: E402
from stream.plan import Plan, read_plan  # noqa: E402
from stream.report import write_report  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Run a plan and write its report; exit status 1 when the smoke run breaks one of its gates."""
    arguments = read_arguments(argv)
    plan = read_plan(arguments.plan or HERE / ("continual_smoke.toml" if arguments.smoke else "continual.toml"))
    results = arguments.results or (arguments.work / "smoke" if arguments.smoke else HERE / "results" / "continual")
    if unknown := set(arguments.methods or []) - set(plan.methods):
        print(f"error: no methods {', '.join(sorted(unknown))}; the plan has {', '.join(plan.methods)}", file=sys.stderr)
        return 1
    table = Table(results / "cells.csv")
    if not arguments.report_only:
        work(plan, table, arguments, results)
    summary = write_report(plan, table, results)
    print(f"report: {results / 'report.md'}, valid: {summary['valid']}")
    return 0 if summary["valid"] or not arguments.smoke else 1


def work(plan: Plan, table: Table, arguments: argparse.Namespace, results: Path) -> None:
    """Measure what is missing."""
    import torch
    from stream.elsewhere import captions, digits, go_through
    from stream.run import Chosen, run
    from stream.separate import own_lora
    from stream.weights import measure
    from stream.workbench import Workbench

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    bench = Workbench(plan, arguments.work / plan.name)
    chosen = Chosen(*(tuple(some) if some else None for some in (arguments.orders, arguments.seeds)))
    run(plan, bench, table, arguments.methods or list(plan.methods), results / "pictures", arguments.minutes, chosen)
    if arguments.weights:
        measure({concept: own_lora(bench, concept, 0)[0] for concept in plan.concepts}, results / "weights.csv")
    if arguments.elsewhere:
        streams = {"digits, ViT": digits, "captions, CLIP text encoder": captions}
        found = {name: [go_through(make(seed), seed) for seed in range(plan.seeds)] for name, make in streams.items()}
        (results / "elsewhere.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, help="another TOML file of what to run")
    parser.add_argument("--methods", nargs="+", help="only these of the plan")
    parser.add_argument("--orders", nargs="+", type=int, help="only these orders of the stream, 0 the first")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes; the same command goes on")
    parser.add_argument("--report_only", action="store_true", help="measure nothing, write the report from the CSV")
    parser.add_argument("--smoke", action="store_true", help="the small plan; fails when one of its gates is broken")
    parser.add_argument("--weights", action="store_true", help="also fit bases of all widths to the own LoRAs of seed 0")
    parser.add_argument("--elsewhere", action="store_true", help="also run the core on a ViT and a text encoder")
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmarks/continual"), help="where states are kept")
    parser.add_argument("--results", type=Path, help="where CSV, report and pictures go")
    parser.add_argument("--threads", type=int, help="threads of torch")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
