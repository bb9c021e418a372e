"""Ask a real model for a code hidden in 1,500 tokens, reading half of the blocks."""

from sketch_walk import SketchWalkConfig
from sketch_walk.evaluation import make_sample
from sketch_walk.integrations.models import load
from sketch_walk.integrations.transformers import enable

model, tokenizer = load()
sample = make_sample(tokenizer, "prose", tokens=1500, seed=2)
prompt = sample.prompt.to(model.device)

config = SketchWalkConfig(density=0.5, min_blocks=4, dense_below=0)
with enable(model, config, record=True) as handle:
    output = model.generate(prompt, attention_mask=prompt.new_ones(prompt.shape), max_new_tokens=8, do_sample=False)

print(sample.question)
print("hidden:  ", sample.answer_text)
print("answered:", tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip())
print(f"blocks read in sparse layers: {handle.summary()['block_density']:.1%}")
