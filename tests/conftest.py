"""The quick suite draws the same hypothesis examples every time; `make test-all` draws new ones."""

import os

import hypothesis

hypothesis.settings.register_profile("quick", derandomize=True)
hypothesis.settings.register_profile("all", print_blob=True)
hypothesis.settings.load_profile(os.environ.get("KVJAX_HYPOTHESIS", "quick"))
