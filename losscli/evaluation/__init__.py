"""Losses and derivatives at points of weight space: exact, resumable and distributed."""
