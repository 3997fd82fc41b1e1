import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kvjax.models import CheckpointError, Model, save_pretrained
from kvjax.models import huggingface_write as write
from kvjax.models.decoder import forward
from kvjax.models.huggingface import load_config, load_pretrained
from kvjax.models.huggingface_config import parse_config
from kvjax.models.llama import flatten
from tests import golden
from tests.models.files import unchanged


@pytest.fixture
def case(request, tmp_path):
    name = getattr(request, "param", "llama2")
    return golden.load_case(golden.HERE / f"{name}.npz", tmp_path)


def edit(folder, **changes):
    """Changes keys of config.json; `...` removes one."""
    values = json.loads((folder / "config.json").read_text()) | changes
    values = {key: value for key, value in values.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))


def tensors(folder, change):
    """Rewrites model.safetensors with what `change` makes of its tensors."""
    path = folder / "model.safetensors"
    found = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(change(found), path)


def refuse(folder, match):
    with unchanged(folder), pytest.raises(CheckpointError, match=match) as error:
        load_pretrained(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("case", [p.stem for p in golden.cases()], indirect=True)
def test_save_and_load_is_identity(case, tmp_path):
    model = load_pretrained(case.folder)
    save_pretrained(model, tmp_path / "saved")
    again = load_pretrained(tmp_path / "saved")
    assert again.config == model.config
    for name, value in flatten(model).items():
        np.testing.assert_array_equal(flatten(again)[name], value)
    ours = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors")
    theirs = safetensors.numpy.load_file(case.folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(
    "case", [p.stem for p in golden.cases() if not p.stem.startswith("llada")], indirect=True
)
def test_transformers_reads_what_is_saved(case, tmp_path):
    """Where it is at hand: its logits of the saved folder are ours."""
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    model = load_pretrained(case.folder)
    save_pretrained(model, tmp_path / "saved")
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, (2, 12))
    positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)
    ours, _ = forward(model, jnp.asarray(tokens), positions, phase="prefill")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_save_splits_large_models(case, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "SHARD_BYTES", 20_000)
    model = load_pretrained(case.folder)
    save_pretrained(model, tmp_path / "saved")
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    again = load_pretrained(tmp_path / "saved")
    for name, value in flatten(model).items():
        np.testing.assert_array_equal(flatten(again)[name], value)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype(case, tmp_path, dtype):
    exact, model = flatten(load_pretrained(case.folder)), load_pretrained(case.folder, dtype=dtype)
    for name, value in flatten(model).items():
        assert value.dtype == dtype
        np.testing.assert_array_equal(value, exact[name].astype(dtype))
    save_pretrained(model, tmp_path / "saved")
    again = flatten(load_pretrained(tmp_path / "saved", dtype=dtype))
    np.testing.assert_array_equal(again["layers.q"], flatten(model)["layers.q"])


def test_integer_dtype(case):
    with pytest.raises(TypeError, match="floating"):
        load_pretrained(case.folder, dtype=jnp.int8)


def test_float16_overflow_is_an_error(case):
    tensors(case.folder, lambda t: t | {"model.norm.weight": np.full(32, 7e4, np.float32)})
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has values beyond"):
        load_pretrained(case.folder, dtype=jnp.float16)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_check_finite(case, bad):
    def spoil(t):
        t["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
        return t

    tensors(case.folder, spoil)
    load_pretrained(case.folder)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight' has NaN or infinite"):
        load_pretrained(case.folder, check_finite=True)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", ""])
@pytest.mark.parametrize("case", ["gemma3"], indirect=True)
def test_multimodal_gemma3(case, prefix):
    expected = flatten(load_pretrained(case.folder))
    values = json.loads((case.folder / "config.json").read_text())
    del values["model_type"]
    outer = {"model_type": "gemma3", "text_config": values, "eos_token_id": [1, 106]}
    (case.folder / "config.json").write_text(json.dumps(outer))

    def rename(found):
        found = {prefix + name.removeprefix("model."): value for name, value in found.items()}
        return found | {"vision_tower.x.weight": np.zeros((2, 2), np.float32)}

    tensors(case.folder, rename)
    model = load_pretrained(case.folder)
    assert model.config.family == "gemma3_text"
    for name, value in flatten(model).items():
        np.testing.assert_array_equal(value, expected[name])


def test_eos_of_generation_config_wins(case):
    (case.folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_config(case.folder).eos == (2, 7)


def test_missing_tensor(case):
    def drop(found):
        del found["model.layers.1.self_attn.v_proj.weight"]
        return found

    tensors(case.folder, drop)
    refuse(case.folder, r"'model\.layers\.1\.self_attn\.v_proj\.weight' is missing")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.x.mlp.up_proj.weight",
        "something.else",
    ],
)
def test_tensor_that_nothing_would_read(case, name):
    tensors(case.folder, lambda found: found | {name: np.zeros((32, 32), np.float32)})
    refuse(case.folder, f"does not call for 1 of the tensors, first '{name}'")


def test_old_rotary_buffers_are_ignored(case):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    tensors(case.folder, lambda found: found | buffer)
    load_pretrained(case.folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": 3}, "layers.2.* is missing"),
        ({"num_hidden_layers": 1}, "does not call for 9 of the tensors"),
        ({"hidden_size": 64}, "configuration says"),
        ({"vocab_size": 100}, r"'embed', but the configuration says \(100, 32\)"),
        ({"num_key_value_heads": 2}, "'layers.k'"),
        ({"head_dim": 4}, "configuration says"),
        ({"attention_bias": True}, "q_proj.bias' is missing"),
    ],
)
def test_configuration_that_contradicts_the_tensors(case, changes, match):
    edit(case.folder, **changes)
    refuse(case.folder, match)


