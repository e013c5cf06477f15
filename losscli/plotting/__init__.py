"""Figures from tables; nothing is evaluated here and torch is not imported."""
