"""A quantising process that the library ends, as where an assertion of its own fails."""

from aborting_llama import abort

if __name__ == "__main__":
    abort(())
