"""What is refused, before anything is compiled, and in what words."""

import dataclasses
import functools
import inspect

import jax
import pytest

from kvjax.cache import chain, finish, init_cache, recent, share, store
from kvjax.codecs import balance, compose, dense, quantize
from kvjax.compress import METHODS, adakv, gear, h2o, kivi, parse, snapkv, streaming_llm
from tests.compress.harness import CONFIG, plain_constants

REFUSED = [
    ("snapkv(tokens=16)", r"snapkv\(tokens=16\): expected an integer of at least 32"),
    ("pyramidkv(tokens=31)", r"pyramidkv\(tokens=31\): .* at least 32"),
    ("adakv(tokens=8, window=9)", r"adakv\(tokens=8\): .* at least 9"),
    ("snapkv(keep=0.5, tokens=64)", r"snapkv\(keep=0.5, tokens=64\): give one of them"),
    ("h2o(keep=0.5, tokens=64)", r"h2o\(keep=0.5, tokens=64\): give one of them"),
    ("streaming_llm(tokens=4)", r"streaming_llm\(tokens=4\): .* at least 5"),
    ("streaming_llm(sinks=-1)", r"streaming_llm\(sinks=-1\): .* at least 0"),
    ("streaming_llm(positions='true_')", r"positions='true_'.*'true', 'slot' or"),
    ("h2o(recent_part=1.0)", r"h2o\(recent_part=1.0\).*\(0, 1\)"),
    ("tova(tokens=0)", r"tova\(tokens=0\): .* at least 1"),
    ("kivi(bits=9)", r"kivi\(bits=9\): expected an integer from 1 to 8, or 16"),
    ("kivi(bits=2.5)", r"kivi\(bits=2.5\): expected an integer"),
    ("kivi(value_bits=0)", r"kivi\(value_bits=0\)"),
    ("kivi(group=48)", r"kivi\(group=48, residual=128\): the group must divide residual"),
    ("kivi(release=0)", r"kivi\(release=0\): expected an integer of at least 1"),
    ("h2o(release=1.5)", r"h2o\(release=1.5\): expected an integer of at least 1"),
    ("rtn(bits=12)", r"rtn\(bits=12\)"),
    ("mikv(important_bits=0)", r"mikv\(important_bits=0\): expected an integer from 1"),
    ("gear(backbone='other')", r"backbone='other'.*kivi, kcvt"),
    ("gear(rank=65)", r"gear\(rank=65\): .* 0 to buffer=64"),
    ("gear(prompt_rank=-1)", r"gear\(prompt_rank=-1\): .* 0 to span=256"),
    ("gear(span=96)", r"gear\(group=64\): .* divisor of span=96"),
    ("gear(across=1)", r"gear\(across=1\): expected True"),
    ("gear(outliers=2)", r"gear\(outliers=2\)"),
    ("gear(group=48)", r"gear\(group=48\): .* divisor of buffer=64"),
    ("mustafar(key_sparsity=1.5)", r"mustafar\(key_sparsity=1.5\): .* in \[0, 1\]"),
    ("mustafar(value_sparsity=True)", r"mustafar\(value_sparsity=True\)"),
    ("mustafar(window=-1)", r"mustafar\(window=-1\): expected an integer of at least 0"),
    ("mustafar(release=4, block=8)", r"mustafar\(block=8\): expected a divisor of release=4"),
    ("mustafar(bits=9)", r"mustafar\(bits=9\): expected an integer from 1 to 8"),
    ("snapkv(kernel=4)", r"kernel=4: expected an odd number"),
    ("snapkv(pool='sum')", r"pool='sum': expected 'mean' or 'max'"),
    ("pyramidkv(beta=0.5)", r"beta=0.5.*at least 1"),
    ("adakv(alpha=1.5)", r"alpha=1.5.*\[0, 1\]"),
    ("streaming_llm(storage=kivi())", r"streaming_llm\(storage=.*one by one.*rtn\(bits=4\)"),
    ("h2o(storage=gear())", r"h2o\(storage=.*coded by itself"),
    ("tova(storage=snapkv())", r"tova\(storage=.*one by one"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_methods_refuse(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    "name", sorted(n for n, f in METHODS.items() if "keep" in inspect.signature(f).parameters)
)
@pytest.mark.parametrize("keep", [0, 1.5, -0.1, True, "half"])
def test_keep_is_a_fraction(name, keep):
    with pytest.raises(ValueError, match=rf"{name}\(keep={keep!r}\).*\(0, 1\]"):
        METHODS[name](keep=keep)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kivi(group=32)", r"group is 32: it must divide the head size, 8"),
        ("rtn(group=6)", r"group is 6: it must divide the head size, 8"),
        ("gear(group=4, buffer=64, rank=9)", r"rank is 9: at most the head size, 8"),
        ("mikv(bits=1)", r"width is 8: .* 2 groups .* multiple of 16"),
        ("snapkv(keep=0.25)", r"prune\(keep=0.25\) keeps 6 of a prompt of 24.*always keeps 24"),
        ("expected_attention(keep=0.1)", r"keeps 2 of a prompt of 24.*always keeps 4"),
    ],
)
def test_caches_refuse(text, message):
    """What depends on the head size or the prompt: said by init_cache."""
    with pytest.raises(ValueError, match=message):
        init_cache(CONFIG, parse(text)[0][1], 1, 32, prompt=24)


