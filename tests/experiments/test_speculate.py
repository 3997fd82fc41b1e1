"""The speculation experiment on the tiny model, in a process of its own (its flags are its own)."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

DRAFTERS = ("prompt_lookup(least=1)", "token_recycling(tree=6)")
NEW, PROMPTS, COLD, BATCH = 8, 5, 2, 1  # batches of one: fewer shapes to compile
H2O = "h2o(tokens=12, release=4)"
PROGRAM = """
import dataclasses, json, sys
import jax.numpy as jnp
from experiments import speculate as s

argv = ["speculate", *sys.argv[1:]]
warm, speculate = [], s.speculate
def watched(model, cache, logits, number, drafter, **how):
    if type(drafter).__name__ == "TokenRecycling":
        warm.append(how["state"] is not None)
    return speculate(model, cache, logits, number, drafter, **how)
s.speculate = watched
s.main(s.FLAGS(argv))

# A near tie and a true difference, planted in what a drafter said.
job = s.Job({name: s.FLAGS[name].value for name in s.SETTINGS})
filled = job.filled(job.prompts[:1])
plain, _ = job.plain(filled)
mine = dataclasses.replace(plain, tokens=plain.tokens.at[:, 3].add(1))
counts = []
for margin in (0.0, 1e9):
    job.settings["margin"] = margin
    tally = s.Tally()
    job.compare(tally, filled, plain, mine)
    job.compare(tally, filled, plain, plain)
    counts.append((tally.different, tally.excused))
print(json.dumps({"counts": counts, "warm": warm}))
"""
QUESTIONS = """
import json, sys
from experiments import speculate as s

s.main(s.FLAGS(["speculate", *sys.argv[1:]]))
settings = {name: s.FLAGS[name].value for name in s.SETTINGS}
_, tokenizer = s.load(settings["model"])
print(json.dumps([tokenizer.decode(row) for row in s.prompts_of(settings, tokenizer)]))
"""
WRONG = """
import pathlib, sys
from experiments.speculate import questions_of

for path in pathlib.Path(sys.argv[1]).glob("wrong*.jsonl"):
    try:
        questions_of(str(path))
    except ValueError as error:
        print(error)
"""
# As Spec-Bench and GSM8K have them, and a blank line at the end.
ASKED = (
    {"question_id": 81, "category": "writing", "turns": ["Name a colour.", "Another one."]},
    {"question_id": 82, "category": "qa", "turns": ["x " * 500]},  # too long, left out
    {"question": "Two and two?", "answer": "#### 4"},
    {"question_id": 83, "category": "qa", "turns": ["What is \u00fc?"]},
)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"


def start(*arguments: str, program: str = PROGRAM) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program, *arguments],
        capture_output=True, text=True, check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(tiny, tmp_path_factory) -> tuple[pathlib.Path, dict, str]:
    out = tmp_path_factory.mktemp("speculate")
    run = start(
        f"--model={tiny}", f"--text={tiny / 'text.txt'}", f"--out={out}", f"--prompts={PROMPTS}",
        f"--drafters={'; '.join(DRAFTERS)}", f"--new_tokens={NEW}", f"--cold={COLD}",
        f"--batch={BATCH}", "--longest=24", f"--methods={H2O}", "--nocompile_cache",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads((out / "results.json").read_text())["rows"]
    return out, {row["drafter"]: row for row in rows}, run.stdout


def test_every_part_has_its_row(found):
    out, rows, printed = found
    lookup = DRAFTERS[0]
    assert list(rows) == [
        *DRAFTERS, "random trees, batches of 1", f"{lookup}, batches of 1", f"{lookup} in {H2O}",
    ]  # fmt: skip
    for row in rows.values():
        assert row["lossless"] is True and row["different"] == row["excused"]
        assert row["tokens_per_second"] > 0 and row["ratio_to_plain"] > 0
        assert row["mean_accepted_tokens"] * row["forwards_per_token"] == pytest.approx(1)
        assert 1 <= row["mean_accepted_tokens"] <= 11
        assert row["accepted_so_far"][-1] == pytest.approx(row["mean_accepted_tokens"])
        assert row["drafter"][:12] in printed
    requests = [rows[name]["requests"] for name in rows]
    assert requests == [*(PROMPTS,) * 3, 2 * BATCH, PROMPTS]
    assert (out / "accepted.png").stat().st_size > 10_000


def test_states_are_carried(found):
    """To compile, then five requests; the last two with a fresh state too, for comparison."""
    _, rows, printed = found
    one, two = [True, False], [False, False, True, True]
    assert json.loads(printed.splitlines()[-1])["warm"] == two + one + one
    lookup, recycling = (rows[name] for name in DRAFTERS)
    assert "cold_accepted_tokens" not in lookup
    assert recycling["warm_accepted_tokens"] >= recycling["cold_accepted_tokens"] >= 1


def test_near_ties_are_told_from_differences(found):
    assert json.loads(found[2].splitlines()[-1])["counts"] == [[1, 0], [1, 1]]


@pytest.mark.slow
def test_questions_go_through_the_chat_template(tiny, tmp_path):
    chatty, file = tmp_path / "chatty", tmp_path / "questions.jsonl"
    shutil.copytree(tiny, chatty)
    facts = json.loads((chatty / "tokenizer_config.json").read_text())
    (chatty / "tokenizer_config.json").write_text(json.dumps(facts | {"chat_template": TEMPLATE}))
    file.write_text("\n".join(map(json.dumps, ASKED)) + "\n\n", encoding="utf-8")
    how = (
        f"--model={chatty}", f"--questions={file}", f"--drafters={DRAFTERS[0]}", "--new_tokens=4",
        "--batch=1", "--methods=", "--nocompile_cache", "--longest=64", f"--out={tmp_path / 'out'}",
    )  # fmt: skip
    run = start(*how, "--prompts=3", program=QUESTIONS)
    assert run.returncode == 0, run.stderr[-2000:]
    texts = ["Name a colour.", "Two and two?", "What is \u00fc?"]
    assert json.loads(run.stdout.splitlines()[-1]) == [f"<user>{text}<answer>" for text in texts]
    row = json.loads((tmp_path / "out" / "results.json").read_text())["rows"][0]
    assert (row["requests"], row["tokens"], row["lossless"]) == (3, 12, True)

    few = start(*how, "--prompts=4", f"--out={tmp_path / 'few'}", program=QUESTIONS)
    assert few.returncode != 0 and "3 have at most longest=64 tokens" in few.stderr
    wrong = ('{"prompt": "def f():"}', "[1]", "{", '{"turns": []}', '{"question": 7}')
    for number, line in enumerate(wrong):
        (tmp_path / f"wrong{number}.jsonl").write_text(f"{json.dumps(ASKED[0])}\n{line}\n")
    run = start(str(tmp_path), program=WRONG)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("line 2: expected an object with 'turns'") == len(wrong)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--drafters=prompt_look", "did you mean prompt_lookup"),
        ("--drafters=token_recycling(tree=99)", "between 1 and 80"),
        ("--methods=h2o(release=0)", "release=0"),
        ("--questions=nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_mistakes_are_told(tiny, tmp_path, argument, message):
    run = start(f"--model={tiny}", f"--out={tmp_path}", argument)
    assert run.returncode != 0 and message in run.stderr
