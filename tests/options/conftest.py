"""Runs here write no pages."""

from tests.pages import no_pages

__all__ = ["no_pages"]
