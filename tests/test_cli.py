"""The command line, end to end: real processes on real files. Runs from a checkout and from an installed wheel alike.

Not covered: terminals (colours, the moving progress bar), and answers of trained models.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import vlrt
from vlrt.fresh import write_checkpoint

QUESTION = "Where does the square go?"
# The script, where an exit code after Ctrl-C is looked at: under `python -m`, if the interruption passed an exec() of
# text (torch has such), Python ends itself with the signal, which a shell reports as 130 but a parent process as -2.
VLRT = str(Path(sys.executable).with_name("vlrt"))
STAGES = {"decode", "preprocess", "vision", "prefill", "latents", "answer", "total"}


def run(*arguments: object, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vlrt", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds tiny/ (a checkpoint), clip.mp4, and tiny.vlrt/, which `vlrt export` wrote there."""
    room = tmp_path_factory.mktemp("cli")
    write_checkpoint(room / "tiny", shape="tiny", seed=0)
    write_video(room / "clip.mp4")
    done = run("export", "tiny", cwd=room)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "tiny.vlrt"
    assert "parity" in done.stdout
    assert done.stderr == ""
    return room


def write_video(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for step in range(24):
            image = np.full((64, 96, 3), 30, dtype=np.uint8)
            image[24:40, 3 * step : 3 * step + 16] = (220, 30, 30)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def ask(room: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run("ask", "tiny.vlrt", "clip.mp4", QUESTION, "--num-frames", 4, *arguments, cwd=room)


def started(command: list[str], cwd: Path) -> subprocess.Popen[bytes]:
    """Start a process that Ctrl-C ends, also where the tests run in the background and were told to ignore it."""
    return subprocess.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def fails(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Hold a failure to its form: exit code 1, nothing on stdout, one line on stderr that names what it must."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("vlrt: error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("reasoning", ["latent", "direct", "cot"])
def test_json_is_one_object_with_the_fields_of_the_answer(room: Path, reasoning: str) -> None:
    done = ask(room, "--reasoning", reasoning, "--max-tokens", 6, "--min-tokens", 6, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert {"text", "token_ids", "choice", "scores", "reasoning", "usage", "timings", "warnings"} <= set(answer)
    assert answer["reasoning"] == reasoning
    assert answer["usage"]["num_frames"] == 4
    assert (answer["usage"]["latents"] > 0) == (reasoning == "latent")
    assert set(answer["timings"]) >= STAGES
    assert answer["choice"] is None


def test_latents_are_the_default_where_the_model_has_them(room: Path) -> None:
    assert json.loads(ask(room, "--max-tokens", 2, "--json").stdout)["reasoning"] == "latent"


@pytest.mark.parametrize("reasoning", ["latent", "direct"])
def test_text_stream_and_json_say_the_same(room: Path, reasoning: str) -> None:
    options = ("--reasoning", reasoning, "--max-tokens", 8, "--min-tokens", 8)
    text, stream = ask(room, *options), ask(room, *options, "--stream")
    assert text.returncode == stream.returncode == 0, text.stderr + stream.stderr
    assert text.stdout == stream.stdout
    assert text.stdout == json.loads(ask(room, *options, "--json").stdout)["text"] + "\n"


def test_choices_are_answered_with_the_likeliest(room: Path) -> None:
    done = ask(room, "--json", "--choices", "left", "right", "it stays where it is")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer["scores"]) == {"left", "right", "it stays where it is"}
    assert answer["choice"] == max(answer["scores"], key=answer["scores"].get)
    assert ask(room, "--choices", "left", "right", "it stays where it is").stdout == answer["choice"] + "\n"


def test_latents_and_tokens_can_be_saved(room: Path) -> None:
    """Catches options that do not reach the question."""
    done = ask(room, "--json", "--choices", "left", "right", "--early-exit", 0.01, "--keep", 0.5)
    assert done.returncode == 0, done.stderr
    usage = json.loads(done.stdout)["usage"]
    assert (usage["latents"], usage["dropped_tokens"]) == (1, usage["video_tokens"])
    fails(ask(room, "--drop-unchanged", 256), "reduction.unchanged is 256.0; accepted: 0 to 255")


def test_an_evaluation_calibrates_a_bundle(room: Path, tmp_path: Path) -> None:
    """Catches an error that is not reported, a temperature that the bundle does not keep, and a fit that is forced."""
    bundle, candidates = tmp_path / "copy.vlrt", ["left", "right", "up"]
    shutil.copytree(room / "tiny.vlrt", bundle)

    def evaluate(name: str, right: list[str], *options: str) -> subprocess.CompletedProcess[str]:
        rows = [
            {
                "video": str(room / "clip.mp4"),
                "question": f"Which way, {i}?",
                "answer": answer,
                "metadata": {"candidates": candidates},
            }
            for i, answer in enumerate(right)
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run("eval", bundle, name, "--num-frames", 4, "--candidates", "--json", *options, cwd=tmp_path)

    done = evaluate("any.jsonl", ["left"] * 6)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert 0 <= facts["groups"][0]["calibration_error"] <= 1
    results = (tmp_path / facts["results"]).read_text().splitlines()[1:]
    said = [json.loads(line)["answer"] for line in results]
    fails(evaluate("all.jsonl", said, "--calibrate"), "nearly all answers are right")
    assert json.loads(run("info", bundle, "--json", cwd=tmp_path).stdout)["model"]["choice_temperature"] == 1.0
    others = [next(c for c in candidates if c != answer) for answer in said]
    done = evaluate("most.jsonl", [*said[:4], *others[4:]], "--calibrate")
    assert done.returncode == 0, done.stderr
    fitted = json.loads(done.stdout)["calibration"]
    assert fitted["num_rows"] == 6
    facts = json.loads(run("info", bundle, "--json", cwd=tmp_path).stdout)
    assert facts["model"]["choice_temperature"] == fitted["temperature"] != 1.0
    again = run("eval", bundle, "most.jsonl", "--num-frames", 4, "--candidates", "--json", cwd=tmp_path)
    fails(again, "other settings")  # of another temperature


def test_asking_needs_none_of_the_packages_that_only_an_export_needs(room: Path, tmp_path: Path) -> None:
    for name in ("torch", "onnx", "onnxscript", "transformers", "safetensors"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name='{name}')")
    without = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = run("ask", "tiny.vlrt", "clip.mp4", QUESTION, "--max-tokens", 2, cwd=room, env=without)
    assert (done.returncode, done.stderr) == (0, "")
    fails(run("export", "tiny", "-o", "again.vlrt", cwd=room, env=without), "vlrt[export]")


def test_training_without_its_packages_names_its_own_extra(room: Path, tmp_path: Path) -> None:
    (tmp_path / "accelerate.py").write_text("raise ModuleNotFoundError(name='accelerate')")
    (tmp_path / "rows.jsonl").write_text("")
    command = ("train", "--model", room / "tiny", "--data", tmp_path / "rows.jsonl", "-o", tmp_path / "run")
    fails(run(*command, cwd=room, env={**os.environ, "PYTHONPATH": str(tmp_path)}), "accelerate", "vlrt[train]")


def test_info_of_a_bundle(room: Path) -> None:
    facts = json.loads(run("info", "tiny.vlrt", "--json", cwd=room).stdout)
    assert (facts["kind"], facts["backend"], facts["precision"]) == ("bundle", "ort", "fp32")
    assert facts["model"]["text_position_after_video"] == "largest"
    assert facts["model"]["latent"]["num_latents"] > 0
    assert facts["parity"]
    assert all(row["ok"] for row in facts["parity"])
    text = run("info", "tiny.vlrt", cwd=room).stdout
    for word in ("text_position_after_video", "largest", "latent.num_latents", "parity"):
        assert word in text


def test_info_of_a_checkpoint(room: Path) -> None:
    facts = json.loads(run("info", "tiny", "--json", cwd=room).stdout)
    assert (facts["kind"], facts["name"]) == ("checkpoint", "tiny")
    assert "parity" not in facts


def test_doctor_gives_a_reason_for_every_backend(tmp_path: Path) -> None:
    done = run("doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert {row["name"]: row["available"] for row in facts["abilities"]}["ort backend, CPU"]
    assert all(row["reason"] for row in facts["abilities"])
    assert "exact int8" in {row["name"] for row in facts["abilities"]}
    assert "tensorrt backend" in run("doctor", cwd=tmp_path).stdout


def test_an_engine_that_does_not_import_is_a_reason(room: Path, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")
    broken = {**os.environ, "PYTHONPATH": str(tmp_path)}
    fails(run("ask", "tiny.vlrt", "clip.mp4", QUESTION, cwd=room, env=broken), "libgomp.so.1")
    done = run("doctor", "--json", cwd=room, env=broken)
    assert done.returncode == 0, done.stderr  # PyTorch is still there
    (tmp_path / "torch.py").write_text("raise OSError('libc10.so: cannot open shared object file')")
    done = run("doctor", "--json", cwd=room, env=broken)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    reasons = {row["name"]: row["reason"] for row in json.loads(done.stdout)["abilities"]}
    assert "libgomp.so.1" in reasons["ort backend, CPU"]
    assert "libc10.so" in reasons["torch backend, CPU"]


def test_init_that_cannot_write_says_so(room: Path) -> None:
    fails(run("init", "clip.mp4/below", cwd=room), "cannot write clip.mp4/below: Not a directory")


def test_init_writes_a_checkpoint_that_info_reads(tmp_path: Path) -> None:
    assert run("init", "fresh", "--shape", "tiny", "--seed", 3, cwd=tmp_path).stdout == "fresh\n"
    assert run("info", "fresh", cwd=tmp_path).returncode == 0


def test_an_int8_bundle_says_so_and_answers(room: Path) -> None:
    done = run("export", "tiny", "--precision", "int8", "-o", "eight.vlrt", cwd=room)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(run("info", "eight.vlrt", "--json", cwd=room).stdout)["precision"] == "int8"
    assert run("ask", "eight.vlrt", "clip.mp4", QUESTION, "--max-tokens", 2, cwd=room).returncode == 0


def test_warnings_of_an_answer_go_to_stderr(room: Path) -> None:
    write_video(room / "whole.mkv")
    whole = (room / "whole.mkv").read_bytes()
    (room / "cut.mkv").write_bytes(whole[: len(whole) * 3 // 4])
    done = run("ask", "tiny.vlrt", "cut.mkv", QUESTION, "--fps", 2, "--max-tokens", 2, "--json", cwd=room)
    assert done.returncode == 0, done.stderr
    warnings = json.loads(done.stdout)["warnings"]
    assert warnings
    assert done.stderr.splitlines() == [f"vlrt: warning: {warning}" for warning in warnings]


def test_warnings_of_other_packages_are_one_line_each(room: Path) -> None:
    picture = Image.new("P", (64, 64))
    picture.putpalette(bytes(range(256)) * 3)
    picture.save(room / "palette.png", transparency=bytes([0, 128, 255]))  # Pillow warns when it is converted
    done = run("ask", "tiny.vlrt", "palette.png", QUESTION, "--max-tokens", 2, cwd=room)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("vlrt: warning: ") for line in done.stderr.splitlines())


def test_version(tmp_path: Path) -> None:
    assert run("--version", cwd=tmp_path).stdout == f"vlrt {vlrt.__version__}\n"


@pytest.mark.parametrize("bundle", ["missing.vlrt", "empty", "clip.mp4", "tiny", "x" * 300])
def test_what_is_no_bundle_is_refused_by_name(room: Path, bundle: str) -> None:
    (room / "empty").mkdir(exist_ok=True)
    fails(run("ask", bundle, "clip.mp4", QUESTION, cwd=room), bundle)


@pytest.mark.parametrize("path", ["missing", "empty", "clip.mp4", "x" * 300])
def test_info_refuses_what_it_does_not_know(room: Path, path: str) -> None:
    (room / "empty").mkdir(exist_ok=True)
    fails(run("info", path, cwd=room), path)


def test_missing_video(room: Path) -> None:
    fails(run("ask", "tiny.vlrt", "missing.mp4", QUESTION, cwd=room), "missing.mp4")


def test_damaged_video(room: Path) -> None:
    (room / "damaged.mp4").write_bytes(bytes(range(256)) * 64)
    fails(run("ask", "tiny.vlrt", "damaged.mp4", QUESTION, cwd=room), "damaged.mp4")


def test_a_file_name_cannot_break_the_line_or_reach_the_terminal(room: Path) -> None:
    done = run("ask", "tiny.vlrt", "two\nlines\x1b[31m.mp4", QUESTION, cwd=room)
    fails(done)
    assert "\x1b" not in done.stderr


def test_a_damaged_bundle_names_the_file(room: Path) -> None:
    shutil.copytree(room / "tiny.vlrt", room / "damaged.vlrt")
    weights = room / "damaged.vlrt" / "embed.bin"
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    fails(run("ask", "damaged.vlrt", "clip.mp4", QUESTION, cwd=room), "embed.bin", "damaged")


def test_unknown_model_type_is_refused_by_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny", shape="tiny", seed=0)
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    fails(run("export", "tiny", cwd=tmp_path), "llama")
    assert not (tmp_path / "tiny.vlrt").exists()


def test_export_does_not_replace_what_is_no_bundle(room: Path) -> None:
    (room / "thesis").mkdir()
    (room / "thesis" / "chapter1.txt").write_text("years of work")
    fails(run("export", "tiny", "-o", "thesis", cwd=room), "thesis")
    assert (room / "thesis" / "chapter1.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "COMMAND"),
        (["answer"], "answer"),
        (["ask", "b", "v"], "QUESTION"),
        (["ask", "b", "v", "q", "--frames", "8"], "--frames"),
        (["ask", "b", "v", "q", "--reasoning", "loud"], "loud"),
        (["ask", "b", "v", "q", "--num-frames", "0"], "'0'"),
        (["ask", "b", "v", "q", "--fps", "nan"], "'nan'"),
        (["ask", "b", "v", "q", "--num-frames", "8", "--fps", "1"], "--fps"),
        (["ask", "b", "v", "q", "--stream", "--json"], "--stream"),
        (["ask", "b", "v", "q", "--stream", "--choices", "A"], "--stream"),
        (["export", "c", "--precision", "int3"], "int3"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_argument(arguments: list[str], word: str, tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert word in done.stderr.splitlines()[-1]


def test_ctrl_c_ends_quietly_with_130(room: Path) -> None:
    command = [VLRT, "ask", "tiny.vlrt", "clip.mp4", QUESTION, "--reasoning", "cot", "--stream"]
    command += ["--min-tokens", "4000", "--max-tokens", "4000"]
    with started(command, room) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)  # it answers: what is interrupted is vlrt at work, not Python starting
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in complaint


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_export_that_is_stopped_leaves_nothing_behind(
    room: Path, tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    command = [VLRT, "export", str(room / "tiny"), "-o", "half.vlrt"]
    with started(command, tmp_path) as process:
        while process.poll() is None and not any(tmp_path.iterdir()):
            time.sleep(0.01)
        process.send_signal(sent)
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == code, complaint
    assert b"Traceback" not in complaint
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_an_extension_makes_an_error_of_still_ends_quietly(
    tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    script = f"""if True:
        import os, sys, time
        from vlrt import cli
        def doctor(args):
            "Is stopped."
            try:
                os.kill(os.getpid(), {int(sent)})
                time.sleep(60)
            except BaseException:
                raise ValueError("as torch does it") from None
        cli.COMMANDS["doctor"] = doctor
        sys.exit(cli.main(["doctor"]))
    """
    with started([sys.executable, "-c", script], tmp_path) as process:
        _, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (code, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [("doctor",), ("info", "tiny.vlrt"), ("info", "tiny.vlrt", "--json")])
def test_a_closed_pipe_ends_quietly(room: Path, command: tuple[str, ...], unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = (sys.executable, "-m", "vlrt", *command)
    done = subprocess.run(command, cwd=room, env=env, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device without room")
@pytest.mark.parametrize("command", [("doctor",), ("info", "tiny.vlrt", "--json")])
def test_an_output_without_room_is_told_in_one_line(room: Path, command: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "vlrt", *command], cwd=room, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.startswith(b"vlrt: error: the output cannot be written: ")
    assert done.stderr.count(b"\n") == 1, done.stderr


@pytest.mark.parametrize("mebibytes", [500, 820])
def test_memory_that_runs_out_is_told_in_one_line(room: Path, mebibytes: int) -> None:
    # The first runs out in our own arrays, the second in the engine; where it happens may move, what is said must not.
    Image.new("RGB", (4000, 3000)).save(room / "photo.png")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (mebibytes * 2**20,) * 2)

    done = run("ask", "tiny.vlrt", "photo.png", QUESTION, "--threads", 1, cwd=room, preexec_fn=limited)
    fails(done, "memory")
