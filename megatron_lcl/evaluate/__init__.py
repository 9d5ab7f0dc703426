"""How good an encoder is: on labeled or captioned images, and on held-out documents.

Any encoder on any images: `run` opens the images (`sources`, as an `image_set`), checks that they decode (`checking`),
loads the encoders (`encoders`), refuses what the model has not learned (`trained`), computes features once (`features`,
`patches`, `workers`) and hands them to the tasks (`zero_shot`, `retrieval`, `knn`, `probes`, `captioning`), whose
options are in `settings`. `results` has the intervals, the table, the JSON and the picture.

Held-out documents: `heldout` measures the contrast and the generation by the rules of `rules`; `heldout_packs` reads
the corpus, `heldout_ranks` ranks distinct images and contexts, `heldout_results` is what was measured.

Imports config, convert, data, model, objectives and parallel. Not `train`, which makes held-out evaluations of its own
run. Begin with `run.evaluate` and `heldout.evaluate_checkpoint`.
"""
