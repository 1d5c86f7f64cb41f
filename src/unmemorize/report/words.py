"""What the words of a report mean, for each family: pairs of a word and its meaning. Source: ours."""

from __future__ import annotations

LANGUAGE_WORDS = (
    (
        "Loss",
        "Surprise of the model at a text, in nats per token. Lower means better predicted; much lower than on new "
        "text means memorized.",
    ),
    ("Validation loss", "Loss on text the model never saw."),
    ("Loss on repeated text", "Loss on the documents that stood in the training data many times."),
    (
        "Gap closed",
        "1 \N{MINUS SIGN} (validation \N{MINUS SIGN} repeated loss) of the method, divided by the same of standard "
        "training.",
    ),
    (
        "Benefit kept",
        "Part of the validation loss that repetition gains over a deduplicated corpus and that the method keeps.",
    ),
    (
        "Extracted",
        "Given the beginning of a training text, the model goes on with the rest, word for word.",
    ),
    (
        "off, own, foreign, all",
        "Which sinks are open: none; the text's own; those of another text; every one. Placebo: as many random "
        "neurons closed.",
    ),
    (
        "Target, neighbour, held-out, ordinary",
        "What should go; other memorized text that should stay; memorized text of another origin; text never "
        "memorized.",
    ),
)

NEURON_WORDS = (
    LANGUAGE_WORDS[0],
    (
        "Neuron",
        "An input channel of an MLP's last projection; off means that its activation is multiplied by 0.",
    ),
    ("Verbatim", "Given the beginning of a text, the model goes on with the rest, word for word."),
    ("Near-verbatim", "At most a quarter of the tokens would have to be changed, left out or put in."),
    ("Matched", "Tokens of a continuation before the first one that differs."),
    ("Perplexity", "exp of the loss on ordinary text, all its tokens weighted alike."),
    ("Placebo", "As many random neurons of each layer off: what any removal of that size loses."),
    (
        "Controls",
        "random chooses by chance, magnitude by the size of what a neuron writes; neither sees a text.",
    ),
    LANGUAGE_WORDS[-1],
)

PICTURE_WORDS = (
    ("Copy", "A picture as similar to the training picture as the threshold asks, or more."),
    ("Copied", "Share of prompts, or of pictures, that give a copy; the settings say how seeds are pooled."),
    (
        "Kept",
        "Similarity to the picture of the same prompt and seed before anything was changed. 1: the same picture.",
    ),
    (
        "Between seeds",
        "Similarity of the pictures of one prompt with each other. Lower is more varied; near 1 is memory.",
    ),
    (
        "Placebo",
        "As many random neurons off. A removal that does no better, or no less harm, proves nothing about its neurons.",
    ),
    (
        "Rival, twin",
        "What the result has to be compared with; a twin is the same training without the target pictures.",
    ),
    (
        "Gate, score",
        "Similarity of the first denoising steps under different noise (gate), or with neurons on and off (score). "
        "Above the threshold counts as memorized, below it as broken.",
    ),
    (
        "Candidates, chosen",
        "Neurons that broke the memory together, and those left after each was tried alone.",
    ),
    ("Sample-forward", "One pass of the denoiser for one sample: the unit of cost that no machine changes."),
    (
        "Target, neighbour, held-out, ordinary",
        "What should go; other memorized pictures that should stay; memorized pictures of another origin; prompts "
        "never memorized.",
    ),
)
