"""Reports: self-contained HTML pages made from saved files alone."""

from polylens.report.page import ReportData, render_comparison, render_probe_page, render_report
from polylens.report.reading import read_report_data

__all__ = [
    "ReportData",
    "read_report_data",
    "render_comparison",
    "render_probe_page",
    "render_report",
]
