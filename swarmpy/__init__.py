"""swarmpy: pool machines to run language models that none of them could run alone."""