@pytest.mark.parametrize("case", ["llama_bias"], indirect=True)
def test_untied_without_a_head(case):
    edit(case.folder, tie_word_embeddings=False)
    refuse(case.folder, r"lm_head\.weight' is missing.*tie_word_embeddings is false")


@pytest.mark.parametrize("case", ["phi3"], indirect=True)
def test_fused_weights_of_the_wrong_size(case):
    edit(case.folder, num_key_value_heads=1)
    refuse(case.folder, "qkv_proj.weight' has shape")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba', expected one of llama, mistral"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["llama"]}, "model_type is"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_size": ...}, "hidden_size is None"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0, expected an integer"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": -32}, "hidden_size is -32"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, expected .* 1 to 4096"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "multiple of kv_heads"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', expected one of silu"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"tie_word_embeddings": "yes"}, "true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [1.5]}, "eos_token_id"),
        ({"bos_token_id": []}, "bos_token_id"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": "llama3"}, "rope_scaling"),
        ({"rope_scaling": {"type": "spiral"}}, "rope_type is 'spiral', expected default, linear"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor is '4'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": False}}, "truncate"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1]}}, "long_factor is None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor"),
        ({"use_bidirectional_attention": True}, "causal"),
    ],
)
def test_configurations_that_are_refused(case, changes, match):
    edit(case.folder, **changes)
    refuse(case.folder, match)


@pytest.mark.parametrize("case", ["llada"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"block_type": "sequential"}, "block_type is 'sequential', expected 'llama'"),
        ({"activation_type": "swiglu"}, "activation_type"),
        ({"layer_norm_type": "default"}, "layer_norm_type"),
        ({"rope": ...}, "rope is None, expected True"),
        ({"rope": 1}, "rope is 1"),
        ({"alibi": True}, "alibi"),
        ({"include_bias": True}, "include_bias"),
        ({"attention_layer_norm": True}, "attention_layer_norm"),
        ({"weight_tying": ...}, "weight_tying is None"),
        ({"mask_token_id": ...}, "mask_token_id is None, expected a token id"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id"),
        ({"n_heads": 5}, "n_heads is 5, expected a divisor"),
        ({"n_kv_heads": 3}, "multiple of kv_heads"),
        ({"mlp_hidden_size": None}, "mlp_hidden_size is None"),
        ({"embedding_size": 128}, r"'embed', but the configuration says \(128, 32\)"),
        ({"include_qkv_bias": True}, "q_proj.bias' is missing"),
        ({"n_layers": 3}, "blocks.2.* is missing"),
    ],
)
def test_llada_folders_that_are_refused(case, changes, match):
    edit(case.folder, **changes)
    refuse(case.folder, match)


@pytest.mark.parametrize("case", ["llada"], indirect=True)
def test_llada_is_bidirectional_and_has_a_mask(case, tmp_path):
    model = load_pretrained(case.folder)
    assert model.config.bidirectional and model.config.mask_token == 95
    assert model.config.family == "llada" and not model.config.tied
    odd = Model(dataclasses.replace(model.config, norm_offset=True), flatten(model))
    with pytest.raises(ValueError, match="LLaDA folder cannot hold this model: norm_offset"):
        save_pretrained(odd, tmp_path / "saved")


def test_layer_types(case):
    values = {"model_type": "qwen3", "sliding_window": 4, "use_sliding_window": True}
    base = json.loads((case.folder / "config.json").read_text()) | values
    kinds = ["sliding_attention", "full_attention"]
    assert parse_config(base | {"layer_types": kinds}).windows == (4, None)
    assert parse_config(base | {"max_window_layers": 1}).windows == (None, 4)
    off = base | {"use_sliding_window": False}
    assert parse_config(off | {"layer_types": kinds}).windows == ()
    for bad in (kinds[:1], [*kinds[:1], "chunked_attention"], "full_attention"):
        with pytest.raises(CheckpointError, match="layer_types"):
            parse_config(base | {"layer_types": bad})


def test_phi3_calls_longrope_by_old_names(case):
    base = json.loads((case.folder / "config.json").read_text()) | {"model_type": "phi3"}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    for name in ("su", "yarn", "longrope"):
        config = parse_config(base | {"rope_scaling": {"type": name, **factors}})
        assert config.rope.kind == "longrope" and config.rope.original_length == 4096


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[]", "expected an object"),
        ("{", "not JSON"),
        ('{"model_type": "llama", "model_type": "qwen2"}', "appears twice"),
        ('{"a":' + "[" * 10_000, "nested deeper"),
        ('{"a":"' + "x" * 2**22 + '"}', "expected at most 4194304"),
    ],
)
def test_malformed_config_file(case, text, match):
    (case.folder / "config.json").write_text(text)
    refuse(case.folder, match)


def test_pickled_weights_are_never_read(case):
    (case.folder / "model.safetensors").unlink()
    (case.folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    with unchanged(case.folder), pytest.raises(FileNotFoundError, match="pickled"):
        load_pretrained(case.folder)


def test_code_beside_the_weights_is_never_run(case):
    edit(case.folder, auto_map={"AutoModelForCausalLM": "modeling.Evil"}, trust_remote_code=True)
    (case.folder / "modeling.py").write_text("raise SystemExit('ran')")
    with unchanged(case.folder):
        load_pretrained(case.folder)


def test_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_pretrained(tmp_path)
