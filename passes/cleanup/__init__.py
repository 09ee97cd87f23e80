"""Passes that leave the same program with less in it."""
