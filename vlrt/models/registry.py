"""Builds the whole model of a config, and gives it weights: all at once, or layer by layer as it runs.

Knows the families; does not know where weights come from (`fetch` hands them out by their Hugging Face names).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from vlrt import config
from vlrt.models import qwen2_5_vl_vision, qwen2_vl_vision
from vlrt.models.decoder import Decoder
from vlrt.models.latent_injection import LatentInjection

Fetch = Callable[[str], Tensor]

VISION_TOWERS: dict[str, type[nn.Module]] = {
    "qwen2_vl": qwen2_vl_vision.VisionTower,
    "qwen2_5_vl": qwen2_5_vl_vision.VisionTower,
}


class VideoLatent(nn.Module):
    """Vision tower, decoder, output head and latent injection; its parameter names are the checkpoint's."""

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.cfg = cfg
        self.visual = VISION_TOWERS[cfg.family](cfg.vision)
        self.model = Decoder(cfg.decoder)
        self.lm_head = nn.Linear(cfg.decoder.hidden_size, cfg.decoder.vocab_size, bias=False)
        if cfg.decoder.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.latent_injection = (
            LatentInjection(cfg.latent, cfg.decoder.hidden_size, cfg.decoder.rms_norm_eps) if cfg.latent else None
        )


def build(cfg: config.Model, *, device: str = "meta") -> VideoLatent:
    """Return the model of a config, in eval mode, with weights on `device`; on "meta" they take no memory."""
    with torch.device(device):
        return VideoLatent(cfg).eval()


def load(module: nn.Module, fetch: Fetch, *, prefix: str = "", dtype: torch.dtype = torch.float32) -> None:
    """Give every parameter of a module the tensor that `fetch` returns for `prefix` + its name, converted to dtype.

    A tensor of another shape but as many values is reshaped (a Conv3d whose kernel equals its stride is a matrix).
    """
    state = {
        name: fetch(prefix + name).reshape(parameter.shape).to(dtype) for name, parameter in module.named_parameters()
    }
    if isinstance(module, VideoLatent) and module.cfg.decoder.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    module.load_state_dict(state, assign=True)
    if isinstance(module, VideoLatent) and module.cfg.decoder.tie_word_embeddings:
        module.lm_head.weight = module.model.embed_tokens.weight  # assigning made two parameters of one tensor
    module.requires_grad_(False)


def stream(model: VideoLatent, fetch: Fetch, *, dtype: torch.dtype = torch.float32) -> None:
    """Let a model on "meta" fetch the weights of each layer when it runs, and drop them after: one layer in memory.

    The embedding table is never loaded; its rows are the caller's to look up.
    """
    for prefix, unit in _units(model):

        def fill(unit: nn.Module, _: object, prefix: str = prefix) -> None:
            load(unit, fetch, prefix=prefix, dtype=dtype)

        def drop(unit: nn.Module, _: object, __: object) -> None:
            unit.to_empty(device="meta")

        unit.register_forward_pre_hook(fill)
        unit.register_forward_hook(drop)
    if model.latent_injection is not None:
        load(model.latent_injection, fetch, prefix="latent_injection.", dtype=dtype)


def _units(model: VideoLatent) -> Iterator[tuple[str, nn.Module]]:
    yield "visual.patch_embed.", model.visual.get_submodule("patch_embed")
    yield "visual.merger.", model.visual.get_submodule("merger")
    for parent, name in ((model.visual, "visual.blocks"), (model.model, "model.layers")):
        for i, layer in enumerate(parent.get_submodule(name.split(".")[1]).children()):
            yield f"{name}.{i}.", layer
    yield "model.norm.", model.model.norm
    yield ("model.embed_tokens." if model.cfg.decoder.tie_word_embeddings else "lm_head."), model.lm_head
