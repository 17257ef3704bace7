"""The Pico decoder, its sharding table and generation."""
