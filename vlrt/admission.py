"""Whether a question about a video can be answered here, asked before anything is decoded or computed for it.

Knows a model's positions, the memory that a question is predicted to take, and how much there is. No file, no engine.
"""

from collections.abc import Callable
from dataclasses import dataclass

from vlrt import config, host_memory, prompt
from vlrt.errors import ConfigError
from vlrt.memory import Shown, build, num_dropped
from vlrt.memory_plan import MARGIN, MIB, Plan, Shape, most_frames
from vlrt.reduction import NONE, Reduction
from vlrt.request import Request


@dataclass(frozen=True)
class Admission:
    """Refuses what cannot fit.

    With a budget a question is refused where its prediction exceeds it. Without one it is refused where the prediction
    less its margin exceeds what the machine has available, free swap included, after all kept videos were let go: so
    that nothing that would have run is refused. Questions answered at the same time are each looked at alone.

    Attributes:
        model: of the runtime.
        tokenizer: of the model.
        plan: predicts; None where nothing is known of the engine: then positions alone are looked at.
        memory_bytes: the budget of one question; None: what is available.
        let_go: frees what is kept of other videos.
        available: bytes that the machine has for this process, None where it does not tell.
    """

    model: config.Model
    tokenizer: prompt.Tokenizer
    plan: Callable[[Shape], Plan | None]
    memory_bytes: int | None
    let_go: Callable[[], None]
    available: Callable[[], int | None] = host_memory.available_bytes

    def of(self, asked: Request, reduce: Reduction) -> Callable[[int, int, int], None]:
        """Return what refuses a number of frames, of a height and width in pixels, by raising ConfigError.

        Where tokens are to be dropped, positions alone are looked at: by `check_shown`, where pixels decide how many.
        """

        def admit(num_frames: int, height: int, width: int) -> None:
            if reduce == NONE:
                self.check(asked, num_frames, height, width)
            elif reduce.unchanged is None:
                grid = Shape(num_frames, height, width, 0, 0).grid_thw(self.model.vision)
                self.check_shown(asked, Shown(prompt.Media(num_frames == 1, grid, 0.0), num_frames), reduce)

        return admit

    def check_shown(self, asked: Request, shown: Shown, reduce: Reduction) -> None:
        """Refuse a question about what a reduction leaves of a video.

        Raises:
            ConfigError: with its answer it is longer than the model's positions.
        """
        total = prompt.num_tokens(shown.media.grid_thw, self.model.vision.spatial_merge_size)
        dropped = total - reduce.num_kept(total - num_dropped(shown.kept))
        build(self.tokenizer, self.model, asked, shown.media, dropped)

    def check(self, asked: Request, num_frames: int, height: int, width: int) -> None:
        """Refuse a question about so many frames of such a size.

        Raises:
            ConfigError: with its answer it is longer than the model's positions, or takes more memory than there is.
        """
        grid = Shape(num_frames, height, width, 0, 0).grid_thw(self.model.vision)
        built = build(self.tokenizer, self.model, asked, prompt.Media(num_frames == 1, grid, 0.0))
        text_tokens = len(built.ids) - sum(span.num_tokens for span in built.spans)
        shape = Shape(num_frames, height, width, text_tokens, asked.room(self.model, self.tokenizer))
        plan = self.plan(shape)
        if plan is None:
            return
        if self.memory_bytes is not None:
            if plan.peak_bytes > self.memory_bytes:
                raise ConfigError(self._message(plan, self.memory_bytes, "memory_bytes allows"))
            return
        least = int(plan.peak_bytes * (1 - MARGIN))
        left = self.available()
        if left is not None and least > left:
            self.let_go()
            host_memory.give_back()
            left = self.available()
        if left is not None and least > left:
            raise ConfigError(self._message(plan, left, "this machine, or the control group of this process, has"))

    def _message(self, plan: Plan, budget: int, whose: str) -> str:
        shape = plan.shape

        def predict(other: Shape) -> Plan:
            found = self.plan(other)
            assert found is not None, "an engine that is known stays known"
            return found

        fit = most_frames(plan, budget, predict)
        what = f"{shape.num_frames} frames" if shape.num_frames > 1 else "one picture"
        fewer = f"fewer frames (num_frames={fit} fits)" if fit else "fewer frames (not even 2 of this size fit)"
        peak, cache, left = (f"{size / MIB:,.0f} MiB" for size in (plan.peak_bytes, plan.cache, budget))
        return (
            f"{what} of {shape.width} x {shape.height} pixels take {plan.video_tokens} video tokens and about {peak} "
            f"above the loaded bundle, {cache} of them for keys and values; {whose} {left}. Ask with {fewer}, or with "
            "smaller ones (scale the video down, or export a checkpoint with a lower video.max_pixels)"
        )
