"""Measured beside what users would write by hand and what they could pick instead."""
