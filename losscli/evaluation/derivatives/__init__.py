"""Derivatives of the loss along a line."""
