"""Frozen values only: the vocabulary every other layer speaks."""
