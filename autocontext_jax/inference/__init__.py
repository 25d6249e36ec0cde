"""Whole-scan prediction by overlapping tiles."""
