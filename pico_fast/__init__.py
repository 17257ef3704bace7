"""pico-fast: a fast trainer for Pico decoders, for people who study how language models learn."""

import os

# OpenMP threads that wait for each other spin by default. Where another process wants a core too, each small parallel
# region then costs a scheduler quantum: the tiny step ran at 201 to 1,000 tokens/s beside a busy process, 1,890 with
# this, which costs 6 to 15 % on an idle machine. libgomp reads it when torch is imported, so it stands here.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
