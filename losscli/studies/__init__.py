"""The studies: from checkpoints and settings to tables and a summary. The library's front door.

A command loads its own study and no other: together they take a fifth of a second.
"""
