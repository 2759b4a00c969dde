"""The launch table's columns: written by the planner (work.py), read by the kernels, which take these numbers as constants."""

from __future__ import annotations

from enum import IntEnum

FIELDS = 16  # of an entry, so that each begins on its own 64 bytes


class Column(IntEnum):
    """One entry is a block of query rows of one head against one list of keys.

    ORIGIN, WIDTH: the tile's first token and how many columns of the grid it has. FIRST_ROW, END_ROW: of the tile's tokens.
    LIST_AT, LIST_STEP: where the list begins for image 0, and how far on it is for the next. COUNT: its keys. SLOT: which row
    of the residual buffer is added, -1: none. OUT: which head of the output. LOW_Y..HIGH_X: cells of the coarser grid that the
    rows' residual is made of.
    """

    HEAD = 0
    ORIGIN = 1
    WIDTH = 2
    FIRST_ROW = 3
    END_ROW = 4
    LIST_AT = 5
    LIST_STEP = 6
    COUNT = 7
    SLOT = 8
    OUT = 9
    LOW_Y = 10
    LOW_X = 11
    HIGH_Y = 12
    HIGH_X = 13
