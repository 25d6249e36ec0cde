"""Prediction of whole scans in overlapping tiles."""
