"""pico-fast: a fast trainer for Pico decoders, for people who study how language models learn."""
