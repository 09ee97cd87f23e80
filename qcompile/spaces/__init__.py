"""Channel spaces: one analysis of which transformations a program admits, and on which channels."""

from qcompile.spaces.analysis import ChannelSpaces, channel_spaces
from qcompile.spaces.space import Placement, Space
from qcompile.spaces.wires import Level, Limit

__all__ = ["ChannelSpaces", "Level", "Limit", "Placement", "Space", "channel_spaces"]
