"""Models and their files: sources, the catalog, headers, manifests, and what is refused."""
