"""The attention module on its own: queries, keys and values in, output and selection out."""

import torch

from sketch_walk.common.core import SketchWalkAttention, create_sketch_walk_config

torch.manual_seed(0)
batch, num_heads, num_kv_heads, tokens, head_dim = 1, 8, 2, 1024, 64
query = torch.randn(batch, num_heads, tokens, head_dim)
key = torch.randn(batch, num_kv_heads, tokens, head_dim)
value = torch.randn(batch, num_kv_heads, tokens, head_dim)

config = create_sketch_walk_config(block_size=64, sketch_dim=64, top_k_blocks=4, sparsity_exponent=8)
attention = SketchWalkAttention(config, head_dim=head_dim)
output, selected_blocks = attention(query, key, value, layer_idx=5, causal=True)

print("output:", tuple(output.shape))
print("selection:", tuple(selected_blocks.shape), selected_blocks.dtype)
print("the last query block read the key blocks", selected_blocks[0, -1].tolist())