def test_a_share_needs_a_prompt():
    with pytest.raises(ValueError, match=r"n=share\(0.1\).*prompt=0"):
        init_cache(CONFIG, h2o(), 1, 32)
    with pytest.raises(ValueError, match=r"share\(1.5\).*\(0, 1\]"):
        share(1.5)


def test_a_share_is_of_the_whole_prompt():
    """Stages downstream get a part of what the chain was given, not of what reaches them."""
    halves = chain(recent(share(0.5)), recent(share(0.5)))
    for method, size in ((h2o(keep=0.5), 10), (halves, 20)):
        cache = jax.eval_shape(finish, init_cache(CONFIG, method, 1, 64, prompt=40))
        assert [own.kv.size for own in cache.state[0]] == [size, size]


def test_slot_methods_take_codecs_of_single_tokens():
    plain = streaming_llm(tokens=9)
    assert streaming_llm(tokens=9, storage=dense()) == plain
    assert streaming_llm(tokens=9, storage=chain(store())) == plain
    four = streaming_llm(tokens=9, storage=store(quantize(4)))
    assert four == streaming_llm(tokens=9, storage=quantize(4)) != plain
    with pytest.raises(ValueError, match="one by one"):
        h2o(storage=compose(balance(), quantize(4)))
    with pytest.raises(ValueError, match=r"storage='kivi'.*expected a chain"):
        snapkv(storage="kivi")
    with pytest.raises(ValueError, match="one by one"):
        h2o(storage="kivi")


def test_selection_takes_any_storage():
    assert snapkv(storage=quantize(4)) == snapkv(storage=chain(store(quantize(4))))
    assert snapkv(storage=kivi()).stages[1:] == kivi().stages
    # Heads hold different tokens then, in adakv unlike numbers of them too.
    assert snapkv(storage=gear()).stages[1:] == gear(across=False).stages
    assert adakv(storage=gear()).stages[1:] == gear(across=False).stages[1:]


STORAGES = (
    "kivi",
    "kivi(bits=4)",
    "gear",
    "rtn(bits=4)",
    "turboquant",
    "vidkv",
    "mustafar",
    "dense",
)
SELECTIONS = ("snapkv", "pyramidkv", "adakv", "expected_attention", "keydiff", "knorm", "kvzip")


@pytest.mark.parametrize("method", SELECTIONS)
def test_selection_starts_with_any_storage(method):
    """With the defaults of both, shapes alone: 1,024 tokens are kept, or a share, of 4,096."""
    config = dataclasses.replace(CONFIG, head_dim=64)
    for storage in STORAGES:
        text = f"{method}(storage={storage})"
        made = functools.partial(init_cache, config, parse(text)[0][1], 1, 4160, prompt=4096)
        assert jax.tree.leaves(jax.eval_shape(made)), text


