"""From a corpus to a corpus: rules that remove documents and images, each counted and named."""
