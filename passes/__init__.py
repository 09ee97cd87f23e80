"""Passes: one folder a subject, one file a pass. Every module in here is imported when passes are looked up."""
