"""Losses and metrics, their targets and their weights."""
