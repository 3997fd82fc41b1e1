"""Fine-tuning of merged KV heads on a tiny random model."""

from __future__ import annotations

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.evaluate import load_text, samples
from kvjax.models import load
from kvjax.train import language_modelling


def program(tiny, out, *more) -> subprocess.CompletedProcess:
    arguments = (
        f"--model={tiny}", f"--text={tiny}/text.txt", f"--out={out}", "--tokens=32",
        "--offset=500", "--steps=6", "--held_out=10", "--held_out_samples=2", "--samples=4",
        "--batch=2", "--report_every=2", "--evaluate_every=4", "--checkpoint_every=2",
        "--learning_rate=0.01", *more,
    )  # fmt: skip
    command = [sys.executable, "-m", "experiments.tune_heads", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rows(out) -> dict:
    return {r["row"]: r for r in json.loads((out / "results.json").read_text())["rows"]}


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    done = program(tiny, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_what_a_run_leaves(tuned):
    found = rows(tuned)
    assert list(found) == [
        "all heads", "after 0", "training step 2", "training step 4", "after 4",
        "training step 6", "after 6",
    ]  # fmt: skip
    # Of the model's predictions: the loss falls, from the heads that were merged.
    assert found["training step 6"]["loss"] < found["training step 2"]["loss"]


def test_the_folder_is_the_tuned_model(tuned, tiny):
    model, tokenizer = load(tuned / "model")
    whole, _ = load(tiny)
    assert model.config.kv_heads == 1 < whole.config.kv_heads
    held_out = samples(load_text(str(tiny / "text.txt")), tokenizer, [10, 42], 32)
    loss = [
        float(language_modelling()(model, {"tokens": jnp.asarray(row[None])}, None)[0])
        for row in held_out
    ]
    assert np.exp(np.mean(loss)) == pytest.approx(rows(tuned)["after 6"]["perplexity"], rel=1e-4)
    # Nothing but the attention weights was trained.
    assert np.array_equal(model.embed[...], whole.embed[...])
    assert np.array_equal(model.layers.gate[...], whole.layers.gate[...])


@pytest.mark.slow
def test_a_finished_run_trains_no_more(tuned, tiny):
    before = rows(tuned)
    done = program(tiny, tuned)
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows(tuned) == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--methods=snapkv", ("snapkv", "compress_kv_heads")),
        ("--methods=compress_kv_heads; compress_kv_heads(kv_heads=1)", ("expected one",)),
        ("--methods=compress_kv_heads(kv_heads=3)", ("heads is 3", "divisor")),
        ("--held_out=999999", ("999999", "largest possible")),
    ],
)
def test_refuses(tiny, tmp_path, more, words):
    done = program(tiny, tmp_path, more)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in said
    assert all(word in said for word in words), said
