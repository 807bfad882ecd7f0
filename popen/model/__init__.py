"""The segmenter: vision tower -> projector -> causal LM -> codebook tokens -> pixel decoder.

Shapes used everywhere:
    B images, R rows (questions; every row belongs to one image), T tokens, V vocabulary, D LM width,
    N targets of a batch (flat over the rows), S scales (= tower levels), K codebook tokens a scale,
    C decoder width, H W mask size, M ensemble members, P image tokens in the LM.
"""

IGNORED = -100  # torch's label for "no loss here"
