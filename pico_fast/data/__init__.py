"""Data: tokenizers, rows of token ids from parquet, batches in global order, and making such data from text."""
