"""Everything that a GPU is asked at once: python -m benches.gpu --out DIR. See `__main__`."""
