"""The self-contained HTML page of a run: `build_report(run_folder)`."""

from mm.report.build import build_report

__all__ = ["build_report"]
