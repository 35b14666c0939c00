"""Fuzzing: a table of every decoder, and a runner that feeds each of them arbitrary bytes."""
