"""Any image encoder behind one interface: LCL's, timm's, Hugging Face's, OpenCLIP's.

`encoder.Encoder` is the interface, each library's encoder a file, `load.load_encoder` makes the one that a name stands
for. Weights come from files that the libraries read as data; no code from a model's folder is ever run. A model whose
weights are not all there is refused: the libraries would fill in random ones. Imports config, convert, data, model
and objectives; the libraries only inside functions, after `convert.libraries.require`. Begin with `encoder.Encoder`.
"""
