"""Pairs of a target and a draft: found, loaded, compared, kept in a file, exported."""

from .pair import DEMO_PAIR, SpecPair, demo_pair

__all__ = ["DEMO_PAIR", "SpecPair", "demo_pair"]