# Storages that cannot hold other tokens in each head, and those that, beside these, cannot hold
# other numbers of them.
JOINED = ("rotatekv", "cskv", "compress_kv_heads", "xkv", "actqkv")
RAGGED = ("kvquant", "mikv", "double_sparsity", "sentencekv", "zipvl")
POOLS = ("pyramidkv", "adakv", "kvzip", "prefixkv")


@pytest.mark.parametrize("method", [*SELECTIONS, "prefixkv", "ems"])
def test_selection_refuses_what_cannot_hold_unlike_heads(method):
    """Before anything is compiled; what is not refused starts."""
    config = dataclasses.replace(CONFIG, head_dim=64)
    for storage in (*JOINED, *RAGGED):
        transform = parse(f"{method}(storage={storage})")[0][1]
        given = plain_constants(transform, config)
        made = functools.partial(
            init_cache, config, transform, 1, 4160, prompt=4096, constants=given
        )
        layers_alone = method == "pyramidkv" and storage == "mikv"
        if storage in JOINED or (method in POOLS and not layers_alone):
            with pytest.raises(ValueError, match="heads"):
                jax.eval_shape(made)
        else:
            assert jax.tree.leaves(jax.eval_shape(made)), (method, storage)


def test_a_pool_refuses_constants_per_head():
    text = "adakv(tokens=16, window=4, storage=mikv(tokens=4))"
    with pytest.raises(ValueError, match="codec with constants needs heads of equal budget"):
        init_cache(CONFIG, parse(text)[0][1], 1, 32, prompt=24)


# --- the command line ---


def test_parse_builds_what_python_builds():
    found = parse(
        "dense; snapkv(keep=0.25) ;kivi(bits=2);\n snapkv(keep=.5, storage=kivi(bits=4)); "
    )
    assert found == [
        ("dense", METHODS["dense"]()),
        ("snapkv(keep=0.25)", snapkv(keep=0.25)),
        ("kivi(bits=2)", kivi(bits=2)),
        ("snapkv(keep=0.5, storage=kivi(bits=4))", snapkv(keep=0.5, storage=kivi(bits=4))),
    ]
    assert parse("snapkv(storage=rtn, pool='max')")[0][1] == snapkv(
        storage=METHODS["rtn"](), pool="max"
    )
    assert [chain for _, chain in parse("; ".join(METHODS))] == [f() for f in METHODS.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected at least one of dense"),
        ("snapk(keep=1)", r"unknown method 'snapk'; did you mean snapkv.*Known.* at character 1$"),
        ("dense; zzz", r"unknown method 'zzz'; Known: .* at character 8$"),
        ("snapkv(kep=0.5)", r"snapkv has no argument 'kep'; allowed: keep, tokens, window, .*"),
        ("dense(bits=2)", r"dense has no argument 'bits'; allowed: none"),
        ("snapkv(0.5)", r"takes arguments by name: keep, tokens, .* at character 8$"),
        ("snapkv(keep=0.5", r"never closed, at character 7$"),
        ("dense; kivi(bits=)", r"at character 1[78]$"),
        ("snapkv(**{'keep': 1})", r"no argument '\*\*'"),
        ("snapkv(keep=0.5, keep=0.6)", r"keyword argument repeated|twice"),
        ("snapkv(keep=1/2)", r"expected a method, .* at character 13$"),
        ("snapkv(keep=__import__('os'))", r"unknown method '__import__'"),
        ("snapkv(storage=kvi())", r"unknown method 'kvi'; did you mean kivi.* at character 16$"),
        ("kivi.bits", r"expected a method"),
        ("(lambda: 0)()", r"expected a method"),
        ("snapkv(window='a')", r"snapkv"),
    ],
)  # fmt: skip
def test_parse_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)
