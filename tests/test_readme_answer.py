"""The README's part on the answer: its commands run as printed, and its numbers are what they print."""

import json
import re
import shlex
from pathlib import Path

import pytest

from launch.__main__ import main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PART = README[README.index("## The answer, and how sure it is") : README.index("## A single run")]
BASE = "python -m launch optimum GRID --context 128K --loss 2.615"
ELSEWHERE = ("launch next", "launch report", "--out", "--ttft")  # next and report have tests of their own; two are limits


def commands():
    """Of the block and of the table; what begins with "..." or an option goes on from the question of the block."""
    found = re.findall(r"^    (python -m launch .*)$", PART, re.MULTILINE)
    for row in re.findall(r"^\| .* \| (.*) \|$", PART, re.MULTILINE):
        for text in re.findall(r"`([^`]+)`", row):
            if text.startswith(("python", "...", "--")):
                found.append(text if text.startswith("python") else f"{BASE} {text.removeprefix('... ')}")
    return [one for one in found if not any(word in one for word in ELSEWHERE)]


def asked(command, tmp_path, *more):
    """The words of a command after "python -m launch", of the paper's preset, and of a config.json that is there."""
    own = tmp_path / "config.json"
    own.write_text(
        json.dumps(
            {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32,
             "num_key_value_heads": 8, "intermediate_size": 5632, "vocab_size": 32000, "tie_word_embeddings": False}
        )
    )  # fmt: skip
    text = command.removeprefix("python -m launch ").replace("GRID", "--preset paper").replace("CONFIG.json", str(own))
    if "--like" in text:
        text = text.replace(" --loss 2.615", "")
    return [*shlex.split(text), *more]


def test_there_are_such_commands():
    assert len(commands()) > 12
    assert sum("--like" in one for one in commands()) == 2


@pytest.mark.parametrize("command", commands())
def test_every_command_runs(command, tmp_path, capsys):
    assert main(asked(command, tmp_path)) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(("(", "Of 3 devices, ", "preset paper: fitted"))


def answer(capsys, *options):
    assert main(["optimum", "--preset", "paper", "--context", "128K", "--loss", "2.615", "--format", "json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_numbers_of_the_first_answer(capsys):
    found, fixed = answer(capsys), answer(capsys, "--aspect", "paper")
    assert (found["n_heads"], found["n_kv_heads"], found["n_candidates"]) == (8, 1, 8)
    layers, width, size = re.search(r"in (\d+) layers x (\d+) \(([\d.]+)B parameters\)", PART).groups()
    assert (round(found["n_layers"]), round(found["d_model"])) == (int(layers), int(width))
    assert found["n_params"] == pytest.approx(1e9 * float(size), rel=0.005)
    assert f"probability {found['probability']:.1%}," in PART.replace("\n", " ")
    low, high = found["saving_interval"]
    assert f"{found['saving']:.0%} less ({100 * low:.0f} to {100 * high:.0f}%)" in PART
    assert f"{fixed['saving_memory']:.1%} less memory\nand {fixed['saving_flops']:.1%} fewer FLOPs" in PART
    worth = found["worth"]
    assert f"heads alone are worth ({worth['heads']:.0%}), what the shape alone ({worth['shape']:.0%})" in PART
    assert fixed["saving_memory"] == pytest.approx(0.508, abs=0.005)  # Figure 1 of the paper
    assert fixed["saving_flops"] == pytest.approx(0.578, abs=0.005)


def test_the_prices_of_four_v5e(capsys):
    options = "--cost price --device v5e --n_devices 4 --cache_dtype int8 --batch 1 --efficiency bound"
    how = shlex.split(options)
    tensor, best = answer(capsys, *how, "--parallelism", "tensor"), answer(capsys, *how)
    assert (tensor["n_kv_heads"], best["n_kv_heads"]) == (4, 1)
    assert f"${tensor['cost']:.3f} a million tokens" in PART
    assert f"(8,1) costs ${best['cost']:.3f}." in PART
