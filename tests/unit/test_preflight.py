"""What is wrong with the options is said before torch is imported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parity.errors import CandidateError, ModelError, UsageError
from parity.preflight import (
    check_injection,
    check_options,
    check_output,
    check_spec,
    parse_tokens,
    read_text,
)

_MORE = {"attention": "eager", "faults": None, "accept": None, "weights": None, "noise": 0, "chat": False}


def options(**given: Any) -> SimpleNamespace:
    plain = {"prompt": None, "prompt_file": None, "tokens": "1 2", "model": None, "dtype": None, "device": "cpu"}
    return SimpleNamespace(**(plain | {"prompts": None, "pad": None} | _MORE | given))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tokens": None}, r"^nothing to run\. Give --prompt TEXT"),
        ({"tokens": " \n"}, r"^--tokens: empty, no token to run"),
        ({"tokens": None, "prompt": ""}, r"^the prompt is empty"),
        ({"tokens": "1 2 x"}, r"^--tokens: 'x' is not a token id, and no file is named '1 2 x'\."),
        ({"tokens": "1 2\n3"}, r"^--tokens: rows of 2, 1 ids"),
        ({"tokens": "1 1000"}, r"^token id 1000 is outside the vocabulary of tiny-qwen3 \(0 … 999\)"),
        ({"tokens": "-1"}, r"^token id -1 is outside"),
        ({"tokens": "9" * 30}, r"^token id 9{30} is outside"),
        ({"tokens": "9" * 41}, r"'9{40,}.* is not a token id"),
        ({"tokens": "1 " * 2049}, r"^the prompt has 2049 tokens, but tiny-qwen3 has positions for 2048"),
        ({"dtype": "float12"}, r"^dtype 'float12' is not one of float32, bfloat16, float16"),
        ({"device": "mars"}, r"^device 'mars': not known"),
        ({"device": "cuda:x"}, r"^device 'cuda:x': not known"),
        ({"device": "meta"}, r"^device 'meta': not known"),
        ({"attention": "flash"}, r"^attention 'flash' is not one of eager, sdpa"),
        ({"noise": -1}, r"^--noise -1"),
        ({"chat": True}, r"^--chat applies a template to a prompt"),
        ({"faults": "mine"}, r"^faults 'mine': write module:function"),
        ({"accept": "kv-cache-fp61"}, r"^--accept 'kv-cache-fp61': no precision regime\. Did you mean kv-cache-fp16\?"),
        ({"accept": "kv-cache-fp16,norm-eps"}, r"^--accept 'norm-eps': no precision regime\. .*products-tf32"),
        ({"weights": "ggml:F"}, r"^--weights 'ggml:F': write one of gguf:PATH, mlx:PATH, onnx:PATH, or checkpoint"),
        ({"weights": "mlx:nowhere"}, r"^weights mlx:nowhere: no such file"),
        ({"weights": "gguf:nowhere.gguf"}, r"^weights gguf:nowhere.gguf: no such file"),
        ({"model": "./nowhere"}, r"^model './nowhere': no such directory"),
    ],
)
def test_options_that_no_run_can_mean(given: dict[str, Any], said: str) -> None:
    with pytest.raises((UsageError, ModelError), match=said) as caught:
        check_options(options(**given))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"accept": "kv-cache-fp16"},
        {"device": "cuda:1"},
        {"dtype": "float16"},
        {"model": "owner/name"},
    ],
)
def test_options_that_a_run_can_mean(given: dict[str, Any]) -> None:
    check_options(options(**given))


def test_a_dump_may_say_what_to_run() -> None:
    check_options(options(tokens=None), has_dump=True)


def test_a_prompt_wants_a_tokenizer(tiny: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    check_options(options(model=str(tmp_path)))
    with pytest.raises(UsageError, match=r"has no tokenizer \(found: config.json, model.safetensors\)"):
        check_options(options(tokens=None, prompt="Hello", model=str(tmp_path)))


def test_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "port.py").touch()
    check_spec("port.py:load", "candidate")
    check_spec("impl.qwen3:load", "candidate")
    for spec, said in {
        "absent.py:load": "no file absent.py in",
        "nothing_of_this_name:load": "no module 'nothing_of_this_name'",
        "impl.qwen3": "write module:function",
        ":load": "write module:function",
        "port.py:": "write module:function",
    }.items():
        with pytest.raises(CandidateError, match=said):
            check_spec(spec, "candidate")


def test_a_recording_is_what_its_name_says() -> None:
    for name in ("a", "a.h5", "a.hdf5", "a.safetensors"):
        check_output(Path(name))
    with pytest.raises(UsageError, match=r"^a\.npz: no \.npz is written"):
        check_output(Path("a.npz"))


def test_injections() -> None:
    for text in ("rope-theta", "rope-theta=1e4@3", "rope-theta@0"):
        check_injection(text, more=False)
    check_injection("mine", more=True)
    for text, said in {
        "rope-thet": "Did you mean rope-theta",
        "rope-theta=x": "'x' is not a number",
        "@": "write",
    }.items():
        with pytest.raises(UsageError, match=said):
            check_injection(text, more=False)


def test_token_files(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("1 2\n\n3, 4\n")
    assert parse_tokens(str(path)) == ((1, 2), (3, 4))
    path.write_text("1 2\n3 y\n")
    with pytest.raises(UsageError, match=r"ids\.txt: 'y' in line 2 is not a token id"):
        parse_tokens(str(path))


def test_texts_are_files_of_utf8(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\x00")
    for name, said in {"bytes": "not UTF-8", "nowhere": "No such file", ".": "is a directory", "a\0b": "not a"}.items():
        with pytest.raises(UsageError, match=said):
            read_text("prompt file", tmp_path / name)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(UsageError, match=r"is 17179869184 bytes long"):
        read_text("prompt file", tmp_path / "sparse")
