"""The parts of the continual benchmark: plan, workbench, methods, cells, gates, report."""
