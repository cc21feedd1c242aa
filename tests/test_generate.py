"""`launch generate` and `load_model(...).generate`, on a run that was trained here: text in, text out, and what is refused."""

import io
import json
import re
import shutil

import pytest

import gqa_jax
from gqa_jax.data.tokenizer import ByteTokenizer
from gqa_jax.errors import ConfigError
from gqa_jax.inference import loaded
from gqa_jax.training.parameters import write_import
from launch import __main__ as launch
from launch import commands
from tests.test_inference import params_of, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Imported parameters with the tokenizer of bytes; ids 257 to 319 are of no token."""
    path = tmp_path_factory.mktemp("imported") / "model"
    config = tiny(4, 1, vocab_size=320, param_dtype="float32")
    write_import(path, config, params_of(config), provenance="a test", tokenizer=ByteTokenizer())
    return str(path)


@pytest.fixture(scope="module")
def model(folder):
    return gqa_jax.load_model(folder)


def test_texts_and_ids_give_the_same(model):
    found = model.generate("Fellow citizens", 12)
    assert isinstance(found, loaded.Generation)
    assert [found] == model.generate(["Fellow citizens"], 12) == model.generate([list(b"Fellow citizens")], 12)
    assert (found.n_prompt_tokens, len(found.tokens), found.finish) == (15, 12, "length")
    assert max(found.tokens) < 257
    assert found.text == bytes(one for one in found.tokens if one < 256).decode(errors="replace")


def test_each_prompt_is_answered_as_alone(model):
    prompts = ["Fellow citizens", "A", "of the Senate and House of Representatives"]
    assert model.generate(prompts, 8) == [model.generate(prompt, 8) for prompt in prompts]


def test_the_end_of_a_document_ends_an_answer_and_is_no_part_of_it(model):
    free = model.generate("Fellow", 20, stop=[])
    end = free.tokens[4]
    found = model.generate("Fellow", 20, stop=[end])
    first = free.tokens.index(end)
    assert (found.tokens, found.finish) == (free.tokens[:first], "stop")


def test_int8_and_bfloat16(model):
    usual = model.generate("Fellow citizens", 4)
    assert model.generate("Fellow citizens", 4, cache_dtype="int8").n_prompt_tokens == usual.n_prompt_tokens
    assert len(model.generate("Fellow citizens", 4, dtype="bfloat16").tokens) == 4
    assert len(model._engines) >= 3


def test_a_terminal_is_shown_text_and_a_pipe_json_lines(folder, model, capsys, monkeypatch, tmp_path):
    argv = ["generate", folder, "--max_new_tokens", "9", "--temperature", "0.7", "--seed", "3"]
    assert launch.main([*argv, "--prompt", "Fellow"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    expected = model.generate("Fellow", 9, temperature=0.7, seed=3)
    assert json.loads(line) == expected.to_dict() | {"tokens": expected.tokens}

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert launch.main([*argv, "--prompt", "Fellow"]) == 0
    assert capsys.readouterr().out == "Fellow" + expected.text.rstrip("\ufffd") + "\n"
    monkeypatch.undo()

    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text('"one"\n[116, 119, 111]\n{"prompt": "three"}\n')
    assert commands.read_prompts(str(tmp_path / "a.txt")) == ["one", "two"]
    assert commands.read_prompts(str(tmp_path / "b.jsonl")) == ["one", [116, 119, 111], "three"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert launch.main([*argv, "--prompts", "-"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([""], {}, "prompt 0 is empty: .* is id 256"),
        ([[5], [257]], {}, "prompt 1 has the id 257: ids of this model are 0 to 256"),
        ([[-1]], {}, "prompt 0 has the id -1"),
        ([1, 2], {}, "prompts must be texts, or lists of integer ids"),
        ([[1.5]], {}, "prompts must be texts, or lists of integer ids"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens = 0: must be an integer of at least 1"),
        (["a" * 30, "b"], {"context": 32, "max_new_tokens": 8}, r"prompt 0 has 30 tokens, with 8 new ones 38, and the cache "
         "holds 32: shorten it, ask for 2 new tokens, or give context=38"),
        (["a"], {"context": 1}, "context = 1: must be at least 2"),
        (["a"], {"stop": [400]}, "stop has the id 400"),
        (["a"], {"cache_dtype": "int4"}, "cache_dtype = 'int4': use float32, bfloat16, int8"),
        (["a"], {"dtype": "float99"}, "float99"),
        (["a"], {"mesh": "tensor=3"}, "can't share 4 query heads"),
        (["a"], {"temperature": -0.5}, "temperature = -0.5"),
    ],
)  # fmt: skip
def test_bad_input(model, prompts, options, message):
    with pytest.raises(ConfigError, match=message):
        model.generate(prompts, **options)


def test_a_batch_that_does_not_fit_says_what_would(model, monkeypatch):
    monkeypatch.setattr(loaded, "free_bytes", lambda: 1e6)
    with pytest.raises(ConfigError, match=r"caches of 400 sequences of 256 positions take .* (\d+) of them fit, or") as raised:
        model.generate([[1]] * 400, 200)
    fits = int(re.search(r"(\d+) of them fit", str(raised.value))[1])
    engine = model.engine()
    loaded.require_room(engine, engine.plan([1] * fits, 200))
    with pytest.raises(ConfigError):
        loaded.require_room(engine, engine.plan([1] * (fits + 1), 200))


def test_a_model_without_its_tokenizer(folder, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    shutil.rmtree(bare / "tokenizer")
    found = gqa_jax.load_model(bare)
    with pytest.raises(ConfigError, match=r"needs a tokenizer: no tokenizer is kept in .*--tokenizer"):
        found.generate("a")
    assert found.generate([[97]], 3)[0].text is None
    assert launch.main(["generate", str(bare), "--prompt", "a"]) == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert launch.main(["generate", str(bare), "--prompt", "a", "--tokenizer", "bytes", "--max_new_tokens", "2"]) == 0
    assert launch.main(["generate", str(bare), "--prompt", "a", "--tokenizer", "gpt2"]) == 2
    assert "50,257 entries, the model 320" in capsys.readouterr().err
    assert launch.main(["generate", str(tmp_path / "nowhere"), "--prompt", "a"]) == 2
    assert "no result.json" in capsys.readouterr().err


def test_lines_of_prompts_that_are_none(tmp_path):
    (tmp_path / "a.jsonl").write_text('"one"\n{"text": "two"}\n')
    with pytest.raises(ConfigError, match=r"a.jsonl, line 2: must be a text, a list of ids"):
        commands.read_prompts(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text("one\n")
    with pytest.raises(ConfigError, match="line 1: no JSON"):
        commands.read_prompts(str(tmp_path / "a.jsonl"))
