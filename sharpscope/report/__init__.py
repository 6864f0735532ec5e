"""Results as one HTML page that fetches nothing. matplotlib, and plotly where it is installed, are imported late."""

from sharpscope.report.page import page

__all__ = ["page"]
