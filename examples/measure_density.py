"""What a budget promises, what the calculator counts, and what a run really read."""

from sketch_walk import SketchWalkConfig, causal_density
from sketch_walk.complexity import estimate
from sketch_walk.evaluation import evaluate
from sketch_walk.integrations.models import load
from sketch_walk.integrations.transformers import enable

TOKENS = 1000
model, tokenizer = load()

for density in (0.25, 0.5, 1.0):
    config = SketchWalkConfig(density=density, min_blocks=4, dense_below=0)
    with enable(model, config, record=True) as handle:
        result = evaluate(
            model, tokenizer, tasks=("prose",), lengths=(TOKENS,), samples=1, handle=handle, progress=False
        )
    operations = estimate(TOKENS, config).operations
    print(
        f"density {density:.2f}: counted {causal_density(TOKENS, config):.3f}, read {result.block_density:.3f} of the "
        f"blocks and {result.pair_density:.3f} of the pairs, answer loss {result.nll:.3f}, "
        f"{operations.dense_layer / operations.sparse_layer:.1f}x fewer attention operations in a sparse layer"
    )
