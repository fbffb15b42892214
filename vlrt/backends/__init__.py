"""Engines that run the stages of a bundle, behind one protocol (`base.py`)."""
