"""Utilities for all other packages: files, tables, copies, the machine."""
