"""OpenVINO GenAI on a directory that optimum-intel exported. Runs in any Python with openvino-genai; needs no vlrt.

GenAI is told no times of the frames. It gives token ids out through a streamer, and no logits.
"""

from typing import Any

import openvino
import openvino_genai

from benches.engines.protocol import Request, rolled, timed

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"  # in the rendered prompt; GenAI has a tag of its own
TAG = "<ov_genai_video_0>"


class _Ids(openvino_genai.StreamerBase):
    """Collects token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[int] = []

    def write(self, token: int | list[int]) -> Any:
        """Take a token, or several."""
        self.ids += token if isinstance(token, list) else [token]
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Take the end of the answer."""


class Engine:
    """See `protocol.Answering`.

    Args:
        directory: that optimum-intel wrote.
        threads: of the CPU plugin.
        dtype: what products are computed in, "f32" or "bf16".
    """

    def __init__(self, directory: str, threads: int, dtype: str) -> None:
        self._dtype = dtype
        self._pipeline = openvino_genai.VLMPipeline(
            directory, "CPU", INFERENCE_NUM_THREADS=threads, INFERENCE_PRECISION_HINT=dtype
        )

    def describe(self) -> dict[str, Any]:
        """See `protocol.Answering`."""
        versions = {"openvino": openvino.__version__, "openvino_genai": openvino_genai.__version__}
        return {"version": versions["openvino_genai"], "versions": versions, "computes_in": self._dtype}

    def answer(self, request: Request) -> dict[str, Any]:
        """See `protocol.Answering`."""
        frames = rolled(request)
        assert frames is not None, "this engine gets frames"
        assert request.logits_to is None, "this engine gives no logits"
        assert VIDEO in request.text, "the chat template writes a video so"
        settings = self._pipeline.get_generation_config()
        settings.max_new_tokens = settings.min_new_tokens = request.num_tokens
        settings.do_sample, settings.ignore_eos, settings.apply_chat_template = False, True, False
        text, streamer = request.text.replace(VIDEO, TAG), _Ids()

        def generate() -> Any:
            return self._pipeline.generate(
                text, videos=[openvino.Tensor(frames)], generation_config=settings, streamer=streamer
            )

        seconds, out = timed(generate)
        assert len(streamer.ids) == request.num_tokens, "the length was to be forced"
        return {
            "seconds": seconds,
            "token_ids": streamer.ids,
            "prompt_tokens": out.perf_metrics.get_num_input_tokens(),
        }
