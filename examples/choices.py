"""Asks with given choices, on frames that the program holds itself.

Usage: python examples/choices.py BUNDLE
"""

import sys

import numpy as np

import vlrt

if len(sys.argv) != 2:
    sys.exit(__doc__)
frames = np.zeros((8, 112, 112, 3), dtype=np.uint8)  # [T, H, W, 3], RGB
for step, frame in enumerate(frames):
    frame[40:72, 10 * step : 10 * step + 32] = (255, 0, 0)  # a red square that moves to the right

with vlrt.Runtime.open(sys.argv[1]) as runtime:
    answer = runtime.ask(
        vlrt.Frames.from_array(frames, fps=4.0), "Where does the square go?", choices=["left", "right", "nowhere"]
    )
    print(answer.choice)
    for choice, score in (answer.scores or {}).items():
        print(f"{score:8.3f}  {choice}")
