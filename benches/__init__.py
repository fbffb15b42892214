"""Benches: what vlrt costs, measured. Every figure in the README comes from a file that one of these wrote."""
