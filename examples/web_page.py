"""A page where one drops a video and asks about it; the answer appears as it is written.

Usage: python examples/web_page.py BUNDLE [--port 7860]      needs: pip install '.[web]'
"""

import argparse
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import: a page of one's own calls nobody

import gradio

import vlrt


def page(runtime: vlrt.Runtime) -> Any:
    """Return the page."""

    def answer(video: str | None, question: str, choices: str) -> Iterator[tuple[str, str]]:
        given = [choice.strip() for choice in choices.split(",") if choice.strip()]
        if not video or not question.strip():
            raise gradio.Error("Drop a video and write a question first.")
        try:
            if given:
                found = runtime.ask(video, question, choices=given)
                yield found.text, details(found)
                return
            stream, text = runtime.stream(video, question), ""
            for piece in stream:
                text += piece
                yield text, "..."
            yield stream.answer.text, details(stream.answer)
        except vlrt.VlrtError as error:
            raise gradio.Error(str(error)) from error

    with gradio.Blocks(title="vlrt") as blocks:
        gradio.Markdown(
            "# Ask a video\nAsked again about the same video, it answers sooner: what was read of it is kept."
        )
        with gradio.Row():
            video = gradio.Video(label="Video", sources=["upload"], height=420)
            with gradio.Column():
                question = gradio.Textbox(label="Question", elem_id="question")
                choices = gradio.Textbox(label="Choices, separated by commas (may be empty)", elem_id="choices")
                button = gradio.Button("Ask", variant="primary", elem_id="ask")
                text = gradio.Textbox(label="Answer", elem_id="answer")
                told = gradio.Markdown(elem_id="details")
        asked = {"fn": answer, "inputs": [video, question, choices], "outputs": [text, told]}
        button.click(**asked)
        question.submit(**asked)
    return blocks


def details(answer: vlrt.Answer) -> str:
    """Return what an answer took, and what else is known of it, as Markdown."""
    usage, seconds = answer.usage, answer.timings["total"]
    lines = [
        f"{seconds:.2f} s: {usage.num_frames} frames, {usage.video_tokens} video tokens ({usage.reused_tokens} of the "
        f"prompt's tokens were read before), {usage.latents} latents"
    ]
    lines += [f"{choice}: {score:.1%}" for choice, score in (answer.scores or {}).items()]
    return "\n\n".join(lines + [f"Note: {warning}" for warning in answer.warnings])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("bundle")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    try:
        runtime = vlrt.Runtime.open(args.bundle)
    except vlrt.VlrtError as error:
        raise SystemExit(f"error: {error}") from None
    with runtime:
        page(runtime).queue(default_concurrency_limit=1).launch(server_name="127.0.0.1", server_port=args.port)


if __name__ == "__main__":
    main()
