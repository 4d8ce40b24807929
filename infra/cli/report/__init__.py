"""A plan as one self-contained page: inline styles and charts, light and dark, nothing fetched from anywhere."""

from infra.cli.report.page import page

__all__ = ["page"]
