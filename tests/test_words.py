"""The likeliest word, chosen on the host and on a device: the same ids from the same logits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlrt.backends.base import NO_NUMBER
from vlrt.backends.device_words import DeviceWords
from vlrt.backends.greedy import HostWords

VOCABULARY, WIDTH = 63, 5


def pair(seed, dtype, seen, penalty):
    """The two ways to choose, over one output head, and hidden states."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    head[7] = head[30]  # a tie
    states = torch.randn(6, 1, WIDTH, generator=generator).to(dtype)
    host = HostWords(lambda hidden: (hidden @ head.t()).float().numpy(), seen, penalty)
    return host, DeviceWords(head, seen, penalty), states


@given(
    st.integers(0, 1000),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sets(st.integers(0, VOCABULARY - 1)),
    st.sampled_from([1.0, 1.05, 1.3, 0.7]),
    st.sets(st.integers(0, VOCABULARY - 1), max_size=VOCABULARY - 1),
)
@settings(max_examples=150, deadline=None)
def test_the_device_chooses_as_the_host_does(seed, dtype, seen, penalty, banned):
    """Catches another id at a tie, a penalty that rounds otherwise, forgets what was chosen, or comes after the ban."""
    host, device, states = pair(seed, dtype, sorted(seen), penalty)
    for number, hidden in enumerate(states):
        barred = tuple(banned) if number % 2 else ()
        assert device(hidden, barred) == host(hidden, barred)


@pytest.mark.parametrize("place", [0, 30, 62])
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_what_is_no_number_is_no_word(place, penalty):
    """Catches NaN that is passed over, or taken for the first word of the vocabulary."""
    host, device, states = pair(1, torch.float32, [1, 2], penalty)
    device._head[place] = torch.nan
    assert host(states[0]) == device(states[0]) == NO_NUMBER
    assert device(states[0], (place,)) == host(states[0], (place,)) != NO_NUMBER


def test_logits_of_the_caller_stay_as_they_are():
    """Catches a ban or a penalty that is written into an engine's own memory."""
    logits = np.arange(6, dtype=np.float32)[None]
    words = HostWords(lambda hidden: logits, [5], 2.0)
    assert words(None, (4, 5)) == 3
    np.testing.assert_array_equal(logits, np.arange(6)[None])
