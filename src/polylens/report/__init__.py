"""Reports: self-contained HTML pages made from saved files alone."""

from polylens.report.page import ReportData, render_comparison, render_probe_page, render_report

__all__ = ["ReportData", "render_comparison", "render_probe_page", "render_report"]
