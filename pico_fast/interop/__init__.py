"""Exchange of models with other libraries: Hugging Face checkpoints in pico-train's format, and Llama's layout."""
