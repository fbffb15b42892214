"""Saved clips of a fake model, for tests and for the processes that they kill."""

import numpy as np

from tests.fakes import FakeBackend, fake_model
from vlrt import config, prompt
from vlrt.memory import Memory, Shown
from vlrt.saved_clip import Origin

ORIGIN = Origin("a" * 64, "ort", "fp32")


def clip_model() -> config.Model:
    """Return the fake's config, for short prompts."""
    return fake_model(overrides={"decoder.max_positions": 512})


def remembered(model: config.Model, tokenizer: prompt.Tokenizer, fill: float = 1.0) -> Memory:
    """Return a memory of a video of 3 temporal patches whose tokens are all `fill`."""
    shown = Shown(prompt.Media(False, (3, 4, 6), 0.75), 5, ("it is odd",))
    tokens = np.full((18, model.decoder.hidden_size), fill, np.float32)
    memory = Memory(FakeBackend(model), model, tokenizer, shown, tokens)
    memory.read()
    return memory
