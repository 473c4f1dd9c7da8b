"""Measurements of the product against what is possible; needs numpy, is not installed."""
