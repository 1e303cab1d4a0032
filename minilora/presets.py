"""Named changes of a cell's defaults, as `--preset` and a grid's `preset` take them. Only words and numbers."""

# The published experiments of arXiv 2506.11402. There is one preset for each way in which their targets q_proj, k_proj,
# v_proj and dense match a family's names: q, k and v on Llama, Mistral and Qwen; o, up and down, but neither q nor k
# nor v, on BERT's names (Snowflake arctic-embed); q, k, v and o on OpenELM and phi-2. Each field here differs from the
# defaults, and is a factor of its own: the head stays at its random start and sees padding, alpha follows the rank,
# test triggers were seen in training, and a density is rounded down. At this rate torch's Adafactor hardly moves B,
# which starts at 0: an epoch of the default data learns nothing (`optimizers.warnings`). Their grid has seeds 5 to 50
# by 5, ranks 1 to 32 and proportions 0 to 1 by 0.25.
STUDY = dict(
    head="frozen", pooling="padded-mean+last", scaling="rank", targets=("q", "k", "v"), dropout=0.05,
    optimizer="adafactor", lr=1e-4, weight_decay=1e-5, schedule="cosine", warmup=0.05, batch_size=128,
    inject={"split": "same", "rounding": "down"},
)  # fmt: skip
PRESETS = {
    "study": STUDY,
    "study-bert": STUDY | dict(targets=("o", "up", "down")),
    "study-phi": STUDY | dict(targets=("q", "k", "v", "o")),
}
