"""Checkpoint directories: loaded as they are, or refused with the file's name."""

from __future__ import annotations

import json
import re

import pytest
import torch

from engine_setup import make_ready
from makeready.engines.transformers.engine import SamplingParams, TransformersEngine
from makeready.engines.transformers.loading import load_model
from makeready.errors import ModelConfigError
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny hybrid model with a byte-level tokenizer of 128 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("checkpoint")
    tiny_model("nemotron_h").save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:126]
    vocabulary = {symbol: index for index, symbol in enumerate(["<pad>", "<s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(path)
    return path


@pytest.fixture
def copy(checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_checkpoint_runs_and_says_how_far_it_is(checkpoint, capfd):
    heard: list[tuple[str, float]] = []
    model, tokenizer = load_model(checkpoint, "float32", on_progress=lambda what, share: heard.append((what, share)))
    assert [what for what, _ in heard] == ["tokenizer", "weights", "device", "ready"]
    assert heard[-1][1] == 1.0
    assert capfd.readouterr().err == ""
    engine = TransformersEngine(model, tokenizer, make_ready(model))
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    done = engine.generate(["Once upon"], params)[0]
    streamed = "".join(output.text for output in engine.stream("Once upon", params))
    engine.close()
    assert streamed == done.text == tokenizer.decode(done.token_ids, skip_special_tokens=True)
    stock = model.generate(torch.tensor([done.prompt_token_ids]), max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert stock[0, len(done.prompt_token_ids) :].tolist() == list(done.token_ids)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(ModelConfigError, match=r"nowhere' is not a directory"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("remove", "message"), [("config.json", "has no config.json"), ("model.safetensors", "has no weights")]
)
def test_a_missing_file_is_named(copy, remove, message):
    (copy / remove).unlink()
    with pytest.raises(ModelConfigError, match=message):
        load_model(copy)


@pytest.mark.parametrize("keep", [0, 1000])
def test_weights_that_were_cut_off_are_refused(copy, keep):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelConfigError, match="is empty" if not keep else "the weights in .* cannot be loaded: .+"):
        load_model(copy)


def test_weights_that_lack_tensors_are_refused(copy):
    from safetensors.torch import load_file, save_file

    file = copy / "model.safetensors"
    tensors = load_file(file)
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelConfigError, match="the weights in .* lack "):
        load_model(copy)


def test_weights_of_another_shape_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["hidden_size"] = 32
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelConfigError, match="the weights in .* have other shapes than its config.json") as refused:
        load_model(copy)
    assert re.search(r"[a-z._0-9]+ \[.*\d\], not \[.*32.*\];", str(refused.value))
    assert "more; use the config.json that these weights came with" in str(refused.value)
    assert "ignore_mismatched_sizes" not in str(refused.value)


def test_a_missing_tokenizer_is_named(copy):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelConfigError, match=r"no tokenizer.json in .*; copy it there"):
        load_model(copy)


def test_a_broken_configuration_is_refused(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelConfigError, match="cannot be loaded: "):
        load_model(copy)
