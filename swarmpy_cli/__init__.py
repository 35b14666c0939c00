"""The `swarmpy` command: arguments in, text out. It does nothing that `import swarmpy` cannot."""
