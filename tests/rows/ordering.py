"""Rows of the table of nodes: ordering."""

from .row import Row

ROWS: list[Row] = []
