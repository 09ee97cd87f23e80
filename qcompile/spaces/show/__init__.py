"""Channel spaces for people: descriptions, a table, JSON, a picture, an account of what a pass did."""

from qcompile.spaces.show.account import account, left_alone
from qcompile.spaces.show.describe import Blocks, Description, End, describe
from qcompile.spaces.show.group import Group, grouped
from qcompile.spaces.show.reasons import Reason

__all__ = ["Blocks", "Description", "End", "Group", "Reason", "account", "describe", "grouped", "left_alone"]
