"""From text to micro-batches: corpus, documents, tokenizer, indexed dataset, batches."""
