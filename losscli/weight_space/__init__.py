"""Vectors of parameters: lines, planes, paths, directions and permutations."""
