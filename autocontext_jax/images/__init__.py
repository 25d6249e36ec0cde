"""Scans and masks in files of the usual formats."""
