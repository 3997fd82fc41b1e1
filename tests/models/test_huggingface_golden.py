"""What is loaded from a Hugging Face folder means what transformers says it means."""

import numpy as np
import pytest

from kvjax.models.huggingface import load_config, load_pretrained
from kvjax.models.huggingface_config import parse_config
from kvjax.models.llama import flatten
from tests import golden
from tests.golden import reference


@pytest.mark.parametrize("path", golden.cases(), ids=lambda path: path.stem)
def test_plain_forward_of_loaded_model_gives_the_logits_of_transformers(path, tmp_path):
    case = golden.load_case(path, tmp_path)
    model = load_pretrained(case.folder)
    flat = flatten(model)
    for b, row in enumerate(case.rows):
        tokens = np.concatenate([row, case.decode_tokens[b]])
        expected = np.concatenate([case.logits[b], case.decode_logits[b]])
        found = reference.forward(model.config, flat, tokens, case.length)
        # The reference is float64, transformers float32 with logits up to about 20: 1e-6 relative
        # per operation, some thirty of them in sequence.
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("path", golden.cases(), ids=lambda path: path.stem)
def test_old_and_new_config_files_are_one_configuration(path, tmp_path):
    case = golden.load_case(path, tmp_path)
    assert load_config(case.folder) == parse_config(case.config_v5)
