"""Generates answers to held-out rows, measures them, and exports adapters."""
