"""Doing it: launch, workers, programs, the decoder, generation, training, reallocation, traces."""
