"""Asks a bundle about a video.

Usage: python examples/ask.py BUNDLE VIDEO QUESTION
"""

import sys

import vlrt

if len(sys.argv) != 4:
    sys.exit(__doc__)
bundle, video, question = sys.argv[1:]
with vlrt.Runtime.open(bundle) as runtime:
    answer = runtime.ask(video, question)
    print(answer.text)
    print(f"{answer.usage.num_frames} frames, {answer.usage.video_tokens} video tokens, {answer.usage.latents} latents")
    print(f"{answer.timings['total']:.2f} s in all, {answer.timings['latents']:.3f} s of it for the latents")
