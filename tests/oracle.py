"""Hugging Face's implementation of a checkpoint: what models/ is held against, in fp32 and in fp64."""

import contextlib
import functools

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

CLASSES = {
    "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
}


class _KeepDouble(TorchFunctionMode):
    """Leaves fp64 tensors alone where transformers casts to fp32: in norms, in rotary, before a softmax."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if isinstance(args[0] if args else None, torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in kwargs.items()}
        return func(*args, **kwargs)


class Oracle:
    """A checkpoint in transformers. Positions are passed in: transformers places text after a video elsewhere."""

    def __init__(self, checkpoint, dtype=torch.float32):
        self.dtype, self.config = dtype, checkpoint.model
        with _quiet():
            self.model = CLASSES[checkpoint.model.family].from_pretrained(checkpoint.path, dtype=torch.float32).eval()
        for parameter in self.model.parameters():  # not the buffers: frequencies are fp32 wherever they are used
            parameter.data = parameter.data.to(dtype)
        self.cache = DynamicCache(config=self.model.config.get_text_config())

    @torch.inference_mode()
    def vision(self, pixels, grid_thw):
        """Video tokens [N_v, C] of patches [N, patch_dim]."""
        with self.precisely():
            return self.model.model.visual(pixels.to(self.dtype), grid_thw=torch.tensor([grid_thw])).pooler_output

    def read(self, ids, positions, media):
        """Hidden states [S, C] and logits [S, V] of a prompt; media: (is_image, grid_thw, pixels) in order.

        The cache is left in place for `step`.
        """
        given = {}
        for is_image, suffix, grid in ((True, "", "image_grid_thw"), (False, "_videos", "video_grid_thw")):
            own = [medium for medium in media if medium[0] == is_image]
            if own:
                given[f"pixel_values{suffix}"] = torch.cat([pixels for _, _, pixels in own]).to(self.dtype)
                given[grid] = torch.tensor([grid_thw for _, grid_thw, _ in own])
        self.cache = DynamicCache(config=self.model.config.get_text_config())
        return self._run(ids, positions, **given)

    def step(self, token_id, position):
        """Logits [V] after one more text token."""
        return self._run(torch.tensor([token_id]), torch.full((3, 1), position))[1][0]

    def _run(self, ids, positions, **given):
        with self.precisely(), torch.inference_mode():
            out = self.model.model(
                input_ids=ids[None], position_ids=positions[:, None], past_key_values=self.cache, **given
            )
            hidden = out.last_hidden_state[0]
            return hidden, self.model.lm_head(hidden)

    def precisely(self):
        """A context in which fp64 stays fp64."""
        return _KeepDouble() if self.dtype == torch.float64 else contextlib.nullcontext()


@contextlib.contextmanager
def _quiet():
    """Keep transformers from drawing its bar, and from announcing the latent module, whose tensors it does not know."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


@functools.cache
def oracles(checkpoint):
    """Return a checkpoint in fp32 (plain) and in fp64 (exact)."""
    return Oracle(checkpoint), Oracle(checkpoint, torch.float64)
