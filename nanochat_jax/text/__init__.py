"""Text in, token ids out: tokenizer, chat format, calculator tool, detokenizing of completions. Imports no JAX."""
