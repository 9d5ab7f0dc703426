"""The three losses, as functions of tensors: usable without the rest of the package.

`contrastive` (InfoNCE over the pairs of all ranks; arithmetic in `contrastive_tiles`, plain torch, or
`contrastive_triton`), `sigmoid` (SigLIP's loss over them; `sigmoid_tiles`) and `generation` (next-token cross-entropy
over a split vocabulary; softmax in `softmax_torch` or `softmax_triton`). `group` compares arguments over ranks,
`kernels` says whether Triton can run, `derivatives` refuses second ones.

Imports parallel.mesh. Begin with `contrastive.contrastive_loss` and `generation.generation_loss`; docs/losses.md has
the reasons.
"""
