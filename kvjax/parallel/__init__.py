"""Many devices: meshes, rules from logical axes to mesh axes, context-parallel attention.

mesh = make_mesh("data=2,tensor=2,context=2")
model, tokenizer = kvjax.load(name, sharding=parameter_sharding(mesh))
logits, cache = kvjax.prefill(model, tokens, method, new_tokens=64, layout=Layout(mesh))
"""

from kvjax.parallel.context import Layout, replicated, shard
from kvjax.parallel.distributed import agree, fail_together, fetch, init, is_main
from kvjax.parallel.mesh import AXES, make_mesh, parse_mesh
from kvjax.parallel.rules import ParameterSharding, Rules, parameter_sharding, shardings

__all__ = [
    "AXES",
    "Layout",
    "ParameterSharding",
    "Rules",
    "agree",
    "fail_together",
    "fetch",
    "init",
    "is_main",
    "make_mesh",
    "parameter_sharding",
    "parse_mesh",
    "replicated",
    "shard",
    "shardings",
]
