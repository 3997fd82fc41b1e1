"""The main job on a tiny model: what it writes, what it says when things go wrong, going on."""

from __future__ import annotations

import html.parser
import re
import shutil

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from experiments import compress
from experiments.exact import Exact, with_salience
from kvjax.cache import KV, New
from kvjax.models import load
from kvjax.models.llama import flatten
from tests.experiments.conftest import (
    BROKEN,
    CODED,
    CONTEXT,
    FULL,
    METHODS,
    MORE,
    OFFSETS,
    given,
    results,
    start,
)

KEYS = {
    "method", "nll", "perplexity", "kl", "top1_agreement", "needle_accuracy",
    "needle_accuracy_agnostic", "cache_bytes", "bytes_per_token", "used_bytes_per_token",
    "bits_per_value", "prefill_tokens_per_second", "decode_tokens_per_second",
    "decode_ratio_to_dense",
}  # fmt: skip
FACTS = {
    "command", "git_revision", "git_changes", "python", "jax", "jaxlib", "flax", "numpy",
    "platform", "devices", "machine", "processor", "cpus",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(finished) -> dict:
    return {row["method"]: row for row in results(finished)["rows"]}


def test_every_row_has_every_key(finished, rows):
    assert tuple(rows) == METHODS
    for name in set(METHODS) - {BROKEN}:
        assert rows[name].keys() == KEYS
        assert all(np.isfinite(v) for k, v in rows[name].items() if k != "method")
    whole = results(finished)
    assert whole["environment"].keys() >= FACTS
    assert whole["settings"]["context"] == CONTEXT and whole["settings"]["offsets"] == [*OFFSETS]


def test_dense_is_the_reference(rows):
    dense = rows["dense"]
    assert dense["kl"] == 0 and dense["top1_agreement"] == 1
    assert dense["perplexity"] == pytest.approx(np.exp(dense["nll"]))
    assert dense["decode_ratio_to_dense"] > 0  # both sides of it are dense; one short round


def test_full_budget_is_dense(rows):
    full, dense = rows[FULL], rows["dense"]
    assert full["nll"] == pytest.approx(dense["nll"], abs=1e-5)
    assert abs(full["kl"]) < 1e-6 and full["top1_agreement"] == 1
    assert full["needle_accuracy"] == dense["needle_accuracy"]
    assert full["needle_accuracy_agnostic"] == dense["needle_accuracy_agnostic"]


def test_codes_cost_something_and_save_something(rows):
    coded, dense = rows[CODED], rows["dense"]
    assert 0 < coded["kl"] < 0.1
    assert coded["cache_bytes"] < 0.5 * dense["cache_bytes"]


def test_bytes_of_dense_are_an_independent_count(rows):
    """2 layers, 2 KV heads of 8 channels, keys and values, float32; int32 positions and lengths."""
    batch, time = len(OFFSETS), CONTEXT + MORE
    exact = 2 * (2 * batch * 2 * time * 8) * 4
    positions, lengths = batch * time * 4, batch * 4
    dense = rows["dense"]
    assert dense["cache_bytes"] == exact + positions + lengths
    assert dense["bytes_per_token"] == pytest.approx(dense["cache_bytes"] / (batch * time))
    values = 2 * 2 * 2 * 8 * batch * time
    assert dense["bits_per_value"] == pytest.approx(8 * dense["cache_bytes"] / values)


def test_failure_is_reported_in_its_row(rows):
    assert rows[BROKEN] == {"method": BROKEN, "error": "RuntimeError: out of tokens <here> & now"}


def test_picture_is_one(finished):
    image = matplotlib.image.imread(finished / "pareto.png")
    high, wide, _ = image.shape
    assert 400 < high < 3000 and 800 < wide < 6000
    assert image[..., :3].std() > 0.01  # something is drawn


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.addresses, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_page_stands_alone_and_says_everything(finished, rows):
    source = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import|<script|<link", source)
    page = Page()
    page.feed(source)
    assert [a[:22] for a in page.addresses] == ["data:image/png;base64,"]
    text = "\n".join(page.text)
    for name in METHODS:
        assert name in text
    assert f"{rows['dense']['perplexity']:.2f}" in text and "out of tokens <here> & now" in text


def test_goes_on_where_it_was_interrupted(tiny, finished, tmp_path, monkeypatch):
    """Finished rows stay; what failed or is missing is run; the reference comes from dense."""
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    ran = []

    def run(self, label, chain, progress):
        ran.append(label)
        assert self.dense_logits is not None
        if label == "rtn(bits=2)":
            raise KeyboardInterrupt
        return {**before[CODED], "method": label}

    before = {row["method"]: row for row in results(out)["rows"]}
    monkeypatch.setattr(compress.Job, "run", run)
    many = "; ".join([*METHODS, "rtn(bits=8)", "rtn(bits=2)", "rtn(bits=1)"])
    with pytest.raises(KeyboardInterrupt):
        start(*given(tiny, out, f"--methods={many}"))
    assert ran == [BROKEN, "rtn(bits=8)", "rtn(bits=2)"]
    after = {row["method"]: row for row in results(out)["rows"]}
    assert all(after[name] == before[name] for name in ("dense", FULL, CODED))
    assert after.keys() == {*METHODS, "rtn(bits=8)"} and "error" not in after[BROKEN]


def test_all_done_computes_nothing(tiny, finished, tmp_path, monkeypatch):
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    monkeypatch.setattr(compress, "run", None)
    start(*given(tiny, out, f"--methods=dense; {CODED}"))
    page = (out / "report.html").read_text()
    assert CODED in page and FULL not in page  # the page shows what was asked for
    assert {row["method"] for row in results(out)["rows"]} == set(METHODS)  # nothing is lost


def test_nothing_goes_on_without_dense(tiny, tmp_path, monkeypatch):
    """A failing dense ends the run: nothing can be compared with it."""

    def run(self, label, chain, progress):
        raise RuntimeError("no memory")

    monkeypatch.setattr(compress.Job, "__init__", lambda *args: None)
    monkeypatch.setattr(compress.Job, "run", run)
    with pytest.raises(RuntimeError, match="no memory"):
        start(*given(tiny, tmp_path, "--methods=dense; knorm", "--needles=0"))


def test_salience_is_the_likeness_to_the_end_of_the_prompt(tiny):
    model, _ = load(str(tiny))
    tokens = np.random.default_rng(0).integers(0, 250, (2, 9))
    pos = jnp.broadcast_to(jnp.arange(9), (1, 2, 1, 9))
    rows = KV(jnp.zeros((2, 2, 2, 9, 8)), jnp.zeros((2, 2, 2, 9, 8)), pos)
    exact = Exact(New(rows), jnp.zeros((2, 250)), 2, 9, 0.0, jnp.asarray(tokens))
    got = np.asarray(with_salience(model, exact, 3).new.kv.extra["salience"])
    x = np.asarray(flatten(model)["embed"])[tokens]
    want = np.einsum("btd,bd->bt", x, x[:, -3:].mean(1))
    assert got.shape == (2, 2, 2, 9) and np.isneginf(got[..., -3:]).all()
    np.testing.assert_allclose(got[1, :, 1, :6], want[:, :6], rtol=1e-5, atol=1e-6)
